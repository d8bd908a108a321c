"""Sweeps: parallel equals serial, a killed one resumes where it stopped, damaged ends are cut."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from vllm_balance.simulate.sweep import Cell, compute, missing, read, sweep

CELLS = [
    Cell(
        model="gpt-oss-20b", hardware="h100", data=4, balancer="static", redundancy=1.0, zipf=zipf,
        concurrency=concurrency, prompt_tokens=4, output_tokens=8, layers=1, steps=2, seed=seed,
    )
    for zipf in (0.0, 0.5, 1.0)
    for concurrency in (8, 16, 32)
    for seed in range(30)
]  # fmt: skip
PROGRAM = """
import json, sys
from pathlib import Path
from vllm_balance.simulate.sweep import Cell, sweep
cells = [Cell(**fields) for fields in json.loads(Path(sys.argv[1]).read_text())]
sweep(cells, Path(sys.argv[2]), {"commit": "test"})
"""


def test_a_killed_sweep_resumes(tmp_path):
    results, asked = tmp_path / "rows.jsonl", tmp_path / "cells.json"
    asked.write_text(json.dumps([{f: getattr(c, f) for f in Cell.__slots__} for c in CELLS]))
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(asked), str(results)], start_new_session=True
    )
    while process.poll() is None and (not results.exists() or results.stat().st_size == 0):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with results.open("ab") as file:
        file.write(b'{"key": "half a li')
    before = read(results)
    assert 0 < len(before) <= len(CELLS)
    added: list[int] = []
    assert sweep(CELLS, results, {"commit": "test"}, on_rows=added.append) == len(CELLS) - len(
        before
    )
    rows = read(results)
    assert rows[: len(before)] == before
    assert sum(added) == len(CELLS) - len(before)
    assert sorted(row["key"] for row in rows) == sorted(cell.key for cell in CELLS)
    by_key = {row["key"]: row for row in rows}
    for cell in CELLS[::67]:
        assert by_key[cell.key] == {**compute(cell), "commit": "test"}
    assert sweep(CELLS, results, {"commit": "test"}) == 0


def test_rows_that_other_code_decided_do_not_count(tmp_path):
    results = tmp_path / "rows.jsonl"
    rows = [{"key": CELLS[0].key, "decided_by": "old"}, {"key": CELLS[1].key, "decided_by": "new"}]
    rows.append({"key": CELLS[2].key})
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert missing(CELLS[:4], results, lambda cell: "new") == [CELLS[0], *CELLS[2:4]]
    assert missing(CELLS[:4], results) == [*CELLS[:2], CELLS[3]]


def test_a_row_says_what_decided_it_and_is_computed_again_when_that_changes(monkeypatch, tmp_path):
    def computed(chunks, address):
        return ([{"key": cell.key} for cell in chunk] for chunk in chunks)

    monkeypatch.setattr("vllm_balance.simulate.sweep._computed", computed)
    results, origin = tmp_path / "rows.jsonl", {"commit": "test"}
    for digest, added in (("old", 3), ("old", 0), ("new", 3), ("new", 0)):
        assert sweep(CELLS[:3], results, origin, decided_by=lambda _, d=digest: d) == added
    assert [(row["key"], row["decided_by"]) for row in read(results)] == [
        (cell.key, digest) for digest in ("old", "new") for cell in CELLS[:3]
    ]


@pytest.mark.parametrize("end", [b"", b'{"key": "half a li'])
def test_reading_cuts_an_unfinished_end_and_writes_nothing_else(tmp_path, end):
    results = tmp_path / "rows.jsonl"
    results.write_bytes(b'{"key": "1"}\n' + end)
    os.utime(results, ns=(0, 0))
    assert read(results) == [{"key": "1"}]
    assert results.read_bytes() == b'{"key": "1"}\n'
    assert (results.stat().st_mtime_ns == 0) == (not end)


def test_keys_differ_where_cells_do():
    assert len({cell.key for cell in CELLS}) == len(CELLS)


def test_a_missing_file_has_no_rows(tmp_path):
    assert read(tmp_path / "rows.jsonl") == []
