"""Slots of a schedule on the CPU: which replica is where, what is overwritten, and the tables.

Moves are ``move_3M``: rows expert, receiving rank, tokens; each takes one dynamic slot of its
receiver, so there are never more than S * D.
"""

from __future__ import annotations

import numpy as np

from ..numba_memory import jit
from .rules import Eviction

_LRU = int(Eviction.LRU)
IDLE_MOST = 2**30
"""Where the count of idle batches stops."""


@jit
def link_holders(content_SD, num_experts, head_E, next_X):
    """Lists of the dynamic slots of each expert: ``head_E``, then ``next_X``; X = s * D + d, -1
    ends a list, ranks rise along it. Returns 0, or -1 - X for a slot with a wrong content."""
    num_ranks, num_dynamic = content_SD.shape
    num_home = num_experts // num_ranks
    head_E[:] = -1
    for x in range(num_ranks * num_dynamic - 1, -1, -1):
        rank = x // num_dynamic
        expert = content_SD[rank, x % num_dynamic]
        next_X[x] = -1
        if expert < 0:
            continue
        if expert >= num_experts or expert // num_home == rank:
            return np.int64(-1 - x)
        next_X[x] = head_E[expert]
        if head_E[expert] >= 0 and head_E[expert] // num_dynamic == rank:
            return np.int64(-1 - x)
        head_E[expert] = x
    return np.int64(0)


@jit
def _slot_to_overwrite(content_D, idle_D, needed_D, eviction):
    """Empty slots first, then by the rule; lowest slot among equals; -1 if all are needed."""
    best, best_idle = -1, np.int64(-1)
    for d in range(len(content_D)):
        if needed_D[d]:
            continue
        if content_D[d] < 0:
            return d
        idle = np.int64(idle_D[d]) if eviction == _LRU else np.int64(0)
        if idle > best_idle:
            best, best_idle = d, idle
    return best


@jit
def place_moves(moves, move_3M, eviction, head_E, next_X, content_SD, idle_SD, fetch_SD, served_SD):
    """Gives every move a slot; changes ``content_SD`` and ``idle_SD`` to the state after the
    batch and fills ``fetch_SD`` and ``served_SD`` (tokens served from each slot).

    ``head_E`` and ``next_X`` describe the state before. Returns the number of fetches.
    """
    num_dynamic = content_SD.shape[1]
    fetch_SD[:] = -1
    served_SD[:] = 0
    needed_SD = np.zeros(content_SD.shape, np.bool_)
    pending = 0
    pending_M = np.empty(moves, np.int64)
    for m in range(moves):
        rank = move_3M[1, m]
        x = head_E[move_3M[0, m]]
        while x >= 0 and x // num_dynamic != rank:
            x = next_X[x]
        if x < 0:
            pending_M[pending] = m
            pending += 1
            continue
        needed_SD[rank, x % num_dynamic] = True
        served_SD[rank, x % num_dynamic] = move_3M[2, m]
    for i in range(pending):
        expert, rank, tokens = move_3M[:, pending_M[i]]
        d = _slot_to_overwrite(content_SD[rank], idle_SD[rank], needed_SD[rank], eviction)
        needed_SD[rank, d] = True
        content_SD[rank, d] = fetch_SD[rank, d] = expert
        served_SD[rank, d] = tokens
    age(needed_SD, idle_SD)
    return pending


@jit
def age(needed_SD, idle_SD):
    """Counts one more idle batch for the slots that were not needed, none for the others."""
    for rank in range(idle_SD.shape[0]):
        for d in range(idle_SD.shape[1]):
            idle = min(idle_SD[rank, d] + 1, IDLE_MOST)
            idle_SD[rank, d] = 0 if needed_SD[rank, d] else idle


@jit
def fill_tables(content_SD, table_ER, replicas_E):
    """Writes the placement: home slots in column 0, dynamic slots behind them in rank order."""
    num_experts = len(replicas_E)
    num_ranks, num_dynamic = content_SD.shape
    num_home = num_experts // num_ranks
    table_ER[:] = -1
    for expert in range(num_experts):
        slot = expert // num_home * (num_home + num_dynamic) + expert % num_home
        table_ER[expert, 0] = slot
        replicas_E[expert] = 1
    for rank in range(num_ranks):
        first = rank * (num_home + num_dynamic) + num_home
        for d in range(num_dynamic):
            expert = content_SD[rank, d]
            if expert >= 0:
                table_ER[expert, replicas_E[expert]] = first + d
                replicas_E[expert] += 1


@jit
def fill_split(tokens_E, content_SD, served_SD, split_ER):
    """Writes the tokens of each replica, columns as ``fill_tables`` orders them."""
    num_ranks, num_dynamic = content_SD.shape
    column_E = np.ones(len(tokens_E), np.int64)
    split_ER[:] = 0
    split_ER[:, 0] = tokens_E
    for rank in range(num_ranks):
        for d in range(num_dynamic):
            expert = content_SD[rank, d]
            if expert >= 0:
                split_ER[expert, column_E[expert]] = served_SD[rank, d]
                split_ER[expert, 0] -= served_SD[rank, d]
                column_E[expert] += 1
