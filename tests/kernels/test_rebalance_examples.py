"""Schedules with dynamic slots on cases worked out by hand, and near the optimum on tiny ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from cases import draw_topk, popularity
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from vllm_balance.kernels.rebalance import Eviction, Method, Rules, count, reference, schedule
from vllm_balance.types import DynamicSlots, Outcome, Schedule

METHODS = list(Method)


def loads(found: Schedule) -> list[int]:
    """Tokens of each rank."""
    placement = found.placement
    is_slot_ER = placement.logical_to_physical_ER >= 0
    slots_N = placement.logical_to_physical_ER[is_slot_ER].long()
    tokens_P = torch.bincount(
        slots_N, weights=found.plan.split_ER[is_slot_ER], minlength=placement.num_physical
    )
    return tokens_P.view(placement.num_ranks, -1).sum(1).int().tolist()


def ends(found: Schedule, rules: Rules) -> list[int]:
    """When each rank ends, in tokens: its own and what its fetches add."""
    fetches_S = (found.fetch_SD >= 0).sum(1).tolist()
    return [
        load + rules.fetch_tokens * fetches
        for load, fetches in zip(loads(found), fetches_S, strict=True)
    ]


def one_source(*tokens: int) -> torch.Tensor:
    return torch.tensor([tokens], dtype=torch.int32)


def held(num_logical: int, *content: list[int]) -> DynamicSlots:
    content_SD = torch.tensor(content, dtype=torch.int32)
    return DynamicSlots(
        num_logical=num_logical, content_SD=content_SD, idle_SD=torch.zeros_like(content_SD)
    )


def test_one_hot_expert_is_shared_and_stays():
    rules = Rules(threshold_tokens=10, fetch_tokens=0)
    first = schedule(one_source(900, 0, 50, 50), held(4, [-1], [-1]), rules)
    assert first.outcome is Outcome.FETCHED
    assert first.fetch_SD.tolist() == [[-1], [0]]
    assert first.plan.split_ER.tolist() == [[500, 400], [0, 0], [50, 0], [50, 0]]
    assert first.placement.logical_to_physical_ER.tolist() == [[0, 5], [1, -1], [3, -1], [4, -1]]
    assert first.placement.physical_to_logical_P.tolist() == [0, 1, -1, 2, 3, 0]
    second = schedule(one_source(700, 100, 100, 100), first.slots, rules)
    assert second.outcome is Outcome.HELD
    assert second.fetch_SD.tolist() == [[-1], [-1]]
    assert second.plan.split_ER[0].tolist() == [400, 300]


def test_algorithm_2_by_hand():
    """Mean 10: expert 0 gives 6 to rank 1 and 2 to rank 2, which then lacks less than q."""
    moved_FES = reference.rebalance(np.array([[18, 0, 4, 0, 8, 0]]), 3, 2)
    assert moved_FES[0].tolist() == [
        [10, 6, 2], [0, 0, 0], [0, 4, 0], [0, 0, 0], [0, 0, 8], [0, 0, 0]
    ]  # fmt: skip
    stopped_FES = reference.rebalance(np.array([[18, 0, 4, 0, 8, 0]]), 3, 3)
    assert stopped_FES[0, 0].tolist() == [12, 6, 0]


def test_algorithm_2_takes_from_the_source_with_most_tokens_on_the_rank():
    tokens_FE = np.array([[3, 1, 0, 0], [2, 2, 0, 0]])
    moved_FES = reference.rebalance(tokens_FE, 2, 1)
    assert moved_FES[0].tolist() == [[0, 3], [1, 0], [0, 0], [0, 0]]
    assert moved_FES[1].tolist() == [[1, 1], [2, 0], [0, 0], [0, 0]]


@pytest.mark.parametrize("method", METHODS)
def test_no_tokens_and_one_token(method):
    slots, rules = held(4, [2], [-1]), Rules(threshold_tokens=1, fetch_tokens=0)
    empty = schedule(one_source(0, 0, 0, 0), slots, rules, method)
    assert empty.outcome is Outcome.EMPTY
    assert not empty.plan.split_ER.any() and (empty.fetch_SD == -1).all()
    assert empty.slots.content_SD.tolist() == [[2], [-1]]
    one = schedule(one_source(0, 0, 1, 0), slots, rules, method)
    assert sum(loads(one)) == 1


def test_even_batches_and_unpaid_moves_step_aside():
    slots = held(4, [-1], [-1])
    even = schedule(one_source(50, 51, 50, 50), slots, Rules(threshold_tokens=1, fetch_tokens=0))
    assert even.outcome is Outcome.BALANCED
    small = schedule(one_source(60, 60, 30, 0), slots, Rules(threshold_tokens=61, fetch_tokens=0))
    assert small.outcome is Outcome.UNPAID
    assert loads(small) == [120, 30]
    paid = schedule(one_source(60, 60, 30, 0), slots, Rules(threshold_tokens=30, fetch_tokens=0))
    assert loads(paid) == [75, 75]
    late = schedule(one_source(30, 30, 0, 0), slots, Rules(threshold_tokens=30, fetch_tokens=0))
    assert late.outcome is Outcome.UNPAID, "the idle rank would end when the other does"


def test_replicas_that_are_there_even_out_what_is_not_worth_a_fetch():
    """3 % above the mean: less than twice the tolerance, so nothing is fetched for it."""
    rules, tokens_FE = Rules(threshold_tokens=10, fetch_tokens=0), one_source(1000, 1060, 1000, 940)
    assert schedule(tokens_FE, held(4, [-1], [-1]), rules).outcome is Outcome.UNPAID
    there = schedule(tokens_FE, held(4, [-1], [1]), rules)
    assert there.outcome is Outcome.HELD and loads(there) == [2000, 2000]


def test_a_fetch_that_costs_the_receiver_time_moves_less():
    """900 and 100, a fetch takes as long as 100 tokens: both end at 550."""
    rules = Rules(threshold_tokens=100, fetch_tokens=100, tolerance=0.0)
    found = schedule(one_source(900, 0, 100, 0), held(4, [-1], [-1]), rules)
    assert loads(found) == [550, 450]


def test_a_rank_with_little_to_do_waits_for_its_first_fetch():
    """A fetch takes 200: rank 1 has 100 of its own, so it cannot start before 200. Both end at
    600; what it holds next time needs no wait."""
    rules = Rules(threshold_tokens=200, fetch_tokens=0, tolerance=0.0)
    first = schedule(one_source(1000, 0, 100, 0), held(4, [-1], [-1]), rules)
    assert loads(first) == [600, 500]
    assert loads(schedule(one_source(1000, 0, 100, 0), first.slots, rules)) == [550, 550]


def test_small_held_experts_do_not_block_the_slot_of_a_large_one():
    """The slot of rank 1 holds expert 1 with 20 tokens; expert 0 has 900."""
    found = schedule(
        one_source(900, 20, 40, 40), held(4, [-1], [1]), Rules(threshold_tokens=10, fetch_tokens=0)
    )
    assert found.fetch_SD.tolist() == [[-1], [0]]
    assert loads(found) == [500, 500]


@pytest.mark.parametrize("fetch_tokens", [0, 10])
def test_tokens_are_divided_further_only_while_that_needs_no_more_fetches(fetch_tokens):
    """Rank 2 holds experts 0 and 1. At 1100, the target, it takes 550 tokens of expert 0 and 100 of
    expert 1, and rank 3 fetches expert 1. At 1000 or 1025 it is full after expert 0, so rank 3
    would fetch both: as many moves, one fetch more. At 1050 one fetch is enough."""
    tokens_FE = one_source(1650, 1600, 450, 300)
    slots = held(4, [-1, -1], [-1, -1], [0, 1], [-1, -1])
    rules = Rules(threshold_tokens=10, fetch_tokens=fetch_tokens, tolerance=0.1)
    found = schedule(tokens_FE, slots, rules)
    assert loads(found) == [1050, 1050, 1050, 850]
    assert found.fetch_SD.tolist() == [[-1, -1], [-1, -1], [-1, -1], [1, -1]]
    moves, _ = reference.balance(
        tokens_FE[0].numpy(), slots.content_SD.numpy(), 10, fetch_tokens, 0.1
    )
    assert moves == [(0, 2, 600), (1, 3, 550)]


@pytest.mark.parametrize("method", METHODS)
def test_a_prefill_on_few_of_many_experts_is_no_decode(method):
    """1,000 tokens of a top-1 model, 900 of them on one of 32 experts: 31 per active expert, fewer
    than the knee, and still the one with 900 is worth a copy."""
    rules = Rules(threshold_tokens=40, fetch_tokens=40, knee_tokens=43.0)
    tokens_FE = one_source(900, *([3] * 24), *([4] * 7))
    slots = DynamicSlots.empty(num_logical=32, num_ranks=2, num_dynamic=8)
    found = schedule(tokens_FE, slots, rules, method)
    assert found.outcome is Outcome.FETCHED and 0 in found.fetch_SD[1].tolist()
    assert max(loads(found)) < 600


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("hot", [0, 8])
def test_a_decode_batch_moves_nothing_however_skewed_it_is(method, hot):
    """32 tokens of a top-8 model, even or all on the same eight experts of one rank."""
    rng = np.random.default_rng(0)
    ids_TK = np.tile(np.arange(hot), (32, 1)) if hot else rng.random((32, 64)).argsort(1)[:, :8]
    tokens_FE = count(torch.from_numpy(ids_TK.copy()), 64)[None]
    slots = DynamicSlots.empty(num_logical=64, num_ranks=2, num_dynamic=8)
    rules = Rules(threshold_tokens=1, fetch_tokens=1, knee_tokens=43.0)
    found = schedule(tokens_FE, slots, rules, method)
    assert found.outcome is Outcome.MEMORY_BOUND and (found.fetch_SD == -1).all()
    assert loads(found) == tokens_FE.view(2, -1).sum(1).tolist()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("hottest", "few"), [(49, True), (50, False)])
def test_one_expert_worth_streaming_twice_and_a_copy_makes_a_batch_compute_bound(
    method, hottest, few
):
    """Knee 43 and q 7: the mean of 1 and 49, or of 1 and 50, is below the knee."""
    rules = Rules(threshold_tokens=7, fetch_tokens=7, knee_tokens=43.0)
    found = schedule(one_source(hottest, 0, 1, 0), held(4, [-1], [-1]), rules, method)
    assert (found.outcome is Outcome.MEMORY_BOUND) == few
    assert (found.outcome is Outcome.FETCHED) != few


def test_a_held_replica_takes_a_part_of_one_hot_expert_and_all_of_one_with_few():
    """Rank 1 holds expert 0: where few tokens decide, one replica serves all of an expert's."""
    rules = Rules(threshold_tokens=40, fetch_tokens=40, knee_tokens=43.0)
    slots = held(32, [-1] * 2, [0, -1])
    hot = schedule(one_source(900, *([3] * 31)), slots, rules)
    assert hot.outcome is Outcome.HELD and loads(hot) == [497, 496]
    few = schedule(one_source(80, *([3] * 31)), slots, rules)
    assert few.outcome is Outcome.MEMORY_BOUND
    assert sorted(few.plan.split_ER[0, :2].tolist()) == [0, 80]


