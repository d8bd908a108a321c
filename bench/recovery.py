"""What a change in mid-run costs, and how soon it is over: `python -m bench.recovery --traces DIR`.

A server is sent bursts of requests, one after another, while other traffic comes and then one rank
becomes slow (configs/runs/recovery.toml). Every arm lives through the same on a fresh server; arms
go A B C C B A. Rows are JSON lines in bench/results/recovery.jsonl, one per burst, written when a
server has lived through all; `started` is the same in all rows of a run, and in no other's. A run
that was ended continues with the next server.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bench import command, counters, gate, markdown, real_size_model, run_files
from bench.ended_run import append, unfinished
from bench.load import Load, send, timed
from bench.placed import SLOW_RANK, Placed, prepared, said, traffic
from bench.provenance import ROOT, config_hash, harness, provenance, sources
from bench.server import Server
from bench.slow_rank import slowed
from bench.starts import Start, arm_of, plan
from vllm_balance.model_shape import from_config
from vllm_balance.own_benchmarks.recovery import Burst, table

RUN = run_files.FOLDER / "recovery.toml"
RESULTS = ROOT / "bench" / "results" / "recovery.jsonl"
Row = dict[str, Any]
console = Console()


def recovery(
    folder: Annotated[Path, typer.Option("--traces", help="Folder of the recorded traces.")],
) -> None:
    """Append one row per burst to bench/results/recovery.jsonl and print the table."""
    settings = run_files.read(RUN)
    model = real_size_model.ensure(**settings["model"])
    factors = [1.0, *(phase.get("slow", 1.0) for phase in settings["phases"].values())]
    placed = prepared(
        settings | {"slow": sorted(set(factors))}, model, folder, config_hash(settings)
    )
    assert placed is not None
    console.print(said(placed.shown_slowdown))
    origin = {"run": RUN.stem, "title": settings["title"], "seed": settings["seed"]}
    origin |= {"config_hash": config_hash(settings)}
    origin |= {"expert_bytes": _expert_bytes(model), "sources": sources(), "harness": harness()}
    origin |= {"traffic": _traffic(settings, model, folder), **provenance()}
    starts = plan(settings, rounds=1)
    rows = unfinished(RESULTS, origin, [start.position for start in starts])
    origin["started"] = rows[0]["started"] if rows else datetime.now(UTC).isoformat()
    done = {row["position"] for row in rows}
    for start in starts:
        if start.position in done:
            continue
        own = []
        for row in _live_through(start, model, placed, folder):
            console.print(row)
            own.append({**row, **origin})
        append(RESULTS, own)
        rows += own
    console.print(markdown.written(table([Burst.model_validate(row) for row in rows])))


def _traffic(settings: Row, model: Path, folder: Path) -> list[str]:
    """Of every recording that is replayed, which one it is."""
    phases = settings["phases"].values()
    names = dict.fromkeys(phase["trace"] for phase in phases if "trace" in phase)
    replays = [settings["replay"], *(settings["replay"] | {"trace": name} for name in names)]
    return [traffic(settings | {"replay": replay}, model, folder) for replay in replays]


def _expert_bytes(model: Path) -> int:
    """Weights of one expert in bfloat16."""
    shape = from_config(model)
    return 3 * shape.hidden * shape.inner * 2


def _live_through(start: Start, model: Path, placed: Placed, folder: Path) -> Iterator[Row]:
    """One row per burst of one server, through all phases."""
    settings, arm = start.settings, arm_of(start, placed)
    proof = gate.prove(arm, {}, console.print)
    load = Load(**settings["load"])
    with Server(arm, model) as server, ExitStack() as slowness:
        for _ in range(2):
            send(load, server.url, model, settings["seed"])
        for name, phase in settings["phases"].items():
            if "trace" in phase:
                trace = str(folder / phase["trace"])
                server.replay({"trace": trace, "seed": settings["seed"]})
            if "slow" in phase:
                slowness.enter_context(slowed(server.worker(SLOW_RANK), phase["slow"]))
            began, swaps = time.perf_counter(), _online(server.status()).get("swaps", 0)
            for burst in range(phase["bursts"]):
                yield {
                    **{"arm": start.arm, "position": start.position, "gate": proof},
                    **{"phase": name, "burst": burst},
                    **_burst(load, server, model, settings["seed"] + burst, began, swaps),
                }


def _online(ranks: counters.Ranks) -> Row:
    """What online placement says of itself; nothing where there is none."""
    return ranks[0].get("online") or {}


def _burst(
    load: Load, server: Server, model: Path, seed: int, began: float, swaps_before: int
) -> Row:
    server.reset()
    at_s = time.perf_counter() - began
    answered = send(load, server.url, model, seed)
    ranks = server.status()
    counters.require_trustworthy(server.arm.name, ranks, min_steps=load.min_steps)
    client, online = timed(load, answered), _online(ranks)
    return {
        "load_seed": seed,
        "at_s": at_s,
        **{key: client[key]["p50"] for key in ("e2e_ms", "ttft_ms", "tpot_ms")},
        "tokens_per_s": client["tokens_per_s"],
        "tokens_worst_rank": counters.counted(ranks)["tokens_worst_rank"],
        "swaps": online["swaps"] - swaps_before if online else None,
        **{key: online.get(key) for key in ("steps", "moving_us", "deciding_us")},
        **{key: online.get(key) for key in ("drift", "slowdown_per_rank")},
    }


if __name__ == "__main__":
    command.main(recovery)
