"""Policies with dynamic slots: registered by name, and their schedules are what `assign` does."""

import numpy as np
import pytest
import torch
from cases import draw_topk, popularity
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_balance.kernels.assign import assign
from vllm_balance.kernels.rebalance import Rules, count
from vllm_balance.kernels.record import Counter, counters_size, tokens_slice
from vllm_balance.metrics import add_plan
from vllm_balance.routing import FETCHING, ROUTING
from vllm_balance.types import Demand, DynamicSlots, Outcome

COSTS = st.sampled_from([0, 5, 4])
"""Time of a fetch in tokens; a server's is the threshold, 4 here."""


def batches(seed: int, num_experts: int, number: int) -> list[torch.Tensor]:
    """Ids [T, K] whose popular experts change from batch to batch."""
    rng = np.random.default_rng(seed)
    return [
        torch.from_numpy(draw_topk(int(rng.integers(0, 200)), 2, popularity(num_experts, 1.5, rng),
                                   rng))
        for _ in range(number)
    ]  # fmt: skip


def test_policies_are_found_by_their_names_and_are_not_those_without_slots():
    assert {name: policy.name for name, policy in FETCHING.items()} == {n: n for n in FETCHING}
    assert not set(FETCHING) & set(ROUTING)
    assert all(policy.counts_decide for policy in FETCHING.values())


@pytest.mark.parametrize("name", FETCHING)
@given(st.integers(0, 2**32 - 1), COSTS)
@settings(max_examples=25)
def test_every_pair_goes_to_a_slot_that_holds_its_expert_batch_after_batch(name, seed, cost):
    policy = FETCHING[name](Rules(threshold_tokens=4, fetch_tokens=cost, knee_tokens=2.0))
    slots = DynamicSlots.empty(num_logical=12, num_ranks=3, num_dynamic=2)
    for ids_TK in batches(seed, 12, 6):
        demand = Demand(tokens_E=count(ids_TK, 12))
        found = policy.schedule(demand, slots)
        table_ER = found.placement.logical_to_physical_ER
        slots_TK = assign(ids_TK, found.plan.split_ER, table_ER)
        assert torch.equal(
            found.placement.physical_to_logical_P[slots_TK.flatten().long()], ids_TK.flatten()
        )
        counters = torch.zeros(counters_size(3), dtype=torch.int64)
        add_plan(counters, found.plan, found.placement)
        rank_N = slots_TK.flatten() // found.placement.slots_per_rank
        tokens_S = torch.bincount(rank_N, minlength=3)
        assert torch.equal(counters[tokens_slice(3)], tokens_S)
        assert counters[Counter.PAIRS] == ids_TK.numel()
        slots = found.slots


@pytest.mark.parametrize("name", FETCHING)
@given(st.integers(0, 2**32 - 1), COSTS)
@settings(max_examples=25)
def test_ranks_that_see_their_own_tokens_agree_with_the_whole_batch(name, seed, cost):
    """Data parallel: each rank maps its part by the same schedule and the tokens before it."""
    policy = FETCHING[name](Rules(threshold_tokens=4, fetch_tokens=cost))
    slots = DynamicSlots.empty(num_logical=12, num_ranks=3, num_dynamic=2)
    parts = batches(seed, 12, 3)
    tokens_SE = torch.stack([count(part, 12) for part in parts])
    tokens_E = tokens_SE.sum(0, dtype=torch.int32)
    found = policy.schedule(Demand(tokens_E=tokens_E, tokens_SE=tokens_SE), slots)
    table_ER = found.placement.logical_to_physical_ER
    whole = assign(torch.cat(parts), found.plan.split_ER, table_ER)
    mapped = [
        assign(part, found.plan.split_ER, table_ER, tokens_SE[:rank].sum(0, dtype=torch.int32))
        for rank, part in enumerate(parts)
    ]
    assert torch.equal(torch.cat(mapped), whole)


def test_harmoeny_evens_out_what_static_leaves_and_shadow_needs_a_reason():
    tokens_E = torch.tensor([600, 0, 0, 0, 100, 100, 100, 100], dtype=torch.int32)
    demand, rules = Demand(tokens_E=tokens_E), Rules(threshold_tokens=50, fetch_tokens=0)
    slots = DynamicSlots.empty(num_logical=8, num_ranks=2, num_dynamic=1)
    found = FETCHING["harmoeny"](rules).schedule(demand, slots)
    assert found.plan.split_ER[0].tolist() == [500, 100] and found.outcome is Outcome.FETCHED
    rarely = Rules(threshold_tokens=10, fetch_tokens=0)
    shadowed = FETCHING["shadow"](rarely).schedule(demand, slots)
    assert shadowed.fetch_SD.tolist() == [[-1], [-1]], "half of 600 and 400 are more than 600"
    even = FETCHING["even_split"](rules).schedule(demand, slots)
    assert even.fetch_SD.tolist() == [[4], [0]]
    assert even.plan.split_ER[0].tolist() == [300, 300]
    assert even.plan.split_ER[4].tolist() == [50, 50]
