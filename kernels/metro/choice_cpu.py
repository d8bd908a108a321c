"""The choice of METRO on the CPU: least activated experts on the worst rank, exactly.

Greedy start, then augmenting paths until a most-loaded rank cannot be relieved (which proves
lambda optimal), then local search for the busiest rank's tokens within that lambda. The
algorithm, its invariants and its worst case are in docs/metro.md.

Experts whose replicas all share one rank are *fixed*; the others are *movable* and numbered from 0
("m"). ``options`` lists the ranks of each movable expert, ``first_M[m]`` to ``first_M[m + 1]``.
Each rank keeps a doubly linked list of the movable experts it serves.
"""

from __future__ import annotations

import numpy as np

from ..numba_memory import get, jit

MAX_SHIFTS = 64
"""Moves and swaps of the token stage, at most; bounds its time, not lambda."""


@jit
def _rank_of_replica(table, index, slots, num_physical):
    """Rank of the replica at ``index`` of the map, -1 if the map holds no slot there."""
    slot = get(table, index)
    return slot // slots if 0 <= slot < num_physical else np.int64(-1)


@jit
def collect(tokens_E, table, stride, replicas, slots, num_physical,
             column_E, activated_S, tokens_S, expert_M, first_M, options):  # fmt: skip
    """Places the fixed experts and lists the movable ones; returns their number.

    Returns -1 - e if expert e has tokens but a replica without slot."""
    movable, end = 0, 0
    for expert in range(len(tokens_E)):
        column_E[expert] = -1
        tokens = tokens_E[expert]
        if tokens == 0:
            continue
        count = min(get(replicas, expert), stride)
        home = _rank_of_replica(table, expert * stride, slots, num_physical)
        if count < 1 or home < 0 or end + count > len(options):
            return -1 - expert
        is_movable = False
        for column in range(count):
            rank = _rank_of_replica(table, expert * stride + column, slots, num_physical)
            if rank < 0:
                return -1 - expert
            options[end + column] = rank
            is_movable |= options[end + column] != home
        if is_movable:
            expert_M[movable] = expert
            first_M[movable] = end
            end += count
            movable += 1
        else:
            column_E[expert] = 0
            activated_S[home] += 1
            tokens_S[home] += tokens
    first_M[movable] = end
    return movable


@jit
def _link(m, rank, head_S, next_M, previous_M):
    following = head_S[rank]
    next_M[m] = following
    previous_M[m] = -1
    if following >= 0:
        previous_M[following] = m
    head_S[rank] = m


@jit
def _unlink(m, rank, head_S, next_M, previous_M):
    if previous_M[m] >= 0:
        next_M[previous_M[m]] = next_M[m]
    else:
        head_S[rank] = next_M[m]
    if next_M[m] >= 0:
        previous_M[next_M[m]] = previous_M[m]


@jit
def greedy(movable, weight_M, first_M, options, activated_S, tokens_S, rank_M,
            head_S, next_M, previous_M):  # fmt: skip
    """Places the movable experts, fewest replicas first, on the least activated rank."""
    most = 0
    for m in range(movable):
        most = max(most, first_M[m + 1] - first_M[m])
    for replicas in range(2, most + 1):
        for m in range(movable):
            if first_M[m + 1] - first_M[m] != replicas:
                continue
            best = options[first_M[m]]
            for i in range(first_M[m] + 1, first_M[m + 1]):
                rank = options[i]
                if activated_S[rank] < activated_S[best] or (
                    activated_S[rank] == activated_S[best] and tokens_S[rank] < tokens_S[best]
                ):
                    best = rank
            rank_M[m] = best
            activated_S[best] += 1
            tokens_S[best] += weight_M[m]
            _link(m, best, head_S, next_M, previous_M)


@jit
def _augmenting_path(start, target, first_M, options, activated_S, head_S, next_M, via_S, queue_S):
    """Breadth-first search over ranks from ``start``; returns a rank with at most ``target``
    activated experts, or -1. ``via_S`` is the expert that moves onto each rank reached."""
    via_S[:] = -2
    via_S[start] = -1
    queue_S[0] = start
    begin, end = 0, 1
    while begin < end:
        m = head_S[queue_S[begin]]
        begin += 1
        while m >= 0:
            for i in range(first_M[m], first_M[m + 1]):
                rank = options[i]
                if via_S[rank] == -2:
                    via_S[rank] = m
                    if activated_S[rank] <= target:
                        return rank
                    queue_S[end] = rank
                    end += 1
            m = next_M[m]
    return -1


@jit
def move(m, rank, weight_M, rank_M, tokens_S, head_S, next_M, previous_M):
    """Moves an expert's tokens and its list entry; the caller keeps ``activated_S``."""
    source = rank_M[m]
    _unlink(m, source, head_S, next_M, previous_M)
    _link(m, rank, head_S, next_M, previous_M)
    tokens_S[source] -= weight_M[m]
    tokens_S[rank] += weight_M[m]
    rank_M[m] = rank


@jit
def minimise_activated(floor, weight_M, first_M, options, activated_S, tokens_S, rank_M,
                        head_S, next_M, previous_M):  # fmt: skip
    """Relieves most-activated ranks along augmenting paths until one cannot be; returns lambda."""
    num_ranks = len(activated_S)
    via_S, queue_S = np.empty(num_ranks, np.int32), np.empty(num_ranks, np.int32)
    while True:
        worst = np.int64(np.argmax(activated_S))
        most = activated_S[worst]
        if most <= floor:
            return most
        rank = _augmenting_path(
            worst, most - 2, first_M, options, activated_S, head_S, next_M, via_S, queue_S
        )
        if rank < 0:
            return most
        activated_S[rank] += 1
        activated_S[worst] -= 1
        while rank != worst:
            m = via_S[rank]
            source = rank_M[m]
            move(m, rank, weight_M, rank_M, tokens_S, head_S, next_M, previous_M)
            rank = source
