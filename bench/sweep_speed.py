"""How fast the simulator is: seconds per arm, and a large sweep that is killed and resumes.

`python -m bench.sweep_speed` takes about six minutes and appends its rows to
bench/results/sweep_speed.jsonl; `python -m bench.tables` writes the tables of docs/simulator.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import command, markdown
from bench.modelled import DEEPSEEK, ORDER
from bench.provenance import ROOT, provenance
from vllm_balance.simulate.sweep import compute, read

RESULTS = ROOT / "bench" / "results" / "sweep_speed.jsonl"
LARGE = replace(DEEPSEEK, data=8, layers=61, steps=1000, redundancy=1.25)
"""8 ranks, 61 layers, 1,000 steps of up to 512 prompt tokens beside 1,024 requests."""
CELLS, KILLED_AFTER_S = 10_000, 60.0
Row = dict[str, Any]


def run() -> None:
    """Time every arm, and a sweep of 10,000 cells that is killed once."""
    origin = {"run": "sweep_speed", **provenance("numpy", "ray")}
    with RESULTS.open("a") as file:
        for row in (*arm_rows(), sweep_row(CELLS, KILLED_AFTER_S)):
            print(json.dumps(row | origin), file=file, flush=True)
            Console().print(row)


def arm_rows() -> Iterator[Row]:
    """Seconds of one core for each balancer, kernels compiled before."""
    for name in ORDER:
        cell = replace(LARGE, balancer=name)
        compute(replace(cell, steps=1))
        start = time.process_time()
        compute(cell)
        yield {"kind": "arm", "arm": name, "core_s": time.process_time() - start}


def sweep_row(num_cells: int, killed_after_s: float) -> Row:
    """A sweep that is killed with all its processes, started again and ended.

    Raises:
        RuntimeError: it ended before it was killed, wrote nothing by then, or lost or doubled a
            cell.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "rows.jsonl"
        started = time.monotonic()
        killed_s = _killed(_start(num_cells, results), killed_after_s)
        before = len(read(results))
        if not 0 < before < num_cells:
            raise RuntimeError(f"{before} of {num_cells} cells at the kill")
        if status := _start(num_cells, results).wait():
            raise RuntimeError(f"the sweep that went on ended with status {status}")
        keys = [row["key"] for row in read(results)]
    if len(keys) != num_cells or len(set(keys)) != num_cells:
        raise RuntimeError(f"{len(keys)} rows, {len(set(keys))} different, of {num_cells} cells")
    return {
        "kind": "sweep",
        "cells": num_cells,
        "killed_after_s": killed_s,
        "rows_at_kill": before,
        "seconds": time.monotonic() - started,
    }


def _start(num_cells: int, results: Path) -> subprocess.Popen[bytes]:
    words = ("phase", "--fine", "--first", str(num_cells), "--results", str(results))
    return subprocess.Popen(
        [sys.executable, "-m", "bench.modelled", *words],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )


def _killed(process: subprocess.Popen[bytes], after_s: float) -> float:
    """Seconds until it was killed; less if it ended by itself."""
    started = time.monotonic()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(after_s)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return time.monotonic() - started


def writer(rows: list[Row]) -> Callable[[str], str]:
    """The newest rows: `arms` seconds per arm, `sweep` the sweep, in a sentence."""
    newest = [row for row in rows if row["commit"] == rows[-1]["commit"]]
    arms = {row["arm"]: row["core_s"] for row in newest if row["kind"] == "arm"}
    origin = f"Measured on {rows[-1]['machine']}; commit {rows[-1]['commit']}"
    origin += "; `python -m bench.sweep_speed`."
    sweeps = [row for row in newest if row["kind"] == "sweep"]
    if not arms or not sweeps:
        raise ValueError("the newest rows of sweep_speed lack the arms or the sweep")

    def write(name: str) -> str:
        if name == "arms":
            body = [[f"`{arm}`", f"{seconds:.1f}"] for arm, seconds in arms.items()]
            return f"{markdown.table(['balancer', 'seconds of a core'], body)}\n\n{origin}"
        found = sweeps[-1]
        return (
            f"{found['cells']:,} cells took {found['seconds'] / 60:.1f} minutes on two cores, "
            f"killed after {found['killed_after_s']:.0f} s with {found['rows_at_kill']:,} rows and "
            f"started again. All {found['cells']:,} were there, none twice. {origin}"
        )

    return write


if __name__ == "__main__":
    command.main(run)
