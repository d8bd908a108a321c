"""Writes configs/hardware/NAME.toml of a CPU machine from its rows and its profile.

The formulas are in `bench/machine_numbers.py` and `bench/machine_servers.py`; here are units,
sources and what is true of every CPU: experts run in turn, kernels have no tiles, collectives are
copies whose latency is in the fixed times of a layer.
"""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

from bench import machine_numbers, machine_servers
from bench.predictions import NUMBERS
from bench.provenance import ROOT
from vllm_balance import profiles
from vllm_balance.errors import BalancerError
from vllm_balance.profiles import Profile
from vllm_balance.simulate.hardware import Hardware

FOLDER = ROOT / "configs" / "hardware"
Row = dict[str, Any]
Tables = dict[str, Any]


def profile_of(name: str, folder: Path = FOLDER) -> Profile:
    """The profile that a hardware file is written from. Raises BalancerError if there is none."""
    path = folder / f"{name}.profile.json"
    if not path.is_file():
        raise BalancerError(
            f"There is no {path.name} in configs/hardware. Measure the experts first: "
            f"`vllm-balance profile MODEL --ranks 2 -o configs/hardware/{path.name}`."
        )
    return profiles.load(path)


def write(name: str, rows: list[Row], folder: Path = FOLDER) -> Path:
    """Where the hardware file of a machine was written from its rows and NAME.profile.json, with
    the profiles of other experts that are beside it, NAME.ANY.profile.json.

    Raises:
        BalancerError: profile or rows are missing, or are of different ranks.
    """
    tables = document(name, rows, profile_of(name, folder))
    if others := sorted(file.name for file in folder.glob(f"{name}.*.profile.json")):
        tables["other_profiles"] = others
    path = folder / f"{name}.toml"
    path.write_text(text(tables))
    return path


def document(name: str, rows: list[Row], profile: Profile) -> Tables:
    """The content of a hardware file, which the schema has accepted.

    Raises:
        BalancerError: rows are missing, or profile and rows are of different ranks.
    """
    cores = machine_numbers.of_cores(rows, profile)
    products = machine_numbers.part(rows, "product", profile.shape.dtype)
    ranks = len(products[-1]["time_us"])
    if len(profile.ranks) != ranks:
        raise BalancerError(
            f"The profile is of {len(profile.ranks)} ranks and the rows of this machine of {ranks}."
            f" Measure both with as many ranks as a server has."
        )
    tables = _without_fixed(name, rows[-1]["machine"], ranks, cores, profile)
    bare = Hardware.model_validate(tables)
    share = machine_servers.served_experts(rows, bare, profile)
    tables["efficiency"]["served_experts"] = _number(share, "1", "served")
    bare = Hardware.model_validate(tables)
    return _with_fixed(tables, machine_servers.of_servers(rows, bare, profile))


def text(tables: Tables) -> str:
    """TOML: plain values, then a table for each dictionary without a unit."""
    plain, parts = [], []
    for key, value in tables.items():
        if isinstance(value, dict) and "unit" not in value:
            lines = [f"{inner} = {_value(content)}" for inner, content in value.items()]
            parts.append("\n".join((f"[{key}]", *lines)))
        else:
            plain.append(f"{key} = {_value(value)}")
    return "\n\n".join(("\n".join(plain), *parts)) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {_value(content)}' for key, content in value.items())} }}"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return f"{value:g}"


def _number(value: float, unit: str, source: str) -> Tables:
    """Three digits: no constant is known better."""
    return {"value": float(f"{value:.3g}"), "unit": unit, "source": source}


