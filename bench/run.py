"""Runs one table: `python -m bench.run configs/runs/decode.toml`.

Every arm is a fresh `vllm serve`; arms go A B C C B A, so that a drift of the machine hits all
alike. A run file may have cells: skews that every arm's server replays one after the other. A row
is refused if the ranks disagree or if the policy did not run. Rows are JSON lines in
bench/results/; a run that was ended continues behind its last row.
"""

from __future__ import annotations

import json
import random
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bench import client, real_size_model
from bench.provenance import ROOT, config_hash, provenance
from bench.server import Arm, Server

RESULTS = ROOT / "bench" / "results"
REARRANGED = ("eplb", "first_copy", "metro")
"""Balancers whose experts vLLM's EPLB places anew."""
console = Console()


def run(
    file: Annotated[Path, typer.Argument(help="A run file, e.g. configs/runs/decode.toml.")],
    rounds: Annotated[int, typer.Option(help="Times that all arms go forth and back.")] = 1,
    arms: Annotated[str, typer.Option(help="Only these arms, with commas between.")] = "",
    cells: Annotated[str, typer.Option(help="Only these cells, with commas between.")] = "",
) -> None:
    """Run all arms of a run file and append their rows to bench/results/."""
    settings = tomllib.loads(file.read_text())
    of_cells = chosen(skews_of(settings), cells)
    of_arms = chosen(settings["arms"], arms)
    results = RESULTS / f"{file.stem}.jsonl"
    digest = config_hash(settings)
    done = _rows(results, digest)
    model = real_size_model.ensure(**settings["model"])
    order = [*settings["arms"], *reversed(settings["arms"])] * rounds
    for position, name in enumerate(order):
        measured_cells = {row.get("cell", "") for row in done if row["position"] == position}
        todo = {cell: skew for cell, skew in of_cells.items() if cell not in measured_cells}
        if name not in of_arms or not todo:
            continue
        console.print(f"[bold]{position + 1}/{len(order)} {name}[/]")
        for measured in _measure(name, settings, model, todo):
            row = {
                "run": file.stem,
                "arm": name,
                "position": position,
                "config_hash": digest,
                "seed": settings["seed"],
                **measured,
                **provenance(),
            }
            _append(results, row)
            console.print({k: v for k, v in measured.items() if not isinstance(v, dict | list)})


def skews_of(settings: dict[str, Any]) -> dict[str, Any]:
    """The skew of each cell; a file without cells has one without a name."""
    if "cells" in settings:
        skews: dict[str, Any] = settings["cells"]
        return skews
    return {"": settings["replay"]}


def chosen(named: dict[str, Any], names: str) -> dict[str, Any]:
    """Those with one of the names, all if there are none.

    Raises:
        KeyError: a name that does not exist.
    """
    return {name: named[name] for name in names.split(",")} if names else named


def _rows(results: Path, digest: str) -> list[dict[str, Any]]:
    if not results.exists():
        return []
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    return [row for row in rows if row["config_hash"] == digest]


def _append(results: Path, row: dict[str, Any]) -> None:
    results.parent.mkdir(exist_ok=True)
    with results.open("a") as file:
        file.write(json.dumps(row) + "\n")


def arm_of(name: str, settings: dict[str, Any]) -> Arm:
    """The server of one arm: its own settings, the shared ones, and the replayed routing."""
    own = settings["arms"][name]
    balancer = own.get("balancer", name)
    asked = {key: value for key, value in own.items() if key != "balancer"}
    if balancer in REARRANGED:
        asked |= settings.get("eplb", {})
    first = next(iter(skews_of(settings).values()))
    asked["replay"] = {**first, "seed": settings["seed"]}
    serve = settings["serve"]
    return Arm(
        name=name,
        balancer=balancer,
        settings=asked,
        tensor_parallel=serve.get("tensor_parallel", 1),
        data_parallel=serve.get("data_parallel", 1),
        flags=serve["flags"],
    )


def _prompts(load: dict[str, Any], seed: int) -> list[str]:
    words = ("list", "value", "module", "returns", "object", "string", "file", "name", "type")
    pick = random.Random(seed)
    return [
        " ".join(pick.choice(words) for _ in range(load["prompt_words"]))
        for _ in range(load["requests"])
    ]


def _measure(
    name: str, settings: dict[str, Any], model: Path, cells: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """One row per cell and repeat, from one fresh and warm server."""
    load = settings["load"]
    prompts = _prompts(load, settings["seed"])
    top_k = json.loads((model / "config.json").read_text())["num_experts_per_tok"]

    def send(max_tokens: int) -> client.Load:
        return client.send(server.url, str(model), prompts, max_tokens=max_tokens)

    with Server(arm_of(name, settings), model) as server:
        for cell, skew in cells.items():
            if cell:
                server.replay({**skew, "seed": settings["seed"]})
            send(load["warm_tokens"])
            send(load["warm_tokens"])
            for repeat in range(load["repeats"]):
                server.reset()
                answers = send(load["max_tokens"])
                ranks = server.status(per_layer=True)
                require_trustworthy(name, ranks)
                where = {"cell": cell} if cell else {}
                yield {
                    **where,
                    "repeat": repeat,
                    **_times(answers),
                    **_counters(ranks),
                    **_balance(ranks, answers.seconds, top_k),
                }


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


def _balance(ranks: list[dict[str, Any]], seconds: float, top_k: int) -> dict[str, Any]:
    """Tokens through the model per second, how long ranks wait for the slowest, and fetches.

    The waiting share is of the time in a layer's experts: 1 - mean / maximum over the ranks, with
    time for fetches counted as waiting, summed over layers and batches.
    """
    first = ranks[0]
    tokens = first["pairs"] / first["num_layers"] / top_k
    busy_us = fetch_us = slowest_us = 0.0
    for layers in zip(*(rank["layers"] for rank in ranks), strict=True):
        batches = zip(*(layer["recent_experts_us"] for layer in layers), strict=True)
        for of_ranks in batches:
            busy_us += sum(of_ranks) / len(ranks)
            slowest_us += max(of_ranks)
        fetch_us += max(layer.get("fetch_wait_us", 0.0) for layer in layers)
    found = {
        "model_tokens_per_s": tokens / seconds,
        "waiting_share": 1 - busy_us / (slowest_us + fetch_us),
        "fetch_wait_share": fetch_us / (slowest_us + fetch_us),
    }
    for name in ("fetches", "early_fetches", "early_hits", "hits", "wasted_bytes", "evictions"):
        if name in first:
            found[name] = sum(rank[name] for rank in ranks)
    return found


if __name__ == "__main__":
    typer.run(run)
