"""Descent over placements with replicas, compiled. Import this inside a call: it imports numba.

Moves are swaps of two slots and new content for a slot whose expert has another replica. With even
shares a move is first scored from its changes alone; what passes is scored from scratch, so that
nothing drifts.
"""

# Compiled functions carry no annotations, as those in kernels/.
# mypy: ignore-errors

from __future__ import annotations

import numpy as np

from vllm_balance.placement.replica_load import (
    EVEN,
    changed_score,
    index,
    replica_score,
    step_time,
)
from vllm_balance.placement.swap_search import compiled, look_ahead, rank_time


@compiled
def remember(problem, room, kept, is_slowest_S):
    """Keeps loads and times of the current placement, and what swaps could gain at most; marks
    ranks that are slowest in some step."""
    tokens_NE, heaviest_NE, coefficient_S8, split = problem
    slots_EP, num_replicas_E, load_S3 = room
    load_NS3, time_NS, top_N3, left_N, gain_SN = kept
    is_slowest_S[:] = False
    for n in range(len(tokens_NE)):
        slowest = step_time(
            tokens_NE[n], heaviest_NE[n], slots_EP, num_replicas_E, coefficient_S8, split, load_S3
        )
        load_NS3[n] = load_S3
        for s in range(len(coefficient_S8)):
            load_3 = load_S3[s]
            time_NS[n, s] = rank_time(coefficient_S8[s], load_3[0], load_3[1], load_3[2])
            is_slowest_S[s] |= time_NS[n, s] >= slowest
    look_ahead(time_NS, top_N3, left_N, gain_SN)


@compiled
def changes(content_P, room, p, q, expert, change_M4):
    """What a move does to even shares, as rows (rank, expert, replicas, sign); returns how many.

    The move swaps slots p and q, or fills slot p with `expert` if q is -1.
    """
    slots_EP, num_replicas_E, load_S3 = room
    slots_per_rank = len(content_P) // len(load_S3)
    s, old, m = p // slots_per_rank, content_P[p], 0
    if q >= 0:
        t, new = q // slots_per_rank, content_P[q]
        for rank, e, sign in ((s, old, -1), (s, new, 1), (t, new, -1), (t, old, 1)):
            change_M4[m] = rank, e, num_replicas_E[e], sign
            m += 1
        return m
    for e, more in ((old, -1), (expert, 1)):
        replicas = num_replicas_E[e]
        for r in range(replicas):
            rank = slots_EP[e, r] // slots_per_rank
            change_M4[m] = rank, e, replicas, -1
            m += 1
            if slots_EP[e, r] != p:
                change_M4[m] = rank, e, replicas + more, 1
                m += 1
    change_M4[m] = s, expert, num_replicas_E[expert] + 1, 1
    return m + 1


@compiled
def holds(content_P, s, slots_per_rank, expert):
    """Whether rank s has a slot with this expert."""
    return (content_P[s * slots_per_rank : (s + 1) * slots_per_rank] == expert).any()


@compiled
def allowed(content_P, num_replicas_E, is_slowest_S, p, q, expert):
    """Whether a move keeps every expert, puts no two copies on a rank, and might help."""
    slots_per_rank = len(content_P) // len(is_slowest_S)
    s, x = p // slots_per_rank, content_P[p]
    if q < 0:
        return num_replicas_E[x] > 1 and not holds(content_P, s, slots_per_rank, expert)
    t, y = q // slots_per_rank, content_P[q]
    # A swap that leaves the slowest ranks as they are lowers nothing.
    if s == t or x == y or not (is_slowest_S[s] or is_slowest_S[t]):
        return False
    return not (holds(content_P, s, slots_per_rank, y) or holds(content_P, t, slots_per_rank, x))


@compiled
def make(content_P, p, q, expert):
    """Swaps slots p and q, or fills slot p with `expert` if q is -1; returns what p held."""
    old = content_P[p]
    content_P[p] = expert if q < 0 else content_P[q]
    if q >= 0:
        content_P[q] = old
    return old


@compiled
def attempt(problem, content_P, move, limit, room, kept, change_M4):
    """Makes a move if it lowers the score below limit; returns the new score, else inf."""
    tokens_NE, heaviest_NE, coefficient_S8, split = problem
    p, q, expert = move
    if split == EVEN:
        m = changes(content_P, room, p, q, expert, change_M4)
        slots_per_rank = len(content_P) // len(coefficient_S8)
        pair = (p // slots_per_rank, q // slots_per_rank) if q >= 0 else (-1, -1)
        guess = changed_score(problem, change_M4[:m], pair, limit, kept, room[2])
        if guess >= limit:
            return np.inf
    old = make(content_P, p, q, expert)
    score = replica_score(tokens_NE, heaviest_NE, content_P, coefficient_S8, split, limit, room)
    if score >= limit:
        make(content_P, p, q, old)
        index(content_P, room[0], room[1])
        return np.inf
    return score


@compiled
def descend_replicas(tokens_NE, content_P, coefficient_S8, split, trials, scores):
    """Moves until none lowers the score, or for `trials` moves tried. Changes content_P.

    Returns (score, moves made); the scores, starting score first, go into `scores` as far as it
    reaches.
    """
    num_steps, num_experts = tokens_NE.shape
    num_slots, num_ranks = len(content_P), len(coefficient_S8)
    heaviest_NE = np.empty(tokens_NE.shape, np.int64)
    for n in range(num_steps):
        heaviest_NE[n] = np.argsort(-tokens_NE[n], kind="mergesort")
    slots_EP = np.empty((num_experts, num_slots), np.int64)
    room = (slots_EP, np.empty(num_experts, np.int64), np.empty((num_ranks, 3)))
    problem = (tokens_NE, heaviest_NE, coefficient_S8, split)
    kept = (
        np.empty((num_steps, num_ranks, 3)),
        np.empty((num_steps, num_ranks)),
        np.empty((num_steps, 3), np.int64),
        np.empty(num_steps + 1),
        np.empty((num_ranks, num_steps + 1)),
    )
    change_M4 = np.empty((2 * num_slots + 8, 4), np.int64)
    is_slowest_S = np.empty(num_ranks, np.bool_)
    score = replica_score(tokens_NE, heaviest_NE, content_P, coefficient_S8, split, np.inf, room)
    remember(problem, room, kept, is_slowest_S)
    if len(scores):
        scores[0] = score
    made, tried, idle, p = 0, 0, 0, 0
    while idle < num_slots and tried < trials:
        idle += 1
        for other in range(num_slots + num_experts):
            q = other if other < num_slots else -1
            expert = other - num_slots
            if not allowed(content_P, room[1], is_slowest_S, p, q, expert):
                continue
            tried += 1
            limit = score * (1.0 - 1e-9)
            trial = attempt(problem, content_P, (p, q, expert), limit, room, kept, change_M4)
            if trial < limit:
                remember(problem, room, kept, is_slowest_S)
                score, idle, made = trial, 0, made + 1
                if made < len(scores):
                    scores[made] = score
        p = (p + 1) % num_slots
    return score, made
