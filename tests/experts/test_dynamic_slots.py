"""Slots follow their schedules: nothing double, nothing lost, every fetch counted once."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_balance.experts.dynamic_slots import LayerSlots
from vllm_balance.experts.prefetch import SyncPrefetch
from vllm_balance.kernels.rebalance import Eviction, Method, Rules, schedule
from vllm_balance.types import DynamicSlots

BYTES = 100


class Rank:
    """One rank's memory of a layer: which expert's weights each row really holds."""

    def __init__(self, rank: int, state: DynamicSlots) -> None:
        num_home = state.num_logical // state.num_ranks
        first = rank * num_home
        self.rows = [*range(first, first + num_home), *[-1] * state.num_dynamic]
        self.copies = 0
        self.slots = LayerSlots(
            layer=0, rank=rank, state=state, prefetch=SyncPrefetch(self.copy), expert_bytes=BYTES
        )

    def copy(self, copy) -> None:
        self.rows[copy.slot] = copy.expert
        self.copies += 1


def ranks_of(num_experts: int, num_ranks: int, num_dynamic: int) -> list[Rank]:
    state = DynamicSlots.empty(
        num_logical=num_experts, num_ranks=num_ranks, num_dynamic=num_dynamic
    )
    return [Rank(rank, state) for rank in range(num_ranks)]


def skewed(rng: np.random.Generator, num_experts: int) -> torch.Tensor:
    weights = rng.dirichlet(np.full(num_experts, 0.2))
    counts = rng.multinomial(int(rng.integers(0, 3000)), weights)
    return torch.from_numpy(counts.astype(np.int32))[None]


def check(found: list[Rank], plan) -> None:
    """What the placement says is what the rows hold, and every token has its expert's weights."""
    placement, per_rank = plan.placement, plan.placement.slots_per_rank
    for rank, each in enumerate(found):
        content = placement.physical_to_logical_P[rank * per_rank : (rank + 1) * per_rank]
        assert content.tolist() == each.rows
        present = [expert for expert in each.rows if expert >= 0]
        assert len(set(present)) == len(present), "one rank holds an expert twice"
    table_ER, split_ER = placement.logical_to_physical_ER, plan.plan.split_ER
    for expert, column in (split_ER > 0).nonzero().tolist():
        slot = int(table_ER[expert, column])
        assert found[slot // per_rank].rows[slot % per_rank] == expert
    assert set(range(placement.num_logical)) <= {e for each in found for e in each.rows}


@given(
    st.integers(0, 2**20),
    st.sampled_from([(8, 2, 2), (12, 3, 2), (12, 4, 5), (32, 4, 3)]),
    st.sampled_from(list(Method)),
    st.sampled_from(list(Eviction)),
)
def test_no_double_booking_and_no_lost_expert(seed, shape, method, eviction):
    rng = np.random.default_rng(seed)
    found = ranks_of(*shape)
    rules = Rules(
        threshold_tokens=3,
        fetch_tokens=int(rng.choice([0, 5, 3])),
        knee_tokens=float(rng.choice([0, 4])),
        eviction=eviction,
    )
    for _ in range(12):
        counts_FE = skewed(rng, shape[0])
        for is_guess in (True, False) if rng.random() < 0.4 else (False,):
            asked = skewed(rng, shape[0]) if is_guess else counts_FE
            plan = schedule(asked, found[0].slots.state, rules, method)
            for each in found:
                each.slots.follow(plan, is_guess=is_guess)
        assert plan.plan.split_ER.sum(1).tolist() == counts_FE[0].tolist()
        check(found, plan)
        serving = set(plan.placement.logical_to_physical_ER[plan.plan.split_ER > 0].tolist())
        for rank, each in enumerate(found):
            per_rank, home = plan.placement.slots_per_rank, each.slots.num_home
            own = {slot - rank * per_rank for slot in serving if slot // per_rank == rank}
            all_under_way = SimpleNamespace(pending=lambda layer: {*range(64)})
            waited_for = replace(each.slots, prefetch=all_under_way).pending()
            assert waited_for == {slot for slot in own if slot >= home}
    for each in found:
        status = each.slots.status()
        assert status["fetches"] + status["early_fetches"] == each.copies
        assert status["fetched_bytes"] == each.copies * BYTES
        assert status["wasted_bytes"] <= status["fetched_bytes"]
        assert status["early_hits"] <= status["early_fetches"]
        held = sum(expert >= 0 for expert in each.rows[each.slots.num_home :])
        assert status["evictions"] == each.copies - held
        schedules = [value for name, value in status.items() if name.endswith("_schedules")]
        assert sum(schedules) == 12


def one_hot(expert: int, num_experts: int = 8, tokens: int = 1000) -> torch.Tensor:
    counts = torch.full((1, num_experts), 10, dtype=torch.int32)
    counts[0, expert] = tokens
    return counts


@pytest.mark.parametrize("fetch_tokens", [0, 5])
def test_a_hot_expert_is_fetched_once_and_a_wrong_guess_is_wasted_bytes(fetch_tokens):
    rank = ranks_of(8, 2, 2)[1]
    rules = Rules(threshold_tokens=5, fetch_tokens=fetch_tokens)

    def follow(counts_FE: torch.Tensor, *, is_guess: bool = False) -> None:
        rank.slots.follow(schedule(counts_FE, rank.slots.state, rules), is_guess=is_guess)

    for _ in range(5):
        follow(one_hot(0))
    status = rank.slots.status()
    assert (status["fetches"], status["hits"], status["evictions"]) == (1, 4, 0)
    follow(one_hot(1), is_guess=True)
    follow(one_hot(1))
    status = rank.slots.status()
    assert (status["fetches"], status["early_fetches"], status["early_hits"]) == (1, 1, 1)
    assert status["wasted_bytes"] == 0
    # A guess brings expert 2 in place of 0, which was computed with.
    follow(one_hot(2), is_guess=True)
    follow(one_hot(2, tokens=10))
    assert rank.rows[4:] == [2, 1]
    assert rank.slots.status()["wasted_bytes"] == 0, "it may still be of use"
    # Expert 0 overwrites it unused; from then on each fetch is for the batch itself.
    for expert in (0, 2, 3) * 3:
        follow(one_hot(expert))
    status = rank.slots.status()
    assert (status["fetches"], status["early_fetches"]) == (1 + 9, 1 + 1)
    assert status["wasted_bytes"] == BYTES
    rank.slots.reset()
    assert not any(Counter(rank.slots.status()).values())
    assert sum(expert >= 0 for expert in rank.rows[4:]) == 2, "slots stay as they are"


def test_a_guess_is_no_batch_for_what_is_least_recently_used():
    """Rank 1 used expert 0 in the last batch and expert 1 in the one before. A guess that needs
    expert 1 again makes neither older or younger: what comes next overwrites expert 1."""
    rules = Rules(threshold_tokens=5, fetch_tokens=5)
    rank = ranks_of(8, 2, 2)[1]

    def follow(expert: int, *, is_guess: bool = False) -> None:
        plan = schedule(one_hot(expert), rank.slots.state, rules)
        rank.slots.follow(plan, is_guess=is_guess)

    follow(1)
    follow(0)
    assert rank.rows[4:] == [1, 0]
    before_SD = rank.slots.state.idle_SD
    for _ in range(3):
        follow(1, is_guess=True)
    assert torch.equal(rank.slots.state.idle_SD, before_SD)
    follow(2, is_guess=True)
    assert rank.rows[4:] == [2, 0]
    assert rank.slots.state.idle_SD[1].tolist() == [0, 0], "fetched just now, used just now"


def test_a_slot_is_never_overwritten_while_its_layer_computes():
    rank = ranks_of(8, 2, 2)[1]
    plan = schedule(one_hot(0), rank.slots.state, Rules(threshold_tokens=5, fetch_tokens=5))
    with rank.slots.computing(), pytest.raises(RuntimeError, match="while it computes"):
        rank.slots.follow(plan)
    assert rank.copies == 0
    rank.slots.follow(plan)
    assert rank.copies == 1
