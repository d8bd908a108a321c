"""Tables of benchmarks of their own: what they compare, and which rows are of one run."""

import json
import math

import pytest
from measured import ORIGIN, look_ahead_row, recorder_bursts, recovery_bursts

from vllm_balance import own_benchmarks
from vllm_balance.errors import BalancerError
from vllm_balance.own_benchmarks import OwnRow, look_ahead, newest_run, recorder, recovery

ORDER = ("off", "counts", "ids", "ids", "counts", "off")


def parsed(name, rows):
    return [own_benchmarks.OWN_BENCHMARKS[name].row.model_validate(row) for row in rows]


def test_a_drift_of_the_machine_is_no_cost():
    """TPOT rises by 1 ms with every burst, and counts take 5 % more."""
    rows = [
        ORIGIN
        | {"position": at, "arm": arm, "seconds": 1.0}
        | {"tpot_ms": (100 + at) * (1.05 if arm == "counts" else 1)}
        for at, arm in enumerate(ORDER * 2)
    ]
    found = recorder.against_off(parsed("recorder", rows))
    for row in rows[1:-1]:
        expected = 1.05 if row["arm"] == "counts" else 1.0
        assert found[row["position"]] == pytest.approx(expected, abs=1e-9)
    # After an end in the middle: another server, twice as slow.
    two = [row | {"server": row["position"] // 6} for row in rows]
    slower = [row | {"tpot_ms": row["tpot_ms"] * (1 + row["server"])} for row in two]
    twice = [recorder.against_off(parsed("recorder", each)) for each in (two, slower)]
    assert twice[1] == pytest.approx(twice[0])
    assert recorder.against_off(parsed("recorder", rows[:1])) == {}
    assert recorder.spread([0.99, 1.0, 1.01, 1.02]) == ("+0.50%", "-0.8% to +1.8%")


def test_what_was_recorded_is_per_step_and_what_it_took_per_second():
    tpots_ms = {"off": [100.0, 104.0], "counts": [110.0] * 2, "ids": [99.0, 121.0]}
    table = recorder.table(parsed("recorder", recorder_bursts(tpots_ms)))
    assert [line[:3] for line in table.body] == [
        ["off", "2", "102.0"],
        ["counts", "2", "110.0"],
        ["ids", "2", "110.0"],
    ]
    assert [line[5:] for line in table.body] == [
        ["3.9%", "-", "0", "0.00%", "0.00%"],
        ["0.0%", "1,000", "0", "0.20%", "0.10%"],
        ["20.0%", "1,000", "0", "0.20%", "0.10%"],
    ]


@pytest.mark.parametrize(
    ("e2e_ms", "expected_s"),
    [
        ([1000, 1000, 1000, 1000], 0.0),
        ([1300, 1200, 1000, 1010, 990], 10.0),
        ([1040, 1000, 1000, 1000], 0.0),
        ([1000, 1300, 1000, 1000, 1000], 10.0),
        ([1000, 1000, 1000, 1500], math.inf),
    ],
)
def test_settled_from_the_first_burst_behind_which_all_are_near_the_end(e2e_ms, expected_s):
    bursts = parsed("recovery", recovery_bursts("online", 0, e2e_ms))
    assert recovery.recovery_s(bursts) == expected_s


def test_recovery_compares_the_ends_of_a_phase_and_counts_its_weights():
    rows = recovery_bursts("static", 0, [1000] * 4) + recovery_bursts("gem", 1, [1200] * 4)
    rows += recovery_bursts("online", 2, [1200, 900, 900, 900], swaps=[0, 4, 6, 6])
    table = recovery.table(parsed("recovery", rows))
    assert table.body[-1] == [
        *("other traffic", "online", "1", "1200", "900"),
        *("-10.0%", "-25.0%", "5", "6", "12"),
    ]
    assert table.body[-2][-2:] == ["-", "-"]


def test_recovery_compares_servers_that_took_turns_burst_by_burst():
    """Both become slower with every burst, and gem takes 10 % less in each."""
    slower = [1000.0, 1200.0, 1500.0, 1900.0, 2400.0, 3000.0]
    rows = recovery_bursts("static", 0, slower)
    rows += recovery_bursts("gem", 1, [0.9 * ms for ms in slower])
    in_turn = [row | {"group": 0, "burst": at % 6} for at, row in enumerate(rows)]
    line = recovery.table(parsed("recovery", in_turn)).body[-1]
    assert line[4:6] == ["1710", "-10.0% (-10.0 to -10.0)"]
    # Another round, whose machine is twice as slow: its bursts are compared with its own.
    again = [
        row | {"group": 1, "position": row["position"] + 2, "e2e_ms": 2 * row["e2e_ms"]}
        for row in in_turn
    ]
    twice = recovery.table(parsed("recovery", in_turn + again))
    assert twice.body[-1][5] == line[5] and "in turn" in twice.caption
    assert "in turn" not in recovery.table(parsed("recovery", rows)).caption


def test_runs_that_are_not_over_yet_have_a_table():
    static = recovery.table(parsed("recovery", recovery_bursts("static", 0, [1000] * 4)))
    assert [line[5:7] for line in static.body] == [["+0.0%", "-"]]
    first = recorder.table(parsed("recorder", recorder_bursts({"off": [100.0], "ids": [90.0]})))
    assert [line[2:5] for line in first.body] == [["100.0", "-", "-"], ["90.0", "-", "-"]]


def test_look_ahead_adds_servers_of_an_arm_up():
    rows = [
        look_ahead_row("off", fetches=60, hits=40, fetched_bytes=600, wasted_bytes=300),
        look_ahead_row("router", fetches=10, early_fetches=40, hits=90, early_hits=30,
                       fetched_bytes=500, wasted_bytes=100, fetch_wait_us=50.0,
                       look_ahead_us=100.0),
        look_ahead_row("router", fetches=20, early_fetches=60, hits=80, early_hits=30,
                       fetched_bytes=500, wasted_bytes=100, fetch_wait_us=150.0,
                       look_ahead_us=100.0, ttft_ms=70.0),
    ]  # fmt: skip
    table = look_ahead.table(parsed("look_ahead", rows))
    assert table.title == "Prefill <of> a test"
    assert table.body == [
        ["2", "off", "40.0%", "0.60", "0.00", "-", "50.0%", "0.0%", "0.0%", "50"],
        ["2", "router", "85.0%", "0.15", "0.50", "60.0%", "20.0%", "10.0%", "10.0%", "60"],
    ]


def of_run(**changes):
    return OwnRow.model_validate(ORIGIN | changes)


def test_a_benchmark_that_was_run_again_is_shown_by_its_newest_run():
    """Two runs of one commit have the same positions."""
    early = of_run()
    first, again = of_run(started="2026-01-01T10:00"), of_run(started="2026-01-02T10:00")
    assert newest_run([early, early, first, again, again]) == [again, again]
    assert newest_run([again, early, early]) == [early, early]
    assert newest_run([first, first]) == [first, first]


@pytest.mark.parametrize("key", ["commit", "config_hash", "machine"])
def test_rows_without_a_start_are_one_run_per_commit_settings_and_machine(key):
    row, other = of_run(), of_run(**{key: "another"})
    assert newest_run([row, other, row]) == [row, row]


def test_a_file_says_in_its_first_line_which_benchmark_it_is_of(tmp_path):
    path = tmp_path / "any.jsonl"
    for first, name in (
        ({"run": "recovery"}, "recovery"),
        ({"run": "exchange"}, None),
        ({"run": ["recovery"]}, None),
        ({"run": "recovery", "format": "vllm-balance measurement 1"}, None),
        ([], None),
    ):
        path.write_text(json.dumps(first) + "\n")
        assert own_benchmarks.name_in(path) == name


def test_a_row_that_lacks_something_is_named(tmp_path):
    path = tmp_path / "recovery.jsonl"
    rows = recovery_bursts("static", 0, [1000.0] * 2)
    del rows[1]["e2e_ms"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(BalancerError, match=r"Line 2 of .* is no row of bench\.recovery.*`e2e_ms`"):
        own_benchmarks.read(path, "recovery")
