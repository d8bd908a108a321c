"""Placement by affinity: known structure is found, equal shares, refusals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from vllm_balance.cost import CostModel
from vllm_balance.errors import BalancerError
from vllm_balance.placement import TRACED, Cluster
from vllm_balance.placement.exflow import ExflowPlacement, affinities
from vllm_balance.traces import Trace

ONE = CostModel(a_us=0, b_us=0, c_us=0, beta_us=1)


def affinity_kept(affinity_LEE, placement_LP, num_ranks):
    """Share of the affinity whose two experts are on one rank, 0 to 1."""
    num_experts = placement_LP.shape[1]
    rank_LE = np.empty_like(placement_LP)
    rank_P = np.arange(num_experts) // (num_experts // num_ranks)
    for slots_P, rank_E in zip(placement_LP, rank_LE, strict=True):
        rank_E[slots_P] = rank_P
    same_LEE = rank_LE[:-1, :, None] == rank_LE[1:, None, :]
    total = affinity_LEE.sum()
    return float((affinity_LEE * same_LEE).sum() / total) if total else 1.0


def cluster(num_ranks: int, num_redundant: int = 0) -> Cluster:
    return Cluster(costs=(ONE,) * num_ranks, num_redundant=num_redundant)


def trace_of(ids_TLK: np.ndarray, num_experts: int) -> Trace:
    return Trace(
        name="t",
        num_experts=num_experts,
        top_k=ids_TLK.shape[2],
        layer_index_L=np.arange(ids_TLK.shape[1]),
        topk_ids_TLK=ids_TLK,
    )


def random_trace(seed: int, tokens: int = 300, layers: int = 3, experts: int = 4) -> Trace:
    rng = np.random.default_rng(seed)
    order_TLE = rng.permuted(np.tile(np.arange(experts), (tokens, layers, 1)), axis=2)
    return trace_of(order_TLE[..., :2], experts)


def chains(num_experts: int, layers: int, seed: int) -> Trace:
    """Every expert is always followed by one other: all affinity can be kept."""
    rng = np.random.default_rng(seed)
    next_LE = [rng.permutation(num_experts) for _ in range(layers)]
    first_T = rng.integers(0, num_experts, 500)
    return trace_of(np.stack([n[first_T] for n in next_LE], 1)[..., None], num_experts)


def test_affinity_counts_tokens_that_use_both():
    ids_TLK = np.array([[[0, 1], [2, 0]], [[0, 2], [2, 1]], [[1, 2], [0, 1]]])
    assert affinities(trace_of(ids_TLK, 3))[0].tolist() == [[1, 1, 2], [2, 1, 1], [1, 2, 1]]


@pytest.mark.parametrize(("experts", "ranks", "layers"), [(8, 2, 5), (12, 4, 4), (6, 6, 3)])
def test_chains_of_experts_are_kept_whole(experts, ranks, layers):
    trace = chains(experts, layers, experts)
    found_LP = ExflowPlacement().place_trace(trace, cluster(ranks))
    assert found_LP.shape == (layers, experts) and found_LP.dtype == np.int32
    assert (np.sort(found_LP, 1) == np.arange(experts)).all()
    assert affinity_kept(affinities(trace), found_LP, ranks) == 1.0
    assert np.array_equal(found_LP, ExflowPlacement().place_trace(trace, cluster(ranks)))


@pytest.mark.parametrize("seed", range(4))
def test_small_models_come_near_the_best_placement(seed):
    """All 6 x 6 x 6 placements of three layers with four experts on two ranks."""
    trace = random_trace(seed)
    affinity_LEE = affinities(trace)
    halves = [[*a, *(e for e in range(4) if e not in a)]
              for a in itertools.combinations(range(4), 2)]  # fmt: skip
    best = max(
        affinity_kept(affinity_LEE, np.array(way), 2) for way in itertools.product(halves, repeat=3)
    )
    found = affinity_kept(affinity_LEE, ExflowPlacement().place_trace(trace, cluster(2)), 2)
    assert 0.99 * best <= found <= best


def test_without_time_it_is_linear_and_one_rank_keeps_everything():
    trace = random_trace(1, experts=8)
    hasty_LP = ExflowPlacement(time_limit_s=1e-9).place_trace(trace, cluster(4))
    assert hasty_LP.tolist() == [list(range(8))] * 3
    alone_LP = ExflowPlacement().place_trace(trace, cluster(1))
    assert affinity_kept(affinities(trace), alone_LP, 1) == 1.0


def test_layers_are_reported_once():
    seen: list[int] = []
    ExflowPlacement().place_trace(random_trace(2), cluster(2), seen.append)
    assert seen == [0, 1, 2]


def test_what_it_cannot_use_is_refused():
    counts = Trace(
        name="c",
        num_experts=4,
        top_k=2,
        layer_index_L=np.arange(2),
        counts_NLE=np.ones((3, 2, 4), np.int64),
    )
    with pytest.raises(BalancerError, match="only counts"):
        TRACED["exflow"]().place_trace(counts, cluster(2))
    with pytest.raises(BalancerError, match="one layer"):
        ExflowPlacement().place_trace(random_trace(0, layers=1), cluster(2))
    with pytest.raises(BalancerError, match="one copy"):
        ExflowPlacement().place_trace(random_trace(0), cluster(2, num_redundant=2))
    with pytest.raises(BalancerError, match="do not divide"):
        ExflowPlacement().place_trace(random_trace(0), cluster(3))
