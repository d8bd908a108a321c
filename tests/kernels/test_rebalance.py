"""Schedules with dynamic slots: the kernel against its definition, and what must always hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import popularity
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_balance.kernels.metro import choose
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
    """Fetches that are hidden, that cost a little, and that cost as long as q, as in a server; no
    batch is memory-bound, or some are."""
    threshold = int(rng.choice([1, 3, 20, 300]))
    return Rules(
        threshold_tokens=threshold,
        fetch_tokens=int(rng.choice([0, 5, threshold])),
        knee_tokens=float(rng.choice([0, 0, 4.5, 43])),
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
    fetch_SD, after_SD = found.fetch_SD, found.slots.content_SD
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
    assert torch.equal(first.fetch_SD, second.fetch_SD)
    assert torch.equal(first.slots.idle_SD, second.slots.idle_SD)
    assert first.outcome is second.outcome
    now = tokens_FE, slots.content_SD, slots.idle_SD
    assert all(map(torch.equal, copies, now))


def chosen_by_metro(tokens_FE: torch.Tensor, found: Schedule) -> list[reference.Move]:
    """Each active expert on one of the replicas that are there, as moves."""
    tokens_E, placement = tokens_FE.sum(0, dtype=torch.int32), found.placement
    moves = []
    for expert, column in enumerate(choose(tokens_E, placement).tolist()):
        if column > 0:
            slot = int(placement.logical_to_physical_ER[expert, column])
            moves.append((expert, slot // placement.slots_per_rank, int(tokens_E[expert])))
    return moves


@pytest.mark.parametrize("method", METHODS)
@given(SEEDS)
@settings(max_examples=250)
def test_the_kernel_is_the_reference(method, seed):
    tokens_FE, slots, rules = random_case(seed)
    found = schedule(tokens_FE, slots, rules, method)
    tokens_E, q = tokens_FE.sum(0).numpy(), rules.threshold_tokens
    content_SD, idle_SD = slots.content_SD.numpy(), slots.idle_SD.numpy()
    is_few = bool(tokens_E.any()) and reference.is_memory_bound(tokens_E, rules.knee_tokens, q)
    assert (found.outcome is Outcome.MEMORY_BOUND) == is_few
    if is_few:
        moves = chosen_by_metro(tokens_FE, found)
    elif method is Method.HARMOENY:
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
    actual = found.slots.content_SD, found.slots.idle_SD, found.fetch_SD
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
        is_few = found.outcome is Outcome.MEMORY_BOUND
        assert is_few or max(loads(found)) <= max(before)
        if found.outcome in (Outcome.BALANCED, Outcome.UNPAID):
            assert loads(found) == before


@given(SEEDS)
@settings(max_examples=300)
def test_no_rank_ends_later_than_the_busiest_at_home_with_the_time_of_its_fetches(seed):
    tokens_FE, slots, rules = random_case(seed)
    rules = replace(rules, fetch_tokens=rules.threshold_tokens, knee_tokens=0.0)
    found = schedule(tokens_FE, slots, rules)
    fetches_S = (found.fetch_SD >= 0).sum(1).tolist()
    for load, fetches in zip(loads(found), fetches_S, strict=True):
        assert load + rules.fetch_tokens * fetches <= max(home_loads(tokens_FE, slots.num_ranks))


@pytest.mark.parametrize("method", METHODS)
@given(SEEDS)
@settings(max_examples=200)
def test_what_is_fetched_is_computed_with(method, seed):
    """HarMoEny's own schedule gives it at least the threshold, all others at least a token."""
    tokens_FE, slots, rules = random_case(seed)
    least = rules.threshold_tokens if method is Method.HARMOENY else 1
    found = schedule(tokens_FE, slots, rules, method)
    assert all(tokens >= least for tokens in fetched_tokens(found, slots))


def fetched_tokens(found: Schedule, slots: DynamicSlots) -> Iterator[int]:
    """Tokens of each fetched expert in the slot that it was fetched into."""
    for rank, d in zip(*torch.nonzero(found.fetch_SD >= 0, as_tuple=True), strict=True):
        expert = int(found.fetch_SD[rank, d])
        slot = int(rank) * found.placement.slots_per_rank
        slot += slots.num_logical // slots.num_ranks + int(d)
        column = found.placement.logical_to_physical_ER[expert].tolist().index(slot)
        yield int(found.plan.split_ER[expert, column])
