"""Which pairs of placements a measurement can rank, and which of them the model ranked right."""

import numpy as np

from bench.placement_accuracy import _group, agreement


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


def test_what_many_pairs_show_by_chance_does_not_count():
    """Nine placements that are alike: by 5 % alone one or two of 36 pairs would be different."""
    rows = []
    for seed in range(10):
        random = np.random.default_rng(seed)
        rounds_us = {str(k): (1000 + random.normal(0, 30, 16)).tolist() for k in range(9)}
        rows.append({"rounds_us": rounds_us, "modelled_us": dict.fromkeys(rounds_us, 1.0)})
    _, rankable, total = agreement(rows)
    assert total == 360 and rankable <= 4
    apart = {str(k): (1000 + 100 * k + np.arange(16)).tolist() for k in range(9)}
    modelled_us = {name: times[0] for name, times in apart.items()}
    assert agreement([{"rounds_us": apart, "modelled_us": modelled_us}]) == (36, 36, 36)


def test_a_model_that_makes_no_difference_ranks_nothing_right():
    rounds_us = {"fast": list(range(8)), "slow": list(range(1, 9))}
    assert agreement([{"rounds_us": rounds_us, "modelled_us": dict.fromkeys(rounds_us, 1.0)}]) == (
        0,
        1,
        1,
    )
    same = {"fast": [1.0] * 8, "slow": [1.0] * 8}
    assert agreement([{"rounds_us": same, "modelled_us": {"fast": 1.0, "slow": 2.0}}])[1:] == (0, 1)


def row(batch="decode", commit="abc1234", slower=1.0):
    """Two placements, one of them `slower` by this factor in every round."""
    rounds_us = {"fast": [1000.0] * 8, "slow": [1000.0 * slower] * 8}
    return {
        **{"trace": "a trace", "batch": batch, "commit": commit, "fit_error": 0.03},
        "rounds_us": rounds_us,
        "measured_us": {name: times[0] for name, times in rounds_us.items()},
        "modelled_us": {"fast": 1100.0, "slow": 1100.0 * slower},
    }


def lines(rows):
    """Cells of the table's body, and what stands beneath."""
    *table, _, origin = _group("A machine", "float32", rows).splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]], origin


def test_a_table_of_few_rows_has_no_line_without_rows_and_no_share_of_nothing():
    body, _ = lines([row()])
    numbers = ["3.0%", "10.0%", "-", "0", "1"]
    assert body == [["decode", *numbers], ["both", *numbers]]
    body, _ = lines([row(), row(batch="prefill", slower=1.1)])
    assert body[1:] == [
        ["prefill", "3.0%", "10.0%", "100.0%", "1", "0"],
        ["both", "3.0%", "10.0%", "100.0%", "1", "1"],
    ]


def test_a_table_names_every_commit_of_its_rows():
    newest_first = [row(batch="prefill", commit="new"), row(commit="old"), row(commit="older")]
    _, origin = lines(newest_first)
    assert origin == "Measured on 1 traces; float32; A machine; commit old, new; seed 0."
