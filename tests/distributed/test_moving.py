"""Two gloo processes whose experts move: weights and tables together, the same on all ranks.

moving.py compares every batch with the dense layer and every weight with its expert.
"""

from pathlib import Path

from gloo import run_ranks

MOVING = Path(__file__).with_name("moving.py")


def test_experts_follow_the_traffic_and_the_output_stays(tmp_path):
    found = run_ranks(MOVING, 2, tmp_path)
    assert found[0] == found[1]
    assert found[0]["steps"] == 60 and found[0]["decisions"] == 6
    moved_at = [entry["step"] for entry in found[0]["recent"] if entry["swaps"]]
    assert any(step <= 30 for step in moved_at), "the busy experts of one rank were not parted"
    assert any(step > 30 for step in moved_at), "the new traffic was not noticed"
    assert max(entry["drift"] for entry in found[0]["recent"]) > 0.3
    assert found[0]["moves"] == len(moved_at)
