"""What a placement costs on recorded steps, and what no placement can beat.

The score of one layer is the sum over steps of the slowest rank's modelled time, in microseconds:
the objective that GEM's placement minimises (arXiv 2605.19945; the form is inferred, see
docs/placement.md).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from vllm_balance.cost import CostModel
from vllm_balance.placement.policy import Cluster

Array = np.ndarray[Any, np.dtype[Any]]
Split = Literal["even", "one"]
"""How the routing divides an expert's tokens over its replicas: evenly, or all to one of them."""


def score_L(
    history_NLE: Array, placement_LP: Array, cluster: Cluster, split: Split = "even"
) -> Array:
    """Score of each layer, microseconds [L].

    Args:
        history_NLE: pairs of each expert in each step, integers [N, L, E].
        placement_LP: expert of each slot, [L, P].
        split: "even" spreads an expert's tokens over its replicas; with fewer tokens than
            replicas, a replica counts as activated in the share of steps in which it gets one.
            "one" sends them, heaviest expert first, to the replica whose rank then ends first.
    """
    times = step_times if split == "even" else step_times_with_one
    return np.array(
        [
            times(history_NLE[:, layer], slots_P, cluster).max(1).sum()
            for layer, slots_P in enumerate(placement_LP)
        ]
    )


def step_times_with_one(history_NE: Array, slots_P: Array, cluster: Cluster) -> Array:
    """`step_times` if each expert is served by one replica: the one whose rank then ends first."""
    num_experts, slots = history_NE.shape[1], len(slots_P) // cluster.num_ranks
    ranks_of = [np.flatnonzero(slots_P == expert) // slots for expert in range(num_experts)]
    times_NS = np.zeros((len(history_NE), cluster.num_ranks))
    for step, tokens_E in enumerate(history_NE):
        experts: list[list[int]] = [[] for _ in range(cluster.num_ranks)]
        order = np.argsort(-tokens_E.astype(np.int64), kind="stable")
        order = order[tokens_E[order] > 0]
        for expert in (*filter(lambda e: len(ranks_of[e]) == 1, order),
                       *filter(lambda e: len(ranks_of[e]) > 1, order)):  # fmt: skip
            after = [
                cluster.costs[rank].of_experts(tokens_E[[*experts[rank], expert]])
                for rank in ranks_of[expert]
            ]
            experts[ranks_of[expert][int(np.argmin(after))]].append(expert)
        times_NS[step] = [
            cost.of_experts(tokens_E[held])
            for cost, held in zip(cluster.costs, experts, strict=True)
        ]
    return times_NS


def step_times(history_NE: Array, slots_P: Array, cluster: Cluster) -> Array:
    """Modelled time of each rank in each step of one layer, microseconds [N, S]."""
    num_replicas_E = np.bincount(slots_P, minlength=history_NE.shape[1])
    shape_NSP = (len(history_NE), cluster.num_ranks, -1)
    tokens_NP = (history_NE / num_replicas_E)[:, slots_P]
    active_NS = np.minimum(tokens_NP, 1).reshape(shape_NSP).sum(2)
    tokens_NS = tokens_NP.reshape(shape_NSP).sum(2)
    times = [
        cost.time_us(
            active_NS[:, rank],
            tokens_NS[:, rank],
            cost.further(tokens_NP).reshape(shape_NSP)[:, rank].sum(1),
        )
        for rank, cost in enumerate(cluster.costs)
    ]
    return np.stack(times, axis=1)


def lower_bound_L(history_NLE: Array, cluster: Cluster) -> Array:
    """Time that no placement of each layer can beat, summed over steps, microseconds [L].

    Per step the largest of three bounds: the time at which all ranks together have room for the
    step's tokens and activated experts if both could be divided freely, within the slots of a
    rank; the time at which they have room for the experts' own work, each expert on the rank that
    is fastest for it; and, without redundant experts, the largest expert alone.
    """
    num_experts = history_NLE.shape[2]
    slots = cluster.num_physical(num_experts) // cluster.num_ranks
    tokens_NL = history_NLE.sum(2, dtype=np.int64)
    active_NL = (history_NLE > 0).sum(2)
    bound_NL = _room(tokens_NL, active_NL, slots, cluster)
    bound_NL = np.maximum(bound_NL, _room_for_work(history_NLE, cluster))
    if not cluster.num_redundant:
        largest_NL = history_NLE.max(2)
        alone = [
            cost.time_us(largest_NL > 0, largest_NL, cost.further(largest_NL))
            for cost in cluster.costs
        ]
        bound_NL = np.maximum(bound_NL, np.min(alone, axis=0))
    return np.asarray(bound_NL.sum(0))


def _room_for_work(history_NLE: Array, cluster: Cluster) -> Array:
    """Least time in which the ranks have room for what the experts cost one by one, [N, L].

    Of the piece that waits for weights, and of both where experts run in turn. If a rank is sigma
    times as slow as another, it has room for 1 / sigma of its work; an expert counts with its least
    work on any rank, and if it may be divided over replicas with the least work per token.
    """
    works = []
    for cost in cluster.costs:
        work_NLE = cost.b_us * (history_NLE > 0) + cost.tile_us * cost.further(history_NLE)
        if cost.in_turn:
            work_NLE = work_NLE + cost.beta_us * history_NLE
        if cluster.num_redundant:
            work_NLE = np.minimum(work_NLE, history_NLE * _least_per_token_us(cost))
        works.append(work_NLE)
    slowness_S = np.array([work.sum() for work in works], dtype=np.float64)
    if not slowness_S.all():
        return np.zeros(history_NLE.shape[:2])
    slowness_S /= slowness_S.mean()
    least_NLE = np.min([w / s for w, s in zip(works, slowness_S, strict=True)], axis=0)
    work_NL = least_NLE.sum(2)
    # Ranks fill up from the one with the least fixed time on: time = (work + fixed) / speed.
    order = np.argsort([cost.a_us for cost in cluster.costs])
    fixed_S = np.array([cluster.costs[s].a_us for s in order])
    speed_S = 1 / slowness_S[order]
    candidates = (work_NL[..., None] + np.cumsum(fixed_S * speed_S)) / np.cumsum(speed_S)
    return np.where(work_NL > 0, candidates.min(-1), 0.0)


def _least_per_token_us(cost: CostModel) -> float:
    """Lower bound of an expert's work per token, however its tokens are divided."""
    if cost.tile_tokens is None:
        return 0.0
    least = min(cost.tile_us / cost.tile_tokens, cost.b_us / cost.free)
    return least + cost.beta_us if cost.in_turn else least


def _room(tokens_NL: Array, active_NL: Array, slots: int, cluster: Cluster) -> Array:
    """Least time in which the ranks have room for tokens and experts, from below, [N, L]."""
    costs = cluster.costs
    a_S, b_S = (np.array([getattr(c, name) for c in costs]) for name in ("a_us", "b_us"))
    c_S, beta_S = (np.array([getattr(c, name) for c in costs]) for name in ("c_us", "beta_us"))
    low_NL = np.zeros(tokens_NL.shape)
    most = np.maximum(tokens_NL.max(), 1)
    everything = max(float(c.time_us(active_NL.max(), most)) for c in costs)
    high_NL = np.full(tokens_NL.shape, 2.0 * everything + 1.0)
    for _ in range(60):
        time_NL1 = ((low_NL + high_NL) / 2)[..., None]
        with np.errstate(divide="ignore", invalid="ignore"):
            experts_NLS = np.where(time_NL1 >= a_S, (time_NL1 - a_S) / b_S, 0.0)
            pairs_NLS = np.where(time_NL1 >= c_S, (time_NL1 - c_S) / beta_S, 0.0)
        experts_NLS = np.minimum(np.nan_to_num(experts_NLS, nan=slots, posinf=slots), slots)
        if not cluster.num_redundant:
            experts_NLS = np.floor(experts_NLS + 1e-9)
        pairs_NLS = np.nan_to_num(pairs_NLS, nan=np.inf, posinf=np.inf)
        fits_NL = (experts_NLS.sum(2) >= active_NL - 1e-9) & (pairs_NLS.sum(2) >= tokens_NL - 1e-9)
        high_NL = np.where(fits_NL, time_NL1[..., 0], high_NL)
        low_NL = np.where(fits_NL, low_NL, time_NL1[..., 0])
    return np.where(tokens_NL > 0, low_NL, 0.0)
