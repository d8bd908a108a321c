"""The choice of METRO: lambda exactly optimal, tokens as low as single shifts can make them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from cases import Case, draw_topk, place, popularity, random_case
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_balance.kernels.metro import choose, parallel_reference, reference
from vllm_balance.types import Placement


def shape(placement: Placement) -> tuple[np.ndarray, np.ndarray, int, int]:
    return (
        placement.logical_to_physical_ER.numpy(),
        placement.num_replicas_E.numpy(),
        placement.num_ranks,
        placement.num_physical,
    )


def chosen(tokens_E: np.ndarray, placement: Placement) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Choice, activated and tokens per rank; checks that the choice is one."""
    column_E = choose(torch.from_numpy(tokens_E), placement).numpy()
    table_ER, replicas_E, num_ranks, num_physical = shape(placement)
    assert column_E.dtype == np.int32
    assert ((column_E >= 0) == (tokens_E > 0)).all()
    assert (column_E < replicas_E).all()
    return column_E, *reference.loads(column_E, tokens_E, table_ER, num_ranks, num_physical)


def brute_force(tokens_E: np.ndarray, placement: Placement) -> tuple[int, int]:
    """Least lambda over all choices, and the least tokens on the busiest rank within it."""
    table_ER, replicas_E, num_ranks, num_physical = shape(placement)
    active = np.flatnonzero(tokens_E)
    best = (10**9, 10**9)
    for columns in itertools.product(*(range(replicas_E[expert]) for expert in active)):
        column_E = np.full(len(tokens_E), -1)
        column_E[active] = columns
        activated_S, tokens_S = reference.loads(
            column_E, tokens_E, table_ER, num_ranks, num_physical
        )
        best = min(best, (int(activated_S.max()), int(tokens_S.max())))
    return best