def test_memory_bound_batches_use_what_is_there_and_fetch_nothing():
    """Six active experts, four of them on rank 0; one is on rank 1 too, so both serve three."""
    slots = held(8, [-1], [2])
    tokens_FE = one_source(1, 2, 1, 1, 1, 1, 0, 0)
    found = schedule(tokens_FE, slots, Rules(threshold_tokens=1, fetch_tokens=0, knee_tokens=4.0))
    assert found.outcome is Outcome.MEMORY_BOUND
    assert found.plan.split_ER[2].tolist() == [0, 1]
    assert loads(found) == [4, 3]
    assert torch.equal(found.slots.content_SD, slots.content_SD)
    many = schedule(
        40 * tokens_FE, slots, Rules(threshold_tokens=1, fetch_tokens=0, knee_tokens=4.0)
    )
    assert many.outcome is not Outcome.MEMORY_BOUND


def test_eviction_rules():
    """Rank 1 needs expert 0. LRU overwrites the longest idle slot, FIRST the first one."""
    slots = DynamicSlots(
        num_logical=6,
        content_SD=torch.tensor([[-1, -1], [1, 2]], dtype=torch.int32),
        idle_SD=torch.tensor([[0, 0], [1, 7]], dtype=torch.int32),
    )
    tokens_FE = one_source(900, 0, 0, 0, 0, 0)
    lru = schedule(tokens_FE, slots, Rules(threshold_tokens=1, fetch_tokens=0))
    assert lru.slots.content_SD.tolist() == [[-1, -1], [1, 0]]
    assert lru.slots.idle_SD.tolist() == [[1, 1], [2, 0]]
    first = schedule(
        tokens_FE, slots, Rules(threshold_tokens=1, fetch_tokens=0, eviction=Eviction.FIRST)
    )
    assert first.slots.content_SD.tolist() == [[-1, -1], [0, 2]]


