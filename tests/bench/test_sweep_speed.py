"""The sweep that is killed: what it must come to, and what its row says."""

import subprocess
import sys

import pytest

from bench import sweep_speed

PROGRAM = """
import json, sys, time
from pathlib import Path
file, first, last, then = Path(sys.argv[1]), *map(int, sys.argv[2:5])
with file.open("a") as rows:
    for key in range(first, last):
        print(json.dumps({"key": f"cell {key}"}), file=rows, flush=True)
print("written", flush=True)
time.sleep(then)
"""


@pytest.fixture
def sweep(monkeypatch):
    """Sweeps in place of real ones: each writes a range of cells and then sleeps for some time, in
    which it is killed."""
    killed = sweep_speed._killed

    def killed_when_written(process, after_s):
        process.stdout.readline()
        return killed(process, after_s)

    monkeypatch.setattr(sweep_speed, "_killed", killed_when_written)

    def of(*runs: tuple[int, int, int]) -> None:
        left = list(runs)

        def start(num_cells, results):
            words = [str(results), *map(str, left.pop(0))]
            return subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *words],
                stdout=subprocess.PIPE,
                start_new_session=True,
            )

        monkeypatch.setattr(sweep_speed, "_start", start)

    return of


def test_a_killed_sweep_that_ends_with_all_its_cells_makes_a_row(sweep):
    sweep((0, 4, 600), (4, 10, 0))
    row = sweep_speed.sweep_row(10, killed_after_s=0.1)
    assert (row["cells"], row["rows_at_kill"]) == (10, 4)
    assert row["seconds"] >= row["killed_after_s"] >= 0.1


@pytest.mark.parametrize(
    ("runs", "reason"),
    [
        (((0, 10, 600),), "10 of 10 cells at the kill"),
        (((0, 0, 600),), "0 of 10 cells at the kill"),
        (((0, 4, 600), (3, 10, 0)), "11 rows, 10 different, of 10 cells"),
        (((0, 4, 600), (5, 10, 0)), "9 rows, 9 different, of 10 cells"),
    ],
)
def test_a_sweep_that_proves_nothing_makes_none(sweep, runs, reason):
    sweep(*runs)
    with pytest.raises(RuntimeError, match=reason):
        sweep_speed.sweep_row(10, killed_after_s=0.1)


def test_the_newest_rows_are_written():
    old = {"kind": "arm", "arm": "old", "core_s": 9.0, "machine": "M", "commit": "old"}
    new = old | {"arm": "metro", "core_s": 1.25, "commit": "new"}
    sweep = {"kind": "sweep", "cells": 10_000, "killed_after_s": 60.2, "rows_at_kill": 1234}
    sweep |= {"seconds": 150.0, "machine": "M", "commit": "new"}
    write = sweep_speed.writer([old, new, sweep])
    assert write("arms").splitlines()[2:3] == ["| `metro` | 1.2 |"] and "old" not in write("arms")
    assert "10,000 cells took 2.5 minutes" in write("sweep")
    assert "killed after 60 s with 1,234 rows" in write("sweep")
