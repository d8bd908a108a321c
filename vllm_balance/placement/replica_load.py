"""Times of a placement with replicas, compiled. Import this inside a call: it imports numba.

A placement of one layer is `content_P`, the expert of each slot; slots of a rank are consecutive.
Loads of a rank are (activated, tokens, further tiles), steps last, so that loops over steps become
vector instructions.
"""

# Compiled functions carry no annotations, as those in kernels/.
# mypy: ignore-errors

from __future__ import annotations

import numpy as np

from vllm_balance.placement.swap_search import compiled, rank_time

EVEN, ONE = 0, 1
"""Tokens of an expert spread evenly over its replicas, or all to the one that ends first."""


@compiled
def further_of(tokens, coefficient_8):
    """`CostModel.further` of one slot, whose tokens may be a fraction."""
    tile, beyond = coefficient_8[5], max(tokens - coefficient_8[6], 0.0)
    if tile > 1.0:
        return np.ceil(beyond / tile)
    return beyond if tile > 0.0 else 0.0


@compiled
def add(load_3N, tokens_N, replicas, coefficient_8, sign):
    """Adds a replica's even share of each step to the loads of a rank, or takes it off."""
    for n in range(len(tokens_N)):
        tokens = tokens_N[n] / replicas
        load_3N[0, n] += sign * min(1.0, tokens)
        load_3N[1, n] += sign * tokens
    if coefficient_8[5] > 0.0:
        for n in range(len(tokens_N)):
            load_3N[2, n] += sign * further_of(tokens_N[n] / replicas, coefficient_8)


@compiled
def rank_times(load_3N, coefficient_8, time_N):
    """Fills the times of a rank in each step."""
    for n in range(len(time_N)):
        # Counts of a rank without tokens are rounding errors.
        tokens = load_3N[1, n] if load_3N[1, n] > 1e-9 else 0.0
        time_N[n] = rank_time(coefficient_8, load_3N[0, n], tokens, load_3N[2, n])


@compiled
def is_fixed(split, replicas):
    """Whether a replica's share does not depend on what else its rank has."""
    return split == EVEN or replicas == 1


@compiled
def serve_with_one(tokens_E, heaviest_E, replicas, coefficient_S8, load_S3, time_S):
    """Fills the times of the ranks in one step; changes load_S3, at first that of single experts.

    The others follow, heaviest first: all tokens to the replica whose rank then has the least time.
    """
    _, ranks_ER, num_replicas_E, num_replicated = replicas
    left = num_replicated[0]
    for e in heaviest_E:
        tokens = tokens_E[e]
        if tokens == 0.0 or left == 0:
            break
        if num_replicas_E[e] == 1:
            continue
        left -= 1
        best, best_time = np.int64(-1), np.inf
        for r in range(num_replicas_E[e]):
            s = ranks_ER[e, r]
            load_3, further = load_S3[s], further_of(tokens, coefficient_S8[s])
            time = rank_time(
                coefficient_S8[s], load_3[0] + 1.0, load_3[1] + tokens, load_3[2] + further
            )
            best = s if time < best_time else best
            best_time = min(time, best_time)
        load_S3[best, 0] += 1.0
        load_S3[best, 1] += tokens
        load_S3[best, 2] += further_of(tokens, coefficient_S8[best])
    for s in range(len(load_S3)):
        time_S[s] = rank_time(coefficient_S8[s], load_S3[s, 0], load_S3[s, 1], load_S3[s, 2])


@compiled
def index(content_P, replicas):
    """Fills the ranks of each expert's replicas, in slot order, how many each has, and how many
    experts have several, from the content of the slots."""
    rank_of_P, ranks_ER, num_replicas_E, num_replicated = replicas
    num_replicas_E[:] = 0
    num_replicated[0] = 0
    for p in range(len(content_P)):
        e = content_P[p]
        ranks_ER[e, num_replicas_E[e]] = rank_of_P[p]
        num_replicas_E[e] += 1
        num_replicated[0] += num_replicas_E[e] == 2