@pytest.mark.parametrize("content", [[[4, -1], [-1, -1]], [[0, -1], [-1, -1]], [[2, 2], [-1, -1]]])
def test_a_wrong_content_is_refused(content):
    """No such expert, at home on that rank, or there twice."""
    with pytest.raises(ValueError, match="dynamic slot"):
        schedule(
            one_source(1, 1, 1, 1), held(4, *content), Rules(threshold_tokens=1, fetch_tokens=0)
        )


def test_wrong_arguments_are_refused():
    slots = held(4, [-1], [-1])
    with pytest.raises(ValueError, match="do not divide"):
        DynamicSlots.empty(num_logical=5, num_ranks=2, num_dynamic=1)
    with pytest.raises(ValueError, match="Copy them to the host"):
        schedule(one_source(1, 2, 3), slots, Rules(threshold_tokens=1, fetch_tokens=0))
    with pytest.raises(ValueError, match="int32"):
        schedule(one_source(1, 1, 1, 1).long(), slots, Rules(threshold_tokens=1, fetch_tokens=0))
    with pytest.raises(ValueError, match="threshold"):
        Rules(threshold_tokens=0, fetch_tokens=0)


@pytest.mark.parametrize("fetch_tokens", [0, 32])
def test_real_prefill_counts_end_near_the_mean(fetch_tokens):
    """64 experts, 8 ranks, Zipf 0.8: at most 5 % above the mean with two slots per rank, and the
    time of the fetches within that."""
    rng = np.random.default_rng(0)
    ids_TK = draw_topk(4096, 6, popularity(64, 0.8, rng), rng)
    tokens_FE = torch.bincount(torch.from_numpy(ids_TK).flatten(), minlength=64)[None].int()
    slots = DynamicSlots.empty(num_logical=64, num_ranks=8, num_dynamic=2)
    rules = Rules(threshold_tokens=32, fetch_tokens=fetch_tokens)
    found = schedule(tokens_FE, slots, rules)
    mean = int(tokens_FE.sum()) / 8
    assert tokens_FE.view(8, -1).sum(1).max() > 1.3 * mean
    assert max(ends(found, rules)) < 1.05 * mean


