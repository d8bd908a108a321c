"""Counters from a plan are those that the recording kernel counts from the assigned ids."""

import math

import pytest
import torch
from cases import planned, random_case
from hypothesis import given
from hypothesis import strategies as st

from vllm_balance.kernels.assign import assign
from vllm_balance.kernels.record import Counter, Regime, counters_size, record
from vllm_balance.metrics import add_plan, layer_metrics, total
from vllm_balance.routing.eplb import EplbRouting
from vllm_balance.routing.metro import MetroRouting
from vllm_balance.types import Plan


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 2.0, math.inf, None]))
def test_add_plan_equals_record_on_the_assigned_ids(seed, knee):
    case = random_case(seed)
    placement, ids_TK = case.placement, torch.from_numpy(case.topk_ids_TK)
    ids = ids_TK.flatten().long()
    tokens_E = torch.bincount(ids[ids >= 0], minlength=placement.num_logical).to(torch.int32)
    policy = EplbRouting() if knee is None else MetroRouting(knee)
    plan = Plan(split_ER=planned(policy, tokens_E, placement))
    slots_TK = assign(ids_TK, plan.split_ER, placement.logical_to_physical_ER)
    is_split = bool(((plan.split_ER > 0).sum(1) > 1).any())

    counted = torch.full((counters_size(placement.num_ranks),), 7, dtype=torch.int64)
    recorded = counted.clone()
    record(
        slots_TK,
        num_physical=placement.num_physical,
        num_ranks=placement.num_ranks,
        load_P=None,
        record_enabled=None,
        num_valid_tokens=None,
        counters=recorded,
        regime=Regime.COMPUTE_BOUND if is_split else Regime.MEMORY_BOUND,
    )
    add_plan(counted, plan, placement)
    assert torch.equal(counted, recorded)
    batches = counted[: Counter.EMPTY_BATCHES + 1] - 7
    assert batches.sum() == 1


def test_an_empty_plan_counts_as_an_empty_batch_and_nothing_else():
    placement = random_case(1).placement
    counters = torch.zeros(counters_size(placement.num_ranks), dtype=torch.int64)
    nothing = Plan(split_ER=torch.zeros_like(placement.logical_to_physical_ER))
    add_plan(counters, nothing, placement)
    assert counters[Counter.EMPTY_BATCHES] == 1
    assert counters.sum() == 1


@pytest.mark.parametrize("regime", list(Regime))
def test_a_regime_that_is_given_counts_and_an_empty_batch_has_none(regime):
    placement = random_case(1).placement
    split_ER = torch.zeros_like(placement.logical_to_physical_ER)
    for tokens, kind in ((1, regime), (0, Counter.EMPTY_BATCHES)):
        split_ER[:, 0] = tokens
        counters = torch.zeros(counters_size(placement.num_ranks), dtype=torch.int64)
        add_plan(counters, Plan(split_ER=split_ER), placement, regime)
        kinds = counters[: Counter.EMPTY_BATCHES + 1].tolist()
        assert kinds == [counter == kind for counter in range(Counter.EMPTY_BATCHES + 1)]


def test_layer_metrics_names_every_counter():
    counters = torch.arange(100, 100 + counters_size(3))
    named = layer_metrics(counters, 3)
    assert named == {
        "memory_bound_batches": 100,
        "compute_bound_batches": 101,
        "empty_batches": 102,
        "max_activated_sum": 103,
        "max_tokens_sum": 104,
        "pairs": 105,
        "activated_sum": 106,
        "activated_per_rank": [107, 108, 109],
        "tokens_per_rank": [110, 111, 112],
    }


def test_total_sums_values_and_lists():
    layers = [{"a": 1, "b": [1, 2]}, {"a": 10, "b": [10, 20]}, {"a": 0.5, "b": [0, 0]}]
    assert total(layers) == {"a": 11.5, "b": [11, 22]}
    assert layers[0] == {"a": 1, "b": [1, 2]}
