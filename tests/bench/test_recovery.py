"""Recovery from a change: rows of a run that was ended or made again."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from measured import recovery_bursts

from bench import recovery
from vllm_balance import own_benchmarks


class Killed(BaseException):
    """Stands for a signal: nobody catches it."""


@pytest.fixture
def living(monkeypatch, tmp_path):
    """`recovery` with servers that answer at once; `living(n)` is killed in the n-th server's
    second burst. Returns all rows; `living.lived` are the positions that were started."""
    lived: list[int] = []

    def call(killed_in=None):
        def live_through(start, *_):
            lived.append(start.position)
            for burst, row in enumerate(recovery_bursts(start.arm, start.position, [1000.0] * 4)):
                if len(lived) == killed_in and burst == 1:
                    raise Killed
                yield row | {"burst": burst}

        lived.clear()
        monkeypatch.setattr(recovery, "_live_through", live_through)
        if killed_in is None:
            recovery.recovery(Path("traces"))
        else:
            with pytest.raises(Killed):
                recovery.recovery(Path("traces"))
        return [json.loads(line) for line in recovery.RESULTS.read_text().splitlines()]

    origin = {"versions": {}, "commit": "abc1234", "machine": "A machine"}
    monkeypatch.setattr(recovery.real_size_model, "ensure", lambda **shape: tmp_path)
    monkeypatch.setattr(recovery, "prepared", lambda *_: SimpleNamespace(shown_slowdown={}))
    monkeypatch.setattr(recovery, "_expert_bytes", lambda model: 2**20)
    monkeypatch.setattr(recovery, "traffic", lambda settings, *_: settings["replay"]["trace"])
    monkeypatch.setattr(recovery, "provenance", lambda: origin)
    monkeypatch.setattr(recovery, "RESULTS", tmp_path / "recovery.jsonl")
    call.lived = lived
    return call


def test_the_rows_of_a_run_have_a_start_in_common_that_no_other_run_has(living):
    living()
    rows = living()
    first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    assert [row["position"] for row in first] == [row["position"] for row in second]
    starts = [{row["started"] for row in of} for of in (first, second)]
    assert [len(of) for of in starts] == [1, 1] and starts[0] != starts[1]


def test_an_ended_run_continues_with_the_next_server(living):
    assert {row["position"] for row in living(killed_in=3)} == {0, 1}
    rows = living()
    assert living.lived == [2, 3, 4, 5]
    assert sorted((row["position"], row["burst"]) for row in rows) == [
        (position, burst) for position in range(6) for burst in range(4)
    ]
    assert len({row["started"] for row in rows}) == 1


def test_an_ended_run_of_other_code_is_left_alone(living, monkeypatch):
    living(killed_in=2)
    monkeypatch.setattr(recovery, "sources", lambda: "other code")
    rows = living()
    assert living.lived == [0, 1, 2, 3, 4, 5] and len({row["started"] for row in rows}) == 2
    newest = own_benchmarks.newest_run(own_benchmarks.read(recovery.RESULTS, "recovery"))
    assert len(rows) == 28 and len(newest) == 24
    assert {row.started for row in newest} == {rows[-1]["started"]}
