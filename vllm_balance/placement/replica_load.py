"""Times of a placement with replicas, compiled. Import this inside a call: it imports numba.

A placement of one layer is `content_P`, the expert of each slot; slots of a rank are consecutive.
"""

# Compiled functions carry no annotations, as those in kernels/.
# mypy: ignore-errors

from __future__ import annotations

import numpy as np

from vllm_balance.placement.swap_search import compiled, num_further, rank_time

EVEN, ONE = 0, 1
"""Tokens of an expert spread evenly over its replicas, or all to the one that ends first."""


@compiled
def add(load_S3, s, tokens, coefficient_8, sign=1.0):
    """Adds a slot's tokens, which may be a fraction, to (activated, tokens, further) of a rank."""
    load_S3[s, 0] += sign * min(1.0, tokens)
    load_S3[s, 1] += sign * tokens
    beyond = max(tokens - coefficient_8[6], 0.0)
    if coefficient_8[5] > 1.0:
        beyond = np.ceil(beyond / coefficient_8[5])
    if coefficient_8[5] > 0.0:
        load_S3[s, 2] += sign * beyond


@compiled
def serve_with_one(tokens, slots_R, num_replicas, slots_per_rank, coefficient_S8, load_S3):
    """Gives all tokens of an expert to the replica whose rank then has the least time."""
    best, best_time = -1, np.inf
    for r in range(num_replicas):
        s = slots_R[r] // slots_per_rank
        time = rank_time(
            coefficient_S8[s],
            load_S3[s, 0] + 1.0,
            load_S3[s, 1] + tokens,
            load_S3[s, 2] + num_further(tokens, coefficient_S8[s]),
        )
        if time < best_time:
            best, best_time = s, time
    add(load_S3, best, float(tokens), coefficient_S8[best])


@compiled
def step_time(tokens_E, heaviest_E, slots_EP, num_replicas_E, coefficient_S8, split, load_S3):
    """Time of the slowest rank in one step; leaves the loads of the ranks in load_S3."""
    num_ranks = len(coefficient_S8)
    slots_per_rank = slots_EP.shape[1] // num_ranks
    load_S3[:] = 0.0
    for e in range(len(tokens_E)):
        replicas = num_replicas_E[e]
        if tokens_E[e] > 0 and (split == EVEN or replicas == 1):
            for r in range(replicas):
                s = slots_EP[e, r] // slots_per_rank
                add(load_S3, s, tokens_E[e] / replicas, coefficient_S8[s])
    if split == ONE:
        for place in range(len(tokens_E)):
            e = heaviest_E[place]
            if tokens_E[e] == 0:
                break
            if num_replicas_E[e] > 1:
                serve_with_one(
                    tokens_E[e],
                    slots_EP[e],
                    num_replicas_E[e],
                    slots_per_rank,
                    coefficient_S8,
                    load_S3,
                )
    slowest = 0.0
    for s in range(num_ranks):
        time = rank_time(coefficient_S8[s], load_S3[s, 0], load_S3[s, 1], load_S3[s, 2])
        slowest = max(slowest, time)
    return slowest


@compiled
def index(content_P, slots_EP, num_replicas_E):
    """Fills the slots of each expert, in slot order, from the content of the slots."""
    num_replicas_E[:] = 0
    for p in range(len(content_P)):
        e = content_P[p]
        slots_EP[e, num_replicas_E[e]] = p
        num_replicas_E[e] += 1


@compiled
def replica_score(tokens_NE, heaviest_NE, content_P, coefficient_S8, split, limit, room):
    """Score of a placement; inf as soon as it passes `limit`. `room` is scratch memory."""
    slots_EP, num_replicas_E, load_S3 = room
    index(content_P, slots_EP, num_replicas_E)
    score = 0.0
    for n in range(len(tokens_NE)):
        score += step_time(
            tokens_NE[n], heaviest_NE[n], slots_EP, num_replicas_E, coefficient_S8, split, load_S3
        )
        if score >= limit:
            return np.inf
    return score


@compiled
def changed_score(problem, change_M4, pair, limit, kept, load_S3):
    """Score after changes of even shares, up to rounding; inf as soon as it passes limit.

    `pair` are the two ranks of a swap, (-1, -1) if more may change; `remember` fills `kept`.
    """
    tokens_NE, _, coefficient_S8, _ = problem
    load_NS3, time_NS, _, left_N, gain_SN = kept
    s, t = pair
    score = 0.0
    for n in range(len(tokens_NE)):
        if s >= 0 and score + left_N[n] - gain_SN[s, n] - gain_SN[t, n] >= limit:
            return np.inf
        for rank, _, _, _ in change_M4:
            load_S3[rank] = load_NS3[n, rank]
        for rank, e, replicas, sign in change_M4:
            if tokens_NE[n, e] > 0:
                tokens = tokens_NE[n, e] / replicas
                add(load_S3, rank, tokens, coefficient_S8[rank], sign)
        slowest = 0.0
        for other in range(len(coefficient_S8)):
            time = time_NS[n, other]
            if time > slowest and not (change_M4[:, 0] == other).any():
                slowest = time
        for rank, _, _, _ in change_M4:
            load_3 = load_S3[rank]
            # Counts of a rank without tokens are rounding errors.
            if load_3[1] > 1e-9:
                time = rank_time(coefficient_S8[rank], load_3[0], load_3[1], load_3[2])
                slowest = max(slowest, time)
        score += slowest
        if score >= limit:
            return np.inf
    return score