def _without_fixed(
    name: str, machine: str, ranks: int, cores: machine_numbers.Values, profile: Profile
) -> Tables:
    """The file with fixed times of 0, attention at the peak and experts as fast as in the profile,
    which the formulas for servers start from."""

    def whole(value: int, source: str) -> Tables:
        return {"value": value, "unit": "1", "source": source}

    def share(key: str, source: str) -> Tables:
        return _number(cores[key], "1", source)

    memory = re.search(r"(\d+) GiB", machine)
    if memory is None:
        raise BalancerError(f"The machine {machine!r} does not say its memory in GiB.")
    zero = _number(0, "us", "servers")
    copied = _number(cores["copy"], "byte/s", "copies")
    shape, (number, width) = profile.shape, NUMBERS[profile.shape.dtype]
    megabytes = 3e-6 * width * shape.hidden * shape.inner
    return {
        "kind": "vllm-balance hardware",
        "format": 1,
        "name": f"{ranks} CPU ranks, a core each: {machine}",
        "profile": f"{name}.profile.json",
        "machine": machine,
        "experts": "in_turn",
        "memory": _number(int(memory[1]) * 2**30 / ranks, "byte", "machine"),
        "memory_bandwidth": _number(cores["memory_bandwidth"], "byte/s", "rates"),
        "ranks_per_node": whole(ranks, "machine"),
        "compute": {number: _number(cores["peak"], "FLOP/s", "rates")},
        "efficiency": {
            "expert_streaming": share("expert_streaming", "profile"),
            "expert_compute": share("expert_compute", "profile"),
            "expert_exposed": share("expert_exposed", "profile"),
            "dense_streaming": share("dense_streaming", "products"),
            "dense_compute": share("dense_compute", "products"),
            "attention_compute": _number(1, "1", "prompts"),
            "dense_exposed": share("dense_exposed", "products"),
            "served_experts": _number(1, "1", "served"),
        },
        "tiles": {
            "compute_tokens": whole(1, "profile"),
            "stream_tokens": whole(8192, "profile"),
            "stream_share": _number(1, "1", "profile"),
        },
        "fixed": {
            "experts": _number(cores["experts_us"], "us", "profile"),
            "layer": zero,
            "step": zero,
            "token": zero,
            "prompt_value": {**zero, "source": "prompts"},
            "request": {**zero, "source": "bursts"},
            "request_beside": {**zero, "source": "bursts"},
        },
        "decide": {"eplb": zero, "metro": zero},
        "engine": {
            "batched_tokens": whole(2048 * ranks, "vllm"),
            "sequences": whole(128 * ranks, "vllm"),
        },
        "scale_up": {"latency": zero, "bandwidth": copied},
        "host": {"latency": {**zero, "source": "copies"}, "bandwidth": copied},
        "sources": {
            "machine": f"{ranks} ranks share {machine}",
            "profile": f"`vllm-balance profile`, all ranks at once: {cores['first_us']:.0f} us for "
            f"an expert of {megabytes:.1f} MB and one token, {cores['token_us']:.0f} us for each "
            f"further token in large batches; no tiles",
            "products": f"`python -m bench.machine`, torch's {shape.dtype} products on all cores "
            f"at once",
            "rates": "the faster of experts (profile) and products",
            "copies": "`python -m bench.machine`, copies of an expert on all cores at once; a "
            "collective is a copy too, its latency is in the time of a layer",
            "servers": "`python -m bench.machine`: what is left of TPOT of servers of one and two "
            "layers beyond experts and products; time to decide by the servers' own clocks",
            "served": "`python -m bench.machine`: predicted over measured time of the experts of "
            "servers of one and two layers, median over loads",
            "bursts": "`python -m bench.machine`: what is left of TTFT of bursts of short prompts",
            "prompts": "`python -m bench.machine`: what is left of TTFT of prompts of 500 and "
            "1,000 tokens beyond experts, products and fixed times",
            "vllm": f"vLLM 0.32, EngineArgs.get_batch_defaults, for `vllm serve` on CPUs, times "
            f"{ranks} tensor-parallel ranks",
        },
    }


def _with_fixed(tables: Tables, found: machine_numbers.Values) -> Tables:
    full = deepcopy(tables)
    for key in ("layer", "step", "token", "prompt_value", "request", "request_beside"):
        full["fixed"][key] = _number(found[key], "us", full["fixed"][key]["source"])
    for balancer in full["decide"]:
        full["decide"][balancer] = _number(found["decide"], "us", "servers")
    attention = _number(found["attention_compute"], "1", "prompts")
    full["efficiency"]["attention_compute"] = attention
    Hardware.model_validate(full)
    return full
