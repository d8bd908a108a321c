"""Schedules with dynamic slots: the kernel against its definition, and what must always hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import draw_topk, popularity
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_balance.kernels.rebalance import Eviction, Method, Rules, reference, schedule
from vllm_balance.types import DynamicSlots, Outcome, Schedule

SEEDS = st.integers(0, 2**32 - 1)
METHODS = list(Method)


def random_slots(rng: np.random.Generator, E: int, S: int, D: int) -> DynamicSlots:
    """Any allowed state: empty, partly and wholly filled slots, any ages."""
    content_SD = np.full((S, D), -1, np.int32)
    for rank in range(S):
        foreign = [e for e in range(E) if e // (E // S) != rank]
        held = rng.permutation(foreign)[: int(rng.integers(0, D + 1))]
        content_SD[rank, rng.permutation(D)[: len(held)]] = held
    return DynamicSlots(
        num_logical=E,
        content_SD=torch.from_numpy(content_SD),
        idle_SD=torch.from_numpy(rng.integers(0, 5, (S, D)).astype(np.int32)),
    )


def random_tokens(rng: np.random.Generator, F: int, E: int) -> np.ndarray:
    """Counts [F, E] from even to all on one expert, also none at all."""
    total = int(rng.choice([0, 1, 7, 200, 5000]))
    weights_E = popularity(E, float(rng.choice([0.0, 0.8, 1.5])), rng)
    if rng.random() < 0.3:
        hot_E = np.eye(E)[rng.integers(0, E, int(rng.integers(1, 4)))].mean(0)
        alpha = rng.choice([0.5, 0.9, 1.0])
        weights_E = alpha * hot_E + (1 - alpha) * weights_E
    return rng.multinomial(total // F, weights_E, size=F).astype(np.int32)


def random_rules(rng: np.random.Generator) -> Rules:
    return Rules(
        threshold_tokens=int(rng.choice([1, 3, 20, 300])),
        fetch_tokens=int(rng.choice([0, 0, 5])),
        tolerance=float(rng.choice([0.0, 0.02, 0.2])),
        eviction=Eviction(int(rng.integers(2))),
    )


def random_case(seed: int) -> tuple[torch.Tensor, DynamicSlots, Rules]:
    rng = np.random.default_rng(seed)
    S, D = int(rng.choice([1, 2, 3, 4, 8])), int(rng.integers(0, 4))
    E = S * int(rng.integers(1, 9))
    slots = random_slots(rng, E, S, min(D, E - E // S))
    tokens_FE = random_tokens(rng, int(rng.choice([1, S])), E)
    return torch.from_numpy(tokens_FE), slots, random_rules(rng)


def loads(found: Schedule) -> list[int]:
    """Tokens of each rank."""
    placement, split_ER = found.placement, found.plan.split_ER
    tokens_S = [0] * placement.num_ranks
    for row, slots in zip(
        split_ER.tolist(), placement.logical_to_physical_ER.tolist(), strict=True
    ):
        for tokens, slot in zip(row, slots, strict=True):
            assert slot >= 0 or tokens == 0
            tokens_S[slot // placement.slots_per_rank] += tokens if slot >= 0 else 0
    return tokens_S


def home_loads(tokens_FE: torch.Tensor, num_ranks: int) -> list[int]:
    return tokens_FE.sum(0).view(num_ranks, -1).sum(1).tolist()


@pytest.mark.parametrize("method", METHODS)
@given(SEEDS)
@settings(max_examples=150)
def test_every_token_is_served_once_where_its_expert_is(method, seed):
    tokens_FE, slots, rules = random_case(seed)
    found = schedule(tokens_FE, slots, rules, method)
    split_ER, placement = found.plan.split_ER, found.placement
    assert (split_ER >= 0).all()
    assert torch.equal(split_ER.sum(1), tokens_FE.sum(0))
    assert sum(loads(found)) == int(tokens_FE.sum())
    table_ER, E, S = placement.logical_to_physical_ER, slots.num_logical, slots.num_ranks
    for expert in range(E):
        held = table_ER[expert][: int(placement.num_replicas_E[expert])].tolist()
        assert held[0] // placement.slots_per_rank == expert // (E // S), "home comes first"
        assert placement.physical_to_logical_P[held].tolist() == [expert] * len(held)
        assert (table_ER[expert, len(held) :] == -1).all()
        assert len({slot // placement.slots_per_rank for slot in held}) == len(held)
        assert held[1:] == sorted(held[1:])


@pytest.mark.parametrize("method", METHODS)
@given(SEEDS)
@settings(max_examples=150)
def test_slots_change_by_fetches_only_and_hold_no_expert_twice(method, seed):
    tokens_FE, slots, rules = random_case(seed)
    found = schedule(tokens_FE, slots, rules, method)
    fetch_SD, after_SD = found.plan.fetch_SD, found.slots.content_SD
    assert torch.equal(after_SD, torch.where(fetch_SD >= 0, fetch_SD, slots.content_SD))
    num_home = slots.num_logical // slots.num_ranks
    dynamic_SD = found.placement.physical_to_logical_P.view(slots.num_ranks, -1)[:, num_home:]
    assert torch.equal(dynamic_SD, after_SD)
    for rank, (before, after) in enumerate(
        zip(slots.content_SD.tolist(), after_SD.tolist(), strict=True)
    ):
        held = [expert for expert in after if expert >= 0]
        assert len(set(held)) == len(held)
        assert all(expert // num_home != rank for expert in held)
        fetched = [expert for expert in fetch_SD[rank].tolist() if expert >= 0]
        assert not set(fetched) & set(before), "what is there is not fetched"
    assert (found.outcome is Outcome.FETCHED) == bool((fetch_SD >= 0).any())


@pytest.mark.parametrize("method", METHODS)
@given(SEEDS)
@settings(max_examples=100)
def test_equal_arguments_give_equal_schedules_and_are_left_alone(method, seed):
    tokens_FE, slots, rules = random_case(seed)
    copies = tokens_FE.clone(), slots.content_SD.clone(), slots.idle_SD.clone()
    first, second = (schedule(tokens_FE, slots, rules, method) for _ in range(2))
    assert torch.equal(first.plan.split_ER, second.plan.split_ER)
    assert torch.equal(first.plan.fetch_SD, second.plan.fetch_SD)
    assert torch.equal(first.slots.idle_SD, second.slots.idle_SD)
    assert first.outcome is second.outcome
    now = tokens_FE, slots.content_SD, slots.idle_SD
    assert all(map(torch.equal, copies, now))


@pytest.mark.parametrize("method", METHODS)
@given(SEEDS)
@settings(max_examples=250)
def test_the_kernel_is_the_reference(method, seed):
    tokens_FE, slots, rules = random_case(seed)
    found = schedule(tokens_FE, slots, rules, method)
    tokens_E, q = tokens_FE.sum(0).numpy(), rules.threshold_tokens
    content_SD, idle_SD = slots.content_SD.numpy(), slots.idle_SD.numpy()
    if method is Method.HARMOENY:
        moves, is_even = reference.balance(
            tokens_E, content_SD, q, rules.fetch_tokens, rules.tolerance
        )
        assert (found.outcome in (Outcome.BALANCED, Outcome.EMPTY)) == is_even
    elif method is Method.HARMOENY_PAPER:
        moved_FES = reference.rebalance(tokens_FE.numpy(), slots.num_ranks, q)
        moves = reference.keep_what_fits(moved_FES, slots.num_dynamic)
    else:
        always = method is Method.EVEN_SPLIT
        moves = reference.spread(tokens_E, content_SD, q, always=always)
    expected = reference.place_moves(moves, content_SD, idle_SD, rules.eviction)
    actual = found.slots.content_SD, found.slots.idle_SD, found.plan.fetch_SD
    for left, right in zip(actual, expected, strict=False):
        assert np.array_equal(left.numpy(), right)
    served = {
        (int(expected[0][rank, d]), int(rank)): int(expected[3][rank, d])
        for rank, d in zip(*np.nonzero(expected[3]), strict=True)
    }
    for expert, row in enumerate(found.plan.split_ER.tolist()):
        slots_R = found.placement.logical_to_physical_ER[expert].tolist()
        for tokens, slot in zip(row[1:], slots_R[1:], strict=True):
            rank = slot // found.placement.slots_per_rank
            assert tokens == served.get((expert, rank), 0) or slot < 0


@given(SEEDS)
@settings(max_examples=300)
def test_the_busiest_rank_is_never_busier_than_at_home(seed):
    tokens_FE, slots, rules = random_case(seed)
    before = home_loads(tokens_FE, slots.num_ranks)
    for method in (Method.HARMOENY, Method.HARMOENY_PAPER, Method.SHADOW):
        found = schedule(tokens_FE, slots, rules, method)
        assert max(loads(found)) <= max(before)
        if found.outcome in (Outcome.BALANCED, Outcome.UNPAID):
            assert loads(found) == before


@given(SEEDS)
@settings(max_examples=200)
def test_a_fetched_expert_gets_at_least_the_threshold(seed):
    tokens_FE, slots, rules = random_case(seed)
    found = schedule(tokens_FE, slots, rules)
    for rank, d in zip(*torch.nonzero(found.plan.fetch_SD >= 0, as_tuple=True), strict=True):
        expert = int(found.plan.fetch_SD[rank, d])
        slot = int(rank) * found.placement.slots_per_rank
        slot += slots.num_logical // slots.num_ranks + int(d)
        column = found.placement.logical_to_physical_ER[expert].tolist().index(slot)
        assert found.plan.split_ER[expert, column] >= rules.threshold_tokens


def one_source(*tokens: int) -> torch.Tensor:
    return torch.tensor([tokens], dtype=torch.int32)


def held(num_logical: int, *content: list[int]) -> DynamicSlots:
    content_SD = torch.tensor(content, dtype=torch.int32)
    return DynamicSlots(
        num_logical=num_logical, content_SD=content_SD, idle_SD=torch.zeros_like(content_SD)
    )


def test_one_hot_expert_is_shared_and_stays():
    rules = Rules(threshold_tokens=10)
    first = schedule(one_source(900, 0, 50, 50), held(4, [-1], [-1]), rules)
    assert first.outcome is Outcome.FETCHED
    assert first.plan.fetch_SD.tolist() == [[-1], [0]]
    assert first.plan.split_ER.tolist() == [[500, 400], [0, 0], [50, 0], [50, 0]]
    assert first.placement.logical_to_physical_ER.tolist() == [[0, 5], [1, -1], [3, -1], [4, -1]]
    assert first.placement.physical_to_logical_P.tolist() == [0, 1, -1, 2, 3, 0]
    second = schedule(one_source(700, 100, 100, 100), first.slots, rules)
    assert second.outcome is Outcome.HELD
    assert second.plan.fetch_SD.tolist() == [[-1], [-1]]
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
    slots, rules = held(4, [2], [-1]), Rules(threshold_tokens=1)
    empty = schedule(one_source(0, 0, 0, 0), slots, rules, method)
    assert empty.outcome is Outcome.EMPTY
    assert not empty.plan.split_ER.any() and (empty.plan.fetch_SD == -1).all()
    assert empty.slots.content_SD.tolist() == [[2], [-1]]
    one = schedule(one_source(0, 0, 1, 0), slots, rules, method)
    assert sum(loads(one)) == 1


def test_even_batches_and_unpaid_moves_step_aside():
    slots = held(4, [-1], [-1])
    even = schedule(one_source(50, 51, 50, 50), slots, Rules(threshold_tokens=1))
    assert even.outcome is Outcome.BALANCED
    small = schedule(one_source(30, 30, 0, 0), slots, Rules(threshold_tokens=31))
    assert small.outcome is Outcome.UNPAID
    assert loads(small) == [60, 0]
    paid = schedule(one_source(30, 30, 0, 0), slots, Rules(threshold_tokens=30))
    assert loads(paid) == [30, 30]


def test_a_fetch_that_costs_the_receiver_time_moves_less():
    """900 and 100, a fetch takes as long as 100 tokens: both end at 550."""
    rules = Rules(threshold_tokens=100, fetch_tokens=100, tolerance=0.0)
    found = schedule(one_source(900, 0, 100, 0), held(4, [-1], [-1]), rules)
    assert loads(found) == [550, 450]


def test_small_held_experts_do_not_block_the_slot_of_a_large_one():
    """The slot of rank 1 holds expert 1 with 20 tokens; expert 0 has 900."""
    found = schedule(one_source(900, 20, 40, 40), held(4, [-1], [1]), Rules(threshold_tokens=10))
    assert found.plan.fetch_SD.tolist() == [[-1], [0]]
    assert loads(found) == [500, 500]


def test_memory_bound_batches_use_what_is_there_and_fetch_nothing():
    """Six active experts, four of them on rank 0; one is on rank 1 too, so both serve three."""
    slots = held(8, [-1], [2])
    tokens_FE = one_source(1, 2, 1, 1, 1, 1, 0, 0)
    found = schedule(tokens_FE, slots, Rules(threshold_tokens=1, knee_tokens=4.0))
    assert found.outcome is Outcome.MEMORY_BOUND
    assert found.plan.split_ER[2].tolist() == [0, 1]
    assert loads(found) == [4, 3]
    assert torch.equal(found.slots.content_SD, slots.content_SD)
    many = schedule(40 * tokens_FE, slots, Rules(threshold_tokens=1, knee_tokens=4.0))
    assert many.outcome is not Outcome.MEMORY_BOUND


def test_eviction_rules():
    """Rank 1 needs expert 0. LRU overwrites the longest idle slot, FIRST the first one."""
    slots = DynamicSlots(
        num_logical=6,
        content_SD=torch.tensor([[-1, -1], [1, 2]], dtype=torch.int32),
        idle_SD=torch.tensor([[0, 0], [1, 7]], dtype=torch.int32),
    )
    tokens_FE = one_source(900, 0, 0, 0, 0, 0)
    lru = schedule(tokens_FE, slots, Rules(threshold_tokens=1))
    assert lru.slots.content_SD.tolist() == [[-1, -1], [1, 0]]
    assert lru.slots.idle_SD.tolist() == [[1, 1], [2, 0]]
    first = schedule(tokens_FE, slots, Rules(threshold_tokens=1, eviction=Eviction.FIRST))
    assert first.slots.content_SD.tolist() == [[-1, -1], [0, 2]]


@pytest.mark.parametrize("content", [[[4, -1], [-1, -1]], [[0, -1], [-1, -1]], [[2, 2], [-1, -1]]])
def test_a_wrong_content_is_refused(content):
    """No such expert, at home on that rank, or there twice."""
    with pytest.raises(ValueError, match="dynamic slot"):
        schedule(one_source(1, 1, 1, 1), held(4, *content), Rules(threshold_tokens=1))


def test_wrong_arguments_are_refused():
    slots = held(4, [-1], [-1])
    with pytest.raises(ValueError, match="do not divide"):
        DynamicSlots.empty(num_logical=5, num_ranks=2, num_dynamic=1)
    with pytest.raises(ValueError, match="Copy them to the host"):
        schedule(one_source(1, 2, 3), slots, Rules(threshold_tokens=1))
    with pytest.raises(ValueError, match="int32"):
        schedule(one_source(1, 1, 1, 1).long(), slots, Rules(threshold_tokens=1))
    with pytest.raises(ValueError, match="threshold"):
        Rules(threshold_tokens=0)


def test_real_prefill_counts_end_near_the_mean():
    """64 experts, 8 ranks, Zipf 0.8: at most 5 % above the mean with two slots per rank."""
    rng = np.random.default_rng(0)
    ids_TK = draw_topk(4096, 6, popularity(64, 0.8, rng), rng)
    tokens_FE = torch.bincount(torch.from_numpy(ids_TK).flatten(), minlength=64)[None].int()
    slots = DynamicSlots.empty(num_logical=64, num_ranks=8, num_dynamic=2)
    found = schedule(tokens_FE, slots, Rules(threshold_tokens=32))
    mean = int(tokens_FE.sum()) / 8
    assert max(home_loads(tokens_FE, 8)) > 1.3 * mean
    assert max(loads(found)) < 1.05 * mean
