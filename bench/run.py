"""Runs one table: `python -m bench.run configs/runs/decode.toml`.

Every arm is a fresh `vllm serve`; arms go A B C C B A, so that a drift of the machine hits all
alike. A row is refused if the ranks disagree or if the policy did not run. Rows are JSON lines in
bench/results/; a run that was ended continues behind its last row.

A run file may hold several `loads` instead of one `load`, factors by which one rank is made `slow`,
and arms with a `place`: a policy of `vllm-balance place` whose map the server loads. A trace is
looked for in the folder that --traces names.
"""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bench import client, real_size_model
from bench.placed import SLOW_RANK, Placed
from bench.provenance import ROOT, config_hash, provenance
from bench.server import Arm, Server
from bench.slow_rank import slowed

RESULTS = ROOT / "bench" / "results"
console = Console()


def run(
    file: Annotated[Path, typer.Argument(help="A run file, e.g. configs/runs/decode.toml.")],
    rounds: Annotated[int, typer.Option(help="Times that all arms go forth and back.")] = 1,
    traces: Annotated[Path | None, typer.Option(help="Folder of the recorded traces.")] = None,
) -> None:
    """Run all arms of a run file and append their rows to bench/results/."""
    settings = tomllib.loads(file.read_text())
    results = RESULTS / f"{file.stem}.jsonl"
    digest = config_hash(settings)
    done = _rows(results, digest)
    model = real_size_model.ensure(**settings["model"])
    placed = None if "trace" not in settings["replay"] else _placed(settings, model, traces, digest)
    starts = starts_of(settings)
    order = [*starts, *reversed(starts)] * rounds
    for position, start in enumerate(order):
        if any(row["position"] == position and row["arm"] == start.arm for row in done):
            continue
        console.print(f"[bold]{position + 1}/{len(order)} {start.arm}[/]")
        for measured in list(_measure(start, settings, model, placed)):
            row = {
                "run": file.stem,
                "arm": start.arm,
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One start of a server, and the factors by which the slow rank is slowed while it runs."""

    arm: str
    factors: tuple[float, ...]


def starts_of(settings: dict[str, Any]) -> list[Start]:
    """One start for each arm; one for each factor where the map depends on it."""
    factors = tuple(float(factor) for factor in settings.get("slow", [1.0]))
    starts = []
    for name, arm in settings["arms"].items():
        if arm.get("place") == "gem":
            starts += [Start(arm=name, factors=(factor,)) for factor in factors]
        else:
            starts.append(Start(arm=name, factors=factors))
    return starts


def _placed(settings: dict[str, Any], model: Path, folder: Path | None, digest: str) -> Placed:
    """The files of arms with a placement, made and verified."""
    if folder is None:
        raise typer.BadParameter("this run replays a trace: name its folder with --traces")
    placed = Placed(
        model=model,
        trace=folder / settings["replay"]["trace"],
        folder=Path(tempfile.gettempdir()) / f"vllm-balance-run-{digest}",
        num_ranks=settings["serve"].get("tensor_parallel", 1),
        settings=settings["place"],
        seed=settings["seed"],
    )
    placed.prepare(settings.get("slow", [1.0]))
    console.print(f"slowdown asked and shown by the profile's kernels: {placed.shown_slowdown}")
    return placed


def arm_of(start: Start, settings: dict[str, Any], placed: Placed | None = None) -> Arm:
    """The server of one arm: its own settings, the shared ones, and the replayed routing."""
    name, own = start.arm, settings["arms"][start.arm]
    balancer = own.get("balancer", name)
    asked = {key: value for key, value in own.items() if key not in ("balancer", "place")}
    if balancer != "static":
        asked |= settings.get("eplb", {})
    asked["replay"] = {**settings["replay"], "seed": settings["seed"]}
    if placed is not None:
        asked["replay"]["trace"] = str(placed.replayed)
        if "place" in own:
            asked["map"] = str(placed.map(own["place"], start.factors[0]))
        if "online" in own:
            asked["profile"] = str(placed.profile)
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


def _measure(
    start: Start, settings: dict[str, Any], model: Path, placed: Placed | None
) -> Iterator[dict[str, Any]]:
    """One row per factor, load and repeat, from one fresh and warm server."""
    loads = settings.get("loads") or {"": settings["load"]}
    with Server(arm_of(start, settings, placed), model) as server:
        for factor in start.factors:
            with _slow(server, factor):
                for name, load in loads.items():
                    where = {"load": name} if name else {}
                    if placed is not None:
                        where |= {"slow": factor, "slow_shown": placed.shown_slowdown[factor]}
                    for measured in _repeat(server, load, settings["seed"], model):
                        yield {**where, **measured}


def _slow(server: Server, factor: float) -> contextlib.AbstractContextManager[None]:
    """The slow rank slowed, if at all: other layouts name their workers otherwise."""
    return slowed(server.worker(SLOW_RANK), factor) if factor > 1 else contextlib.nullcontext()


def _repeat(
    server: Server, load: dict[str, Any], seed: int, model: Path
) -> Iterator[dict[str, Any]]:
    """One row per repeat of a load, behind its warm-up."""
    prompts = prompts_of(load, seed)
    for _ in range(load.get("warm_repeats", 2)):
        client.send(server.url, str(model), prompts, max_tokens=load["warm_tokens"])
    for repeat in range(load["repeats"]):
        server.reset()
        answers = client.send(server.url, str(model), prompts, max_tokens=load["max_tokens"])
        ranks = server.status()
        require_trustworthy(server.arm.name, ranks)
        yield {"repeat": repeat, **_times(answers), **_counters(ranks)}


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
        "e2e_ms": load.e2e_ms,
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
        "placement": first["placement"],
        "experts_us_per_rank": [rank["experts_us"] for rank in ranks],
        **({"online": first["online"]} if "online" in first else {}),
    }


if __name__ == "__main__":
    typer.run(run)
