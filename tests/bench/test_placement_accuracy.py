"""Which pairs of placements a measurement can rank, and which of them the model ranked right."""

import numpy as np

from bench.placement_accuracy import agreement


def test_only_pairs_whose_rounds_agree_can_be_ranked():
    drift_R = np.linspace(0, 500, 8)  # The machine gets slower by more than placements differ.
    rounds_us = {
        "fast": (1000 + drift_R).tolist(),
        "slow": (1010 + drift_R).tolist(),
        # Faster in every second round.
        "neither": (1000 + drift_R + np.tile([-20, 20], 4)).tolist(),
    }
    right = {"rounds_us": rounds_us, "modelled_us": {"fast": 1.0, "slow": 2.0, "neither": 0.5}}
    wrong = {"rounds_us": rounds_us, "modelled_us": {"fast": 2.0, "slow": 1.0, "neither": 0.5}}
    assert agreement([right]) == (1, 1, 3)
    assert agreement([right, wrong]) == (1, 2, 6)


def test_a_model_that_makes_no_difference_ranks_nothing_right():
    rounds_us = {"fast": list(range(8)), "slow": list(range(1, 9))}
    assert agreement([{"rounds_us": rounds_us, "modelled_us": dict.fromkeys(rounds_us, 1.0)}]) == (
        0,
        1,
        1,
    )
    same = {"fast": [1.0] * 8, "slow": [1.0] * 8}
    assert agreement([{"rounds_us": same, "modelled_us": {"fast": 1.0, "slow": 2.0}}])[1:] == (0, 1)