def tokens_of(case: Case) -> np.ndarray:
    return reference.count(
        case.topk_ids_TK, case.placement.num_logical, case.num_valid_tokens
    ).astype(np.int64)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_reference_is_optimal_by_brute_force(seed):
    rng = np.random.default_rng(seed)
    num_ranks = int(rng.integers(1, 5))
    num_experts = int(rng.integers(1, 8))
    least = -(-num_experts // num_ranks)
    slots = least + int((least + 1) * num_ranks - num_experts <= 6)
    placement = place(popularity(num_experts, 1.0, rng), slots * num_ranks, num_ranks, rng)
    tokens_E = rng.integers(0, 20, num_experts)
    if tokens_E.sum() == 0:
        assert reference.optimal_activated(tokens_E, *shape(placement)) == 0
        return
    activated, _ = brute_force(tokens_E, placement)
    assert reference.optimal_activated(tokens_E, *shape(placement)) == activated
    _, activated_S, _ = chosen(tokens_E, placement)
    assert activated_S.max() == activated


@settings(max_examples=600, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
@example(seed=0)
def test_activated_is_optimal(seed):
    case = random_case(seed, max_experts=48, max_tokens=40)
    tokens_E = tokens_of(case)
    _, activated_S, _ = chosen(tokens_E, case.placement)
    assert activated_S.max() == reference.optimal_activated(tokens_E, *shape(case.placement))


@settings(max_examples=400, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_gpu_algorithm_is_optimal_too(seed):
    case = random_case(seed, max_experts=48, max_tokens=40)
    tokens_E = tokens_of(case)
    arguments = shape(case.placement)
    column_E = parallel_reference.choose(tokens_E, *arguments)
    assert ((column_E >= 0) == (tokens_E > 0)).all()
    assert (column_E < arguments[1]).all()
    activated_S, _ = reference.loads(column_E, tokens_E, arguments[0], *arguments[2:])
    assert activated_S.max() == reference.optimal_activated(tokens_E, *arguments)


def can_shift(tokens_E, column_E, activated_S, tokens_S, placement) -> bool:
    """Whether one move or swap off the busiest rank helps without raising lambda."""
    table_ER, replicas_E, num_ranks, num_physical = shape(placement)
    ranks = reference.replica_ranks(table_ER, replicas_E, num_physical // num_ranks)
    at = {e: int(ranks[e][column_E[e]]) for e in np.flatnonzero(column_E >= 0)}
    busiest = int(np.argmax(tokens_S))
    limit = activated_S.max()
    for expert, rank in itertools.product([e for e in at if at[e] == busiest], range(num_ranks)):
        if rank == busiest or rank not in ranks[expert]:
            continue
        gains = [tokens_E[expert]] if activated_S[rank] < limit else []
        gains += [
            tokens_E[expert] - tokens_E[other]
            for other in at
            if at[other] == rank and busiest in ranks[other]
        ]
        if any(gain > 0 and tokens_S[rank] + gain < tokens_S[busiest] for gain in gains):
            return True
    return False


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_no_shift_lowers_the_busiest_rank(seed):
    case = random_case(seed, max_experts=24, max_tokens=30)
    tokens_E = tokens_of(case)
    column_E, activated_S, tokens_S = chosen(tokens_E, case.placement)
    assert not can_shift(tokens_E, column_E, activated_S, tokens_S, case.placement)


def test_busiest_rank_is_near_the_best_choice():
    """Over small cases the local search is on average within 2 % of the best possible tokens."""
    found, best = 0, 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        placement = place(popularity(6, 1.0, rng), 9, 3, rng)
        tokens_E = rng.integers(1, 30, 6)
        _, _, tokens_S = chosen(tokens_E, placement)
        found += tokens_S.max()
        best += brute_force(tokens_E, placement)[1]
    assert best <= found <= 1.02 * best


@pytest.mark.parametrize("num_ranks", [2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("redundancy", [1.0625, 1.125, 1.25, 1.5, 2.0])
@pytest.mark.parametrize("num_experts", [128, 256])
def test_optimal_on_serving_shapes(num_experts, redundancy, num_ranks):
    num_physical = -(-round(num_experts * redundancy) // num_ranks) * num_ranks
    rng = np.random.default_rng(num_experts * num_ranks)
    weights_E = popularity(num_experts, 0.8, rng)
    placement = place(weights_E, num_physical, num_ranks, rng)
    for num_tokens in (8, 32, 64, 256, 1024):
        ids_TK = draw_topk(num_tokens, 8, weights_E, rng)
        tokens_E = reference.count(ids_TK, num_experts, None)
        optimal = reference.optimal_activated(tokens_E, *shape(placement))
        _, activated_S, _ = chosen(tokens_E, placement)
        assert activated_S.max() == optimal
        gpu_E = parallel_reference.choose(tokens_E, *shape(placement))
        gpu_S, _ = reference.loads(
            gpu_E, tokens_E, placement.logical_to_physical_ER.numpy(), *shape(placement)[2:]
        )
        assert gpu_S.max() == optimal


def chain(num_ranks: int) -> tuple[Placement, np.ndarray]:
    """A placement on which the greedy needs an augmenting path over every rank.

    Expert i may run on ranks i and i + 1; one more expert only on the last rank, so every expert
    of the chain has to give way by one rank."""
    hosts = [[rank, rank + 1] for rank in range(num_ranks - 1)] + [[num_ranks - 1]]
    slots: list[list[int]] = [[] for _ in range(num_ranks)]
    for expert, ranks in enumerate(hosts):
        for rank in ranks:
            slots[rank].append(expert)
    filler = len(hosts)
    width = max(map(len, slots)) + 1
    for rank_slots in slots:
        while len(rank_slots) < width:
            rank_slots.append(filler)
            filler += 1
    placement = Placement.from_physical_to_logical(
        torch.tensor(slots).flatten(), num_logical=filler, num_ranks=num_ranks
    )
    tokens_E = np.zeros(filler, np.int64)
    tokens_E[: len(hosts)] = np.arange(1, len(hosts) + 1)
    return placement, tokens_E


@pytest.mark.parametrize("num_ranks", [2, 3, 16, 64, 100])
def test_long_augmenting_path(num_ranks):
    placement, tokens_E = chain(num_ranks)
    _, activated_S, _ = chosen(tokens_E, placement)
    assert activated_S.tolist() == [1] * num_ranks


def test_replicas_on_one_rank_do_not_help():
    """Two experts with both replicas on rank 0: lambda 2, whatever the number of replicas."""
    placement = Placement.from_physical_to_logical(
        torch.tensor([0, 0, 1, 1, 2, 3, 4, 5]), num_logical=6, num_ranks=2
    )
    column_E, activated_S, _ = chosen(np.array([5, 5, 0, 0, 0, 0]), placement)
    assert activated_S.tolist() == [2, 0]
    assert column_E.tolist() == [0, 0, -1, -1, -1, -1]


@pytest.mark.parametrize("tokens_E", [[0, 0, 0], [9, 0, 0], [1, 1, 1]])
def test_nothing_one_and_all(tokens_E):
    placement = Placement.from_physical_to_logical(
        torch.tensor([0, 1, 2, 0]), num_logical=3, num_ranks=2
    )
    _, activated_S, _ = chosen(np.array(tokens_E), placement)
    assert activated_S.max() == -(-sum(t > 0 for t in tokens_E) // 2)


def test_no_worse_than_the_paper_and_deterministic():
    for seed in range(50):
        case = random_case(seed)
        tokens_E = tokens_of(case)
        column_E, activated_S, _ = chosen(tokens_E, case.placement)
        again_E, _, _ = chosen(tokens_E.copy(), case.placement)
        greedy_E = reference.greedy_by_id(tokens_E, *shape(case.placement))
        greedy_S, _ = reference.loads(greedy_E, tokens_E, case.table_ER, *shape(case.placement)[2:])
        assert (column_E == again_E).all()
        assert activated_S.max() <= greedy_S.max()


def test_expert_without_slot_is_an_error():
    table = torch.tensor([[0, -1], [-1, -1]], dtype=torch.int32)
    placement = Placement(
        logical_to_physical_ER=table,
        num_replicas_E=torch.tensor([1, 1], dtype=torch.int32),
        num_ranks=2,
        num_physical=2,
    )
    with pytest.raises(ValueError, match="logical expert 1 has tokens but"):
        choose(torch.tensor([1, 1]), placement)
    assert choose(torch.tensor([1, 0]), placement).tolist() == [0, -1]