def least_peak(tokens_E: np.ndarray, num_ranks: int, num_dynamic: int) -> float:
    """Least load of the busiest rank over every content of the slots, tokens divided at will."""
    num_experts = len(tokens_E)
    home_E = np.arange(num_experts) // (num_experts // num_ranks)
    ways = (itertools.combinations(np.flatnonzero(home_E != s), num_dynamic)
            for s in range(num_ranks))  # fmt: skip
    best = np.inf
    for way in itertools.product(*ways):
        places = [*zip(range(num_experts), home_E, strict=True)]
        places += [(expert, rank) for rank, content in enumerate(way) for expert in content]
        on_rank_SX, of_expert_EX = (
            np.zeros((n, len(places) + 1)) for n in (num_ranks, num_experts)
        )
        for x, (expert, rank) in enumerate(places):
            on_rank_SX[rank, x] = of_expert_EX[expert, x] = 1
        on_rank_SX[:, -1] = -1
        found = linprog(np.eye(len(places) + 1)[-1], on_rank_SX, np.zeros(num_ranks),
                        of_expert_EX, tokens_E)  # fmt: skip
        best = min(best, found.fun)
    return best


@pytest.mark.parametrize(
    ("ranks", "experts", "slots", "bound"),
    [(2, 6, 1, 1), (2, 6, 2, 1), (3, 6, 2, 1), (3, 6, 1, 1.5)],
)
@pytest.mark.parametrize("fetch_tokens", [0, 1])
@given(st.integers(0, 2**32 - 1))
@settings(max_examples=8)
def test_tiny_cases_reach_the_optimum(fetch_tokens, ranks, experts, slots, bound, seed):
    """With two slots, or two ranks. With one slot on three ranks an overloaded rank would have to
    take another's tokens and give more of its own: that is not tried, and costs up to a half.
    One token more for each fetch of a rank, as a fetch takes as long as one."""
    rng = np.random.default_rng(seed)
    weight_E = rng.pareto(1.0, experts) + 0.05
    tokens_E = rng.multinomial(1000, weight_E / weight_E.sum()).astype(np.int32)
    rules = Rules(threshold_tokens=1, fetch_tokens=fetch_tokens, tolerance=0.0)
    empty = DynamicSlots.empty(num_logical=experts, num_ranks=ranks, num_dynamic=slots)
    found = schedule(torch.from_numpy(tokens_E)[None], empty, rules)
    least = np.ceil(least_peak(tokens_E, ranks, slots) - 1e-6)
    assert max(ends(found, rules)) <= bound * least + max(1, fetch_tokens * slots)
    assert max(ends(found, rules)) <= tokens_E.reshape(ranks, -1).sum(1).max()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_counts_leave_out_padding_and_what_is_no_expert(dtype):
    ids_TK = torch.tensor([[0, 3], [-1, 3], [4, 2], [1, 1]], dtype=dtype)
    valid = torch.tensor(3, dtype=torch.int32)
    assert count(ids_TK, 4).tolist() == [1, 2, 1, 2]
    assert count(ids_TK, 4, valid).tolist() == [1, 0, 1, 2]
    assert count(ids_TK[:0], 4).tolist() == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="int32 or int64"):
        count(ids_TK.float(), 4)
