"""Sweeps: parallel equals serial, a killed one resumes where it stopped, damaged ends are cut."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from vllm_balance.errors import BalancerError
from vllm_balance.simulate.sweep import Cell, compute, missing, read, room, sweep

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
import json, sys, time
from pathlib import Path
from vllm_balance.simulate.sweep import Cell, sweep
cells = [Cell(**fields) for fields in json.loads(Path(sys.argv[1]).read_text())]
sweep(cells, Path(sys.argv[2]), {"commit": "test"}, on_rows=lambda added: time.sleep(600))
"""
"""It stands behind its first rows."""
STARTS = 3
"""Ray gives its processes 30 s to start, which servers beside it may take from them."""


def in_turn(chunks, address):
    """Without Ray, which takes longer to start than these cells."""
    return ([compute(cell) for cell in chunk] for chunk in chunks)


def test_a_killed_sweep_resumes(tmp_path, monkeypatch):
    """It is killed in parallel; what it wrote is compared with what this process computes."""
    results, asked = tmp_path / "rows.jsonl", tmp_path / "cells.json"
    asked.write_text(json.dumps([{f: getattr(c, f) for f in Cell.__slots__} for c in CELLS]))
    results.touch()
    for _ in range(STARTS):
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(asked), str(results)], start_new_session=True
        )
        deadline = time.monotonic() + 240
        while process.poll() is None and results.stat().st_size == 0:
            assert time.monotonic() < deadline, "no row was written"
            time.sleep(0.02)
        was_running = process.poll() is None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if results.stat().st_size > 0:
            break
    assert was_running, "the sweep ended before it could be killed"
    with results.open("ab") as file:
        file.write(b'{"key": "half a li')
    before = read(results)
    assert 0 < len(before) < len(CELLS)
    cells = {cell.key: cell for cell in CELLS}
    for row in before[::8]:
        assert row == {**compute(cells[row["key"]]), "commit": "test"}
    monkeypatch.setattr("vllm_balance.simulate.sweep._computed", in_turn)
    added: list[int] = []
    assert sweep(CELLS, results, {"commit": "test"}, on_rows=added.append) == len(CELLS) - len(
        before
    )
    rows = read(results)
    assert rows[: len(before)] == before
    assert sum(added) == len(CELLS) - len(before)
    assert sorted(row["key"] for row in rows) == sorted(cell.key for cell in CELLS)
    assert sweep(CELLS, results, {"commit": "test"}) == 0


@contextlib.contextmanager
def cluster_of_two():
    """Address of a cluster whose two nodes have a core each."""
    from ray.cluster_utils import Cluster

    for start in range(1, STARTS + 1):
        cluster = Cluster()
        try:
            cluster.add_node(num_cpus=1)
            cluster.add_node(num_cpus=1, wait=False)
            cluster.wait_for_nodes(timeout=120)
            break
        except Exception:  # Ray has no other for a node that did not start in time.
            cluster.shutdown()
            if start == STARTS:
                raise
    try:
        yield cluster.address
    finally:
        cluster.shutdown()


@pytest.mark.timeout(600)
def test_a_sweep_runs_on_the_nodes_of_a_cluster(tmp_path):
    """Two nodes with a core each: the same rows as here."""
    results = tmp_path / "rows.jsonl"
    with cluster_of_two() as address:
        assert sweep(CELLS[:64], results, {"commit": "test"}, address=address) == 64
    rows = {row["key"]: row for row in read(results)}
    assert rows.keys() == {cell.key for cell in CELLS[:64]}
    for cell in CELLS[:64:16]:
        assert rows[cell.key] == {**compute(cell), "commit": "test"}


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
def test_reading_leaves_an_unfinished_end_to_who_writes(tmp_path, end):
    results = tmp_path / "rows.jsonl"
    results.write_bytes(b'{"key": "1"}\n' + end)
    assert read(results) == [{"key": "1"}]
    assert results.read_bytes() == b'{"key": "1"}\n' + end
    sweep([], results, {})
    assert results.read_bytes() == b'{"key": "1"}\n'


def test_two_sweeps_do_not_write_into_one_file(tmp_path, monkeypatch):
    results = tmp_path / "rows.jsonl"

    def computed(chunks, address):
        with pytest.raises(BalancerError, match="Another sweep is writing into"):
            sweep(CELLS[:1], results, {})
        return in_turn(chunks, address)

    monkeypatch.setattr("vllm_balance.simulate.sweep._computed", computed)
    assert sweep(CELLS[:1], results, {}) == 1
    assert len(read(results)) == 1


def test_a_cell_that_does_not_fit_has_a_row_without_times():
    """DeepSeek-V3 takes about 99 GB on each of 8 ranks; an H100 has 80."""
    cell = Cell(model="deepseek-v3", hardware="h100", data=8, balancer="metro", redundancy=1.5,
                zipf=0.3, concurrency=16, layers=1, steps=2)  # fmt: skip
    row = compute(cell)
    assert room(cell) == 0 and not row["fits"]
    assert {row[key] for key in ("tpot_us", "tokens_per_s", "waiting_share")} == {None}
    assert row["redundant_bytes"] > 0 and row["key"] == cell.key


@pytest.mark.parametrize("more", [0, 1])
def test_as_many_requests_fit_as_there_is_room_for(more):
    cell = replace(CELLS[0], prompt_tokens=100_000, output_tokens=100_000)
    row = compute(replace(cell, concurrency=room(cell) + more))
    assert row["fits"] == (not more)


def test_keys_differ_where_cells_do():
    assert len({cell.key for cell in CELLS}) == len(CELLS)


def test_a_missing_file_has_no_rows(tmp_path):
    assert read(tmp_path / "rows.jsonl") == []
