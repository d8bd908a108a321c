"""Recovery from a change: when a phase counts as settled, and what the table compares."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import recovery, tables
from bench.recovery import _recovery_s, table


def _bursts(arm, position, e2e_ms, swaps=None, phase="other traffic"):
    return [
        {
            **{"arm": arm, "position": position, "phase": phase, "burst": burst},
            **{"at_s": 5.0 * burst, "e2e_ms": value, "expert_bytes": 2**20},
            "swaps": None if swaps is None else swaps[burst],
        }
        for burst, value in enumerate(e2e_ms)
    ]


@pytest.mark.parametrize(
    ("e2e_ms", "expected_s"),
    [
        ([1000, 1000, 1000, 1000], 0.0),
        ([1300, 1200, 1000, 1010, 990], 10.0),
        ([1040, 1000, 1000, 1000], 0.0),
        ([1000, 1300, 1000, 1000, 1000], 10.0),
    ],
)
def test_settled_from_the_first_burst_behind_which_all_are_near_the_end(e2e_ms, expected_s):
    assert _recovery_s(_bursts("online", 0, e2e_ms)) == expected_s


def test_a_phase_that_ends_far_from_its_end_has_not_settled():
    assert _recovery_s(_bursts("online", 0, [1000, 1000, 1000, 1500])) == math.inf


def test_table_compares_the_ends_of_a_phase_and_counts_its_weights():
    rows = _bursts("static", 0, [1000] * 4) + _bursts("gem", 1, [1200] * 4)
    rows += _bursts("online", 2, [1200, 900, 900, 900], swaps=[0, 4, 6, 6])
    lines = table(rows).splitlines()
    cells = [cell.strip() for cell in lines[-1].strip("|").split("|")]
    assert cells == [
        "other traffic",
        "online",
        "1",
        "1200",
        "900",
        "-10.0%",
        "-25.0%",
        "5",
        "6",
        "12",
    ]
    assert lines[-2].split("|")[-3].strip() == "-"


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
            for burst in _bursts(start.arm, start.position, [1000] * 4):
                if len(lived) == killed_in and burst["burst"] == 1:
                    raise Killed
                yield burst

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
    assert tables.newest_run(rows) == rows[4:]
