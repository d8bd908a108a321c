"""Runs one table: `python -m bench.run configs/runs/decode.toml`.

Every arm is a fresh `vllm serve`; arms go A B C C B A, so that a drift of the machine hits all
alike. A row is refused if the ranks disagree or if the policy did not run. Rows are JSON lines in
bench/results/; a run that was ended continues behind its last row.
"""

from __future__ import annotations

import json
import random
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bench import client, real_size_model
from bench.provenance import ROOT, config_hash, provenance
from bench.server import Arm, Server

RESULTS = ROOT / "bench" / "results"
console = Console()


def run(
    file: Annotated[Path, typer.Argument(help="A run file, e.g. configs/runs/decode.toml.")],
    rounds: Annotated[int, typer.Option(help="Times that all arms go forth and back.")] = 1,
) -> None:
    """Run all arms of a run file and append their rows to bench/results/."""
    settings = tomllib.loads(file.read_text())
    results = RESULTS / f"{file.stem}.jsonl"
    digest = config_hash(settings)
    done = _rows(results, digest)
    model = real_size_model.ensure(**settings["model"])
    order = [*settings["arms"], *reversed(settings["arms"])] * rounds
    for position, name in enumerate(order):
        if any(row["position"] == position and row["arm"] == name for row in done):
            continue
        console.print(f"[bold]{position + 1}/{len(order)} {name}[/]")
        for measured in _measure(name, settings, model):
            row = {
                "run": file.stem,
                "arm": name,
                "position": position,
                "config_hash": digest,
                "seed": settings["seed"],
                **measured,
                **provenance(),
            }
            append(results, row)
            console.print({k: v for k, v in measured.items() if not isinstance(v, dict | list)})


def _rows(results: Path, digest: str) -> list[dict[str, Any]]:
    if not results.exists():
        return []
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    return [row for row in rows if row["config_hash"] == digest]


def append(results: Path, row: dict[str, Any]) -> None:
    """Adds a row to a file of results, which is made if it is missing."""
    results.parent.mkdir(exist_ok=True)
    with results.open("a") as file:
        file.write(json.dumps(row) + "\n")


def arm_of(name: str, settings: dict[str, Any]) -> Arm:
    """The server of one arm: its own settings, the shared ones, and the replayed routing."""
    own = settings["arms"][name]
    balancer = own.get("balancer", name)
    asked = {key: value for key, value in own.items() if key != "balancer"}
    if balancer != "static":
        asked |= settings.get("eplb", {})
    asked["replay"] = {**settings["replay"], "seed": settings["seed"]}
    serve = settings["serve"]
    return Arm(
        name=name,
        balancer=balancer,
        settings=asked,
        tensor_parallel=serve.get("tensor_parallel", 1),
        data_parallel=serve.get("data_parallel", 1),
        flags=serve["flags"],
    )


def prompts_of(load: dict[str, Any], seed: int) -> list[str]:
    """The prompts of a load, drawn with a seed."""
    words = ("list", "value", "module", "returns", "object", "string", "file", "name", "type")
    pick = random.Random(seed)
    return [
        " ".join(pick.choice(words) for _ in range(load["prompt_words"]))
        for _ in range(load["requests"])
    ]


def _measure(name: str, settings: dict[str, Any], model: Path) -> list[dict[str, Any]]:
    """One row per repeat, from one fresh and warm server."""
    load = settings["load"]
    prompts = prompts_of(load, settings["seed"])
    rows = []
    with Server(arm_of(name, settings), model) as server:
        client.send(server.url, str(model), prompts, max_tokens=load["warm_tokens"])
        client.send(server.url, str(model), prompts, max_tokens=load["warm_tokens"])
        for repeat in range(load["repeats"]):
            server.reset()
            answers = client.send(server.url, str(model), prompts, max_tokens=load["max_tokens"])
            ranks = server.status()
            require_trustworthy(name, ranks)
            rows.append({"repeat": repeat, **_times(answers), **_counters(ranks)})
    return rows


def require_trustworthy(name: str, ranks: list[dict[str, Any]]) -> None:
    """Returns if all ranks decided the same and the policy ran.

    Raises:
        RuntimeError: otherwise; the numbers would mean nothing.
    """
    shared = ("decisions", "max_activated_sum", "max_tokens_sum", "pairs", "activated_per_rank")
    for key in shared:
        if any(rank[key] != ranks[0][key] for rank in ranks):
            raise RuntimeError(f"{name}: ranks differ in {key}; no number from this run.")
    if ranks[0]["decisions"] == 0 or ranks[0]["pairs"] == 0:
        raise RuntimeError(f"{name}: the policy never ran; no number from this run.")


def _times(load: client.Load) -> dict[str, float]:
    return {
        "tpot_ms": load.tpot_ms,
        "ttft_ms": load.ttft_ms,
        "tokens_per_s": load.tokens_per_s,
    }


def _counters(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    first = ranks[0]
    steps = first["decisions"] / first["num_layers"]
    slowest = max(ranks, key=lambda rank: rank["experts_us"])
    layer_us = slowest["experts_us"] + slowest["experts_wrapping_us"] + slowest["decide_us"]
    return {
        "steps": steps,
        "activated_worst_rank": first["max_activated_sum"] / steps,
        "tokens_worst_rank": first["max_tokens_sum"] / steps,
        "decide_us_per_layer": slowest["decide_us"] / slowest["decisions"],
        "decide_share": slowest["decide_us"] / layer_us,
        "wrapping_share": slowest["experts_wrapping_us"] / layer_us,
        "experts_us_per_layer": slowest["experts_us"] / slowest["decisions"],
        "memory_bound_batches": first["memory_bound_batches"],
        "compute_bound_batches": first["compute_bound_batches"],
        "policy": first["balancer"],
    }


if __name__ == "__main__":
    typer.run(run)
