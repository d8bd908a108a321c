"""Runs tables: `python -m bench.run configs/runs/decode.toml ...`.

Every arm is a fresh `vllm serve`; arms go A B C C B A, so that a drift of the machine hits all
alike; with `in_turns` load by load, on servers that are up together (bench/turn.py). An arm is
measured only if it answers like one dense rank (bench/gate.py), and a row is refused if the ranks
disagree or if the policy did not run. Rows are JSON lines in bench/results/
(vllm_balance/measurement.py); a run that was ended continues behind its last row, in turn behind
the last load that all arms have.

What a run file may hold is in docs/benchmarks.md. A trace is looked for in the folder that --traces
names; the trace "demo" is made.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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

from bench import command, real_size_model, run_files, speed
from bench.placed import Placed, prepared, said, traffic
from bench.provenance import ROOT, config_hash, harness, machine, provenance, sources
from bench.speed import Watch
from bench.starts import Cell, Start, plan
from bench.turn import Turn
from vllm_balance.measurement import IDENTITY, Key, Measurement, read_measurements

RESULTS = ROOT / "bench" / "results"
WAITED_MUCH_S = 0.25
"""For a core, by the client: its latencies are too long by parts of that."""
console = Console(stderr=True)
"""Not stdout: the client prints there, and is silenced."""


def run(
    files: Annotated[
        list[Path],
        typer.Argument(
            exists=True, dir_okay=False, help="Run files, e.g. configs/runs/decode.toml."
        ),
    ],
    rounds: Annotated[
        int,
        typer.Option(min=1, help="Times that all arms go forth and back; in turn, fresh servers."),
    ] = 1,
    traces: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Folder of the recorded traces."),
    ] = None,
    results: Annotated[Path, typer.Option(help="Folder of the rows.")] = RESULTS,
    fitting: Annotated[
        bool,
        typer.Option(
            "--fitting",
            help="Leave out files for other CPUs and, without --traces, those that replay one; "
            "says which.",
        ),
    ] = False,
) -> None:
    """Run all arms of each run file and append their rows to bench/results/."""
    if fitting:
        files = _fitting(files, machine(), traces)
    for file in files:
        console.rule(file.stem)
        run_file(file, rounds, results / f"{file.stem}.jsonl", traces)


def _fitting(files: list[Path], here: str, traces: Path | None) -> list[Path]:
    """The files that can be run on this machine with these traces; says in a line which cannot."""
    others = [file for file in files if not run_files.suits(file, here)]
    missing = [file for file in files if traces is None and run_files.replays_recording(file)]
    for left_out, why in (
        (others, "they are for CPUs with BF16 units"),
        (missing, "they replay recorded traces, whose folder --traces names"),
    ):
        if left_out:
            names = ", ".join(file.name for file in left_out)
            console.print(f"Left out, as {why}: {names}.", soft_wrap=True)
    return [file for file in files if file not in (*others, *missing)]


def run_file(file: Path, rounds: int, results: Path, traces: Path | None = None) -> None:
    """Measures what is missing in ``results`` of one run file."""
    settings = run_files.checked(file)
    model = real_size_model.ensure(**settings["model"])
    origin = {"config_hash": config_hash(settings), "traffic": traffic(settings, model, traces)}
    origin |= {"sources": sources(), "harness": harness(), **provenance()}
    done = _done(results, tuple(origin[name] for name in IDENTITY))
    starts = plan(settings, rounds)
    left = {start.position: _left(start, starts, done) for start in starts}
    total = sum(len(start.cells) for start in starts)
    begun = time.monotonic()
    with _progress(total, total - sum(map(len, left.values()))) as (advance, say):
        if not any(left.values()):
            return
        placed = prepared(settings, model, traces, origin["config_hash"])
        if placed is not None:
            console.print(said(placed.shown_slowdown))
        missing = [start for start in starts if left[start.position]]
        ranks = max(start.num_ranks for start in missing)
        with speed.watching(ranks, settings["model"].get("dtype", "bfloat16")) as watch:
            for _, group in itertools.groupby(missing, lambda start: start.group):
                for measured in _measure([*group], left, model, placed, watch, say):
                    row = Measurement(run=file.stem, title=settings["title"], **measured, **origin)
                    _append(results, row)
                    advance()
                    console.print(_line(row))
    minutes = (time.monotonic() - begun) / 60
    console.print(f"{file.stem}: {sum(map(len, left.values()))} rows in {minutes:.1f} minutes.")


def _done(results: Path, identity: tuple[Any, ...]) -> set[Key]:
    """What was measured already; cuts off a last line that a killed run left unfinished."""
    if not results.exists():
        return set()
    content = results.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(results, whole)
    return {row.key for row in read_measurements(results) if row.identity == identity}


def _left(start: Start, starts: Sequence[Start], done: set[Key]) -> list[Cell]:
    """What is to be measured on a start.

    Servers that are up together are compared load by load, so a load that one of them lacks is sent
    to all of them again.
    """
    group = [other for other in starts if other.group == start.group]
    return [
        cell
        for cell in start.cells
        if any(other.key(cell) not in done for other in group if cell in other.cells)
    ]


def _append(results: Path, row: Measurement) -> None:
    results.parent.mkdir(exist_ok=True)
    with results.open("a") as file:
        file.write(row.model_dump_json() + "\n")


def _measure(
    group: Sequence[Start],
    left: Mapping[int, Sequence[Cell]],
    model: Path,
    placed: Placed | None,
    watch: Watch,
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Fields of the rows that are left of servers that are up together, each fresh and warm."""
    with contextlib.ExitStack() as up:
        turns: list[Turn] = []
        for start in group:
            turn = Turn(start, left[start.position], model, placed, watch, say)
            shares = turns[0] if turns and start.settings.get("one_server") else None
            turns.append(up.enter_context(turn.up(beside=shares)))
        asked = {cell for turn in turns for cell in turn.left}
        cells = [c for c in dict.fromkeys(c for start in group for c in start.cells) if c in asked]
        for (factor, name), same in itertools.groupby(cells, lambda cell: (cell.slow, cell.load)):
            for turn in turns:
                turn.get_ready(factor, name)
            for cell in same:
                for turn in turns if cell.repeat % 2 == 0 else reversed(turns):
                    if cell in turn.left:
                        yield turn.measure(cell)


def _line(row: Measurement) -> str:
    """What a user wants to see of a row at once."""
    waited_s = row.client_waited_s or 0.0
    late = f" [yellow]The client waited {waited_s:.1f} s for a core; what else runs?[/]"
    return (
        f"{row.case} [bold]{row.arm}[/] {row.load} #{row.repeat + 1}: "
        f"TPOT {row.tpot_ms.p50:.1f} ms, TTFT {row.ttft_ms.p50:.0f} ms, "
        f"{row.tokens_per_s:.1f} tokens/s, {row.activated_worst_rank:.1f} experts on the worst rank"
    ) + late * (waited_s > WAITED_MUCH_S)


@contextmanager
def _progress(total: int, done: int) -> Iterator[tuple[Callable[[], None], Callable[[str], None]]]:
    """(one row more, say what is being done)."""
    columns = (SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console) as progress:
        task = progress.add_task("", total=total, completed=done)
        yield (
            lambda: progress.advance(task),
            lambda what: progress.update(task, description=what),
        )


if __name__ == "__main__":
    command.main(run)
