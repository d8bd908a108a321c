"""Fields of a row from the ranks' counters, and when they may not be trusted."""

import pytest

from bench.counters import counted, heat, require_trustworthy, samples
from bench.load import Answered


def status(decisions=20, **changes):
    """Two layers, ten steps; per step 3 and 5 experts on the ranks, 6 where it matters."""
    return {
        "balancer": "metro",
        "placement": "vLLM's own",
        "num_ranks": 2,
        "num_layers": 2,
        "num_logical_experts": 3,
        "num_physical_experts": 4,
        "exchange": "replicated",
        "decisions": decisions,
        "pairs": 16 * decisions,
        "max_activated_sum": 3 * decisions,
        "max_tokens_sum": 10 * decisions,
        "activated_per_rank": [3 * decisions // 2, 5 * decisions // 2],
        "tokens_per_rank": [6 * decisions, 10 * decisions],
        "memory_bound_batches": decisions,
        "compute_bound_batches": 0,
        "experts_us": 800.0,
        "experts_wrapping_us": 100.0,
        "decide_us": 100.0,
        **changes,
    }


def layer(experts, tokens):
    return {"physical_to_logical": experts, "slot_tokens": tokens}


def test_statistics_are_per_step_and_sums_over_layers():
    fields = counted([status(), status(experts_us=400.0)])
    assert fields["steps"] == 10
    assert (fields["activated_worst_rank"], fields["tokens_worst_rank"]) == (6, 20)
    assert fields["activated_per_rank"] == [3, 5]
    assert fields["waiting_share_by_experts"] == pytest.approx(1 - 4 / 6)
    assert fields["waiting_share_by_tokens"] == pytest.approx(1 - 8 / 10)
    assert (fields["decide_us_per_layer"], fields["experts_us_per_layer"]) == (5, 40)
    assert fields["experts_us_per_rank"] == [800, 400]
    assert (fields["placement"], fields["online"]) == ("vLLM's own", None)
    assert (fields["decide_share"], fields["wrapping_share"]) == (0.1, 0.1)


def test_means_are_over_steps_with_tokens():
    """Data-parallel ranks take others behind their last request."""
    few = {"memory_bound_batches": 6, "compute_bound_batches": 8}
    fields = counted([status(**few), status(**few)])
    assert fields["steps"] == 7 and fields["decisions"] == 20
    assert fields["activated_worst_rank"] == pytest.approx(60 / 7)
    assert fields["experts_us_per_layer"] == pytest.approx(800 / 14)
    require_trustworthy("metro", [status(**few)] * 2, min_steps=7)
    with pytest.raises(RuntimeError, match="ran 14 times for 320 pairs"):
        require_trustworthy("metro", [status(**few)] * 2, min_steps=8)


def test_guesses_are_deciding_too():
    fields = counted([status(look_ahead_us=250.0), status(experts_us=400.0, look_ahead_us=9.0)])
    assert fields["decide_us_per_layer"] == 17.5
    assert (fields["decide_share"], fields["wrapping_share"]) == (0.28, 0.08)


@pytest.mark.parametrize(
    "key", ["decisions", "max_activated_sum", "max_tokens_sum", "pairs", "activated_per_rank"]
)
def test_ranks_that_differ_give_no_number(key):
    other = [1, 2] if key == "activated_per_rank" else 19
    with pytest.raises(RuntimeError, match=f"metro: ranks differ in {key}"):
        require_trustworthy("metro", [status(), status(**{key: other})], min_steps=1)


@pytest.mark.parametrize(("ranks", "steps"), [([status(pairs=0)], 1), ([status()], 11)])
def test_a_policy_that_ran_too_seldom_gives_no_number(ranks, steps):
    with pytest.raises(RuntimeError, match=r"metro: the policy ran 20 times .* at least \d+ steps"):
        require_trustworthy("metro", ranks, min_steps=steps)


def test_as_many_steps_as_the_load_takes_are_enough():
    require_trustworthy("metro", [status(), status(experts_us=1.0)], min_steps=10)


def fetching(**schedules):
    names = ("empty", "memory_bound", "balanced", "unpaid", "held", "fetched")
    return status(**{f"{name}_schedules": schedules.get(name, 0) for name in names})


def test_a_skewed_prefill_that_was_taken_for_decode_gives_no_number():
    ranks = [fetching(memory_bound=18, empty=2)] * 2
    with pytest.raises(RuntimeError, match="harmoeny: all 18 schedules took this skewed prefill"):
        require_trustworthy("harmoeny", ranks, min_steps=1, is_skewed_prefill=True)
    require_trustworthy("harmoeny", ranks, min_steps=1)


@pytest.mark.parametrize(
    "ranks",
    [
        [fetching(memory_bound=19, fetched=1)] * 2,
        [fetching(memory_bound=19, unpaid=1)] * 2,
        [status()] * 2,
    ],
)
def test_a_policy_that_looked_at_a_skewed_prefill_is_trusted(ranks):
    require_trustworthy("harmoeny", ranks, min_steps=1, is_skewed_prefill=True)


def test_samples_are_what_happened_between_two_looks():
    looks = [(1.0, [status(4)]), (2.0, [status(4)]), (3.004, [status(20)])]
    found = samples(Answered(client={}, looks=looks, waited_s=0.0))
    assert [(one["at_s"], one["steps"]) for one in found] == [(1.0, 2), (3.0, 8)]
    assert [one["activated_per_rank"] for one in found] == [[3, 5], [3, 5]]
    assert found[1]["tokens_per_rank"] == [12, 20]


def test_heat_sums_the_batches_seen_under_the_last_placement():
    before, now = [0, 1, 2, 0], [0, 1, 2, 1]
    looks = [
        (1.0, [status(layers=[layer(before, [9, 9, 9, 9])])]),
        (2.0, [status(layers=[layer(now, [1, 2, 3, 4])])]),
        (3.0, [status(layers=[layer(now, [1, 0, 0, 1])])]),
    ]
    assert heat(Answered(client={}, looks=looks, waited_s=0.0)) == [layer(now, [2, 2, 3, 5])]


def test_heat_sums_the_ranks_where_each_sees_its_own_tokens():
    ranks = [
        status(exchange=way, layers=[layer([0, 1, 2, 0], tokens)])
        for way, tokens in (("all_reduce", [1, 0, 0, 0]), ("all_reduce", [0, 0, 0, 2]))
    ]
    assert heat(Answered(client={}, looks=[(1.0, ranks)], waited_s=0.0)) == [
        layer([0, 1, 2, 0], [1, 0, 0, 2])
    ]
