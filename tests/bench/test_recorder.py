"""What a recording costs is told from the bursts without one around it."""

import pytest

from bench import recorder, run_files

ORDER = ("off", "counts", "ids", "ids", "counts", "off")


def test_a_drift_of_the_machine_is_no_cost():
    """TPOT rises by 1 ms with every burst, and counts take 5 % more."""
    rows = [
        {"position": at, "arm": arm, "tpot_ms": (100 + at) * (1.05 if arm == "counts" else 1)}
        for at, arm in enumerate(ORDER * 2)
    ]
    found = recorder.against_off(rows)
    for row in rows[1:-1]:
        expected = 1.05 if row["arm"] == "counts" else 1.0
        assert found[row["position"]] == pytest.approx(expected, abs=1e-9)
    assert recorder._spread([0.99, 1.0, 1.01, 1.02]) == ("+0.50%", "-0.8% to +1.8%")


def test_the_server_is_that_of_the_run_file():
    arm = recorder.static_arm(run_files.read(recorder.RUN))
    assert arm.name == "static" and arm.num_ranks == 2
