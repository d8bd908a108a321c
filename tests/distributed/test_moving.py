"""Two gloo processes whose experts move: weights and tables together, the same on all ranks.

moving.py compares every batch with the dense layer and every weight with its expert.
"""

from pathlib import Path

import numpy as np
import pytest
from gloo import run_ranks

pytestmark = pytest.mark.timeout(600)

MOVING = Path(__file__).with_name("moving.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the first rank found in each case; the other one found the same."""
    first, second = run_ranks(MOVING, 2, tmp_path_factory.mktemp("moving"))
    for case in first.values():
        for entry in case["recent"]:
            assert entry.pop("swap_us") > 0
    for case in second.values():
        for entry in case["recent"]:
            assert entry.pop("swap_us") > 0
    assert first == second
    return first


def test_experts_follow_the_traffic_and_the_output_stays(found):
    turning = found["turning"]
    assert turning["steps"] == 60 and turning["decisions"] == 6
    moved_at = [entry["step"] for entry in turning["recent"] if entry["swaps"]]
    assert any(step <= 30 for step in moved_at), "the busy experts of one rank were not parted"
    assert any(step > 30 for step in moved_at), "the new traffic was not noticed"
    assert max(entry["drift"] for entry in turning["recent"]) > 0.3
    assert turning["moves"] == len(moved_at)
    assert turning["slowdown_per_rank"] == pytest.approx([1, 1], abs=1e-3)


def test_a_slow_rank_is_told_from_the_other_and_gives_load_away(found):
    slow = found["slow"]
    for entry in slow["recent"]:
        assert entry["slowdown_per_rank"] == pytest.approx([1, 1.5], rel=1e-2)
    pairs_NS = np.array(slow["pairs_NS"])
    before, after = (part[:, 1].sum() / part.sum() for part in (pairs_NS[:10], pairs_NS[20:]))
    assert slow["swaps"] > 0 and after < before - 0.05


def test_by_default_nothing_moves_that_does_not_pay(found):
    still = found["still"]
    assert still["decisions"] == 6 and still["swaps"] == still["moves"] == 0
    reasons = {entry["reason"] for entry in still["recent"]}
    assert reasons <= {
        "no swap pays for itself within the horizon",
        "the gain is within the hysteresis",
    }
