"""Runs tables: `python -m bench.run configs/runs/decode.toml ...`.

Every arm is a fresh `vllm serve`; arms go A B C C B A, so that a drift of the machine hits all
alike. An arm is measured only if it answers like one dense rank (bench/gate.py), and a row is
refused if the ranks disagree or if the policy did not run. Rows are JSON lines in bench/results/
(vllm_balance/measurement.py); a run that was ended continues behind its last row.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from bench import counters, demo_trace, gate, real_size_model
from bench.load import Load, send, timed
from bench.provenance import ROOT, config_hash, provenance, sources
from bench.server import Arm, Server
from vllm_balance.measurement import Measurement, read_measurements

RESULTS = ROOT / "bench" / "results"
console = Console(stderr=True)
"""Not stdout: the client prints there, and is silenced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One start of a server and what is measured on it."""

    position: int
    arm: str
    case: str
    settings: dict[str, Any]
    """The run file with the case's tables in place of its own."""
    loads: dict[str, Load]


def run(
    files: Annotated[list[Path], typer.Argument(help="Run files, e.g. configs/runs/decode.toml.")],
    rounds: Annotated[int, typer.Option(help="Times that all arms go forth and back.")] = 1,
    results: Annotated[Path, typer.Option(help="Folder of the rows.")] = RESULTS,
) -> None:
    """Run all arms of each run file and append their rows to bench/results/."""
    for file in files:
        console.rule(file.stem)
        run_file(file, rounds, results / f"{file.stem}.jsonl")


def run_file(file: Path, rounds: int, results: Path) -> None:
    """Measures what is missing in ``results`` of one run file."""
    settings = tomllib.loads(file.read_text())
    origin = {"config_hash": config_hash(settings), "sources": sources(), **provenance()}
    done = _done(results, (origin["config_hash"], origin["sources"], origin["machine"]))
    model = real_size_model.ensure(**settings["model"])
    starts = plan(settings, rounds)
    with _progress(sum(len(_repeats(start)) for start in starts)) as (advance, say):
        for start in starts:
            left = [key for key in _repeats(start) if (start.position, *key) not in done]
            advance(len(_repeats(start)) - len(left))
            if not left:
                continue
            for measured in _measure(start, left, model, say):
                row = Measurement(run=file.stem, title=settings["title"], **measured, **origin)
                _append(results, row)
                advance(1)
                console.print(_line(row))


def plan(settings: dict[str, Any], rounds: int) -> list[Start]:
    """The starts of a run file in order: all arms of all cases forth, then back, ``rounds`` times.

    A table of a case replaces the run file's table of that name.
    """
    cases = settings.get("cases", {"": {}})
    base = settings["load"]
    loads = {n: Load(**base | own) for n, own in settings.get("loads", {"": {}}).items()}
    units = [(arm, case) for case in cases for arm in settings["arms"]]
    order = [*units, *reversed(units)] * rounds
    return [
        Start(position=position, arm=arm, case=case, settings=settings | cases[case], loads=loads)
        for position, (arm, case) in enumerate(order)
    ]


def _repeats(start: Start) -> list[tuple[str, int]]:
    return [(name, n) for name, load in start.loads.items() for n in range(load.repeats)]


def _done(results: Path, identity: tuple[str, str, str]) -> set[tuple[int, str, int]]:
    """What need not be measured again; cuts off a last line that a killed run left unfinished."""
    if not results.exists():
        return set()
    text = results.read_text()
    results.write_text(text[: text.rfind("\n") + 1])
    rows = [row for row in read_measurements(results) if row.identity == identity]
    return {(row.position, row.load, row.repeat) for row in rows}


def _append(results: Path, row: Measurement) -> None:
    results.parent.mkdir(exist_ok=True)
    with results.open("a") as file:
        file.write(row.model_dump_json() + "\n")


def arm_of(name: str, settings: dict[str, Any]) -> Arm:
    """The server of one arm: its own settings, the shared ones, and the replayed routing."""
    own = settings["arms"][name]
    balancer = own.get("balancer", name)
    asked = {key: value for key, value in own.items() if key not in ("balancer", "gate")}
    if balancer != "static":
        asked |= settings.get("eplb", {})
    asked["replay"] = {**settings["replay"], "seed": settings["seed"]}
    if asked["replay"].get("trace") == "demo":
        asked["replay"]["trace"] = str(demo_trace.ensure())
    serve = settings["serve"]
    return Arm(
        name=name,
        balancer=balancer,
        settings=asked,
        tensor_parallel=serve.get("tensor_parallel", 1),
        data_parallel=serve.get("data_parallel", 1),
        flags=serve["flags"],
    )


def _measure(
    start: Start, left: list[tuple[str, int]], model: Path, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Fields of the rows that are left of one start, from one fresh and warm server."""
    arm, seed = arm_of(start.arm, start.settings), start.settings["seed"]
    where = " ".join(filter(None, (start.case, start.arm)))
    proof = gate.prove(arm, start.settings["arms"][start.arm].get("gate", {}), say)
    say(f"{where}: starting the server")
    with Server(arm, model) as server:
        for turn in range(2):
            say(f"{where}: warming up, {turn + 1} of 2")
            send(Load(**start.settings["warm"]), server.url, model, seed)
        for name, repeat in left:
            load = start.loads[name]
            say(f"{where}: {name or 'measuring'}, {repeat + 1} of {load.repeats}")
            yield {
                **{"arm": start.arm, "case": start.case, "load": name, "repeat": repeat},
                **{"position": start.position, "seed": seed, "gate": proof},
                **_measure_once(load, server, model, seed + repeat),
            }


def _measure_once(load: Load, server: Server, model: Path, seed: int) -> dict[str, Any]:
    """Fields of a row: one load, what the client timed and what the counters say."""
    server.reset()
    answered = send(load, server.url, model, seed)
    ranks = server.status()
    counters.require_trustworthy(server.arm.name, ranks, min_steps=load.min_steps)
    return {
        **timed(load, answered),
        **counters.counted(ranks),
        "memory_bytes": server.memory_bytes(),
        "samples": counters.samples(answered),
        "layers": counters.heat(answered),
    }


def _line(row: Measurement) -> str:
    """What a user wants to see of a row at once."""
    return (
        f"{row.case} [bold]{row.arm}[/] {row.load} #{row.repeat + 1}: "
        f"TPOT {row.tpot_ms.p50:.1f} ms, TTFT {row.ttft_ms.p50:.0f} ms, "
        f"{row.tokens_per_s:.1f} tokens/s, {row.activated_worst_rank:.1f} experts on the worst rank"
    )


@contextmanager
def _progress(total: int) -> Iterator[tuple[Callable[[int], None], Callable[[str], None]]]:
    """(advance the bar by some rows, say what is being done)."""
    columns = (SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console) as progress:
        task = progress.add_task("", total=total)
        yield (
            lambda rows: progress.advance(task, rows),
            lambda what: progress.update(task, description=what),
        )


if __name__ == "__main__":
    typer.run(run)
