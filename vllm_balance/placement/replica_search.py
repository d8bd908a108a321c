"""Descent over placements with replicas, compiled. Import this inside a call: it imports numba.

A placement of one layer is `content_P`, the expert of each slot; slots of a rank are consecutive.
Moves are swaps of two slots and new content for a slot whose expert has another replica. Every
trial is scored from scratch, step by step, and given up as soon as it cannot win.
"""

# Compiled functions carry no annotations, as those in kernels/.
# mypy: ignore-errors

from __future__ import annotations

import numpy as np

from vllm_balance.placement.swap_search import compiled, num_tiles, rank_time

EVEN, ONE = 0, 1
"""Tokens of an expert spread evenly over its replicas, or all to the one that ends first."""


@compiled
def add(load_S3, s, tokens, tile_tokens):
    """Adds one slot's tokens, which may be a fraction, to (activated, tokens, tiles) of a rank."""
    load_S3[s, 0] += min(1.0, tokens)
    load_S3[s, 1] += tokens
    if tokens < 1.0 or tile_tokens == 0:
        load_S3[s, 2] += min(1.0, tokens)
    else:
        load_S3[s, 2] += np.ceil(tokens / tile_tokens)


@compiled
def serve_with_one(tokens, slots_R, num_replicas, slots_per_rank, coefficient_S6, load_S3):
    """Gives all tokens of an expert to the replica whose rank then has the least time."""
    best, best_time = -1, np.inf
    for r in range(num_replicas):
        s = slots_R[r] // slots_per_rank
        height = np.int64(coefficient_S6[s, 5])
        time = rank_time(
            coefficient_S6[s],
            load_S3[s, 0] + 1.0,
            load_S3[s, 1] + tokens,
            load_S3[s, 2] + num_tiles(tokens, height),
        )
        if time < best_time:
            best, best_time = s, time
    add(load_S3, best, float(tokens), coefficient_S6[best, 5])


@compiled
def step_time(tokens_E, heaviest_E, slots_EP, num_replicas_E, coefficient_S6, split, load_S3):
    """Time of the slowest rank in one step; leaves the loads of the ranks in load_S3."""
    num_ranks = len(coefficient_S6)
    slots_per_rank = slots_EP.shape[1] // num_ranks
    load_S3[:] = 0.0
    for e in range(len(tokens_E)):
        replicas = num_replicas_E[e]
        if tokens_E[e] > 0 and (split == EVEN or replicas == 1):
            for r in range(replicas):
                s = slots_EP[e, r] // slots_per_rank
                add(load_S3, s, tokens_E[e] / replicas, coefficient_S6[s, 5])
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
                    coefficient_S6,
                    load_S3,
                )
    slowest = 0.0
    for s in range(num_ranks):
        time = rank_time(coefficient_S6[s], load_S3[s, 0], load_S3[s, 1], load_S3[s, 2])
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
def replica_score(tokens_NE, heaviest_NE, content_P, coefficient_S6, split, limit, room):
    """Score of a placement; inf as soon as it passes `limit`. `room` is scratch memory."""
    slots_EP, num_replicas_E, load_S3 = room
    index(content_P, slots_EP, num_replicas_E)
    score = 0.0
    for n in range(len(tokens_NE)):
        score += step_time(
            tokens_NE[n], heaviest_NE[n], slots_EP, num_replicas_E, coefficient_S6, split, load_S3
        )
        if score >= limit:
            return np.inf
    return score


@compiled
def slowest_ranks(problem, room, is_slowest_S):
    """Marks the ranks that are the slowest of some step."""
    tokens_NE, heaviest_NE, coefficient_S6, split = problem
    slots_EP, num_replicas_E, load_S3 = room
    is_slowest_S[:] = False
    for n in range(len(tokens_NE)):
        slowest = step_time(
            tokens_NE[n], heaviest_NE[n], slots_EP, num_replicas_E, coefficient_S6, split, load_S3
        )
        for s in range(len(coefficient_S6)):
            load_3 = load_S3[s]
            time = rank_time(coefficient_S6[s], load_3[0], load_3[1], load_3[2])
            is_slowest_S[s] |= time >= slowest


@compiled
def holds(content_P, s, slots_per_rank, expert):
    """Whether rank s has a slot with this expert."""
    return (content_P[s * slots_per_rank : (s + 1) * slots_per_rank] == expert).any()


@compiled
def attempt(problem, content_P, p, q, limit, room):
    """Score after swapping slots p and q if that puts no two copies on one rank, else inf.

    The content is left as it was.
    """
    tokens_NE, heaviest_NE, coefficient_S6, split = problem
    slots_per_rank = len(content_P) // len(coefficient_S6)
    s, t = p // slots_per_rank, q // slots_per_rank
    x, y = content_P[p], content_P[q]
    if s == t or x == y:
        return np.inf
    if holds(content_P, s, slots_per_rank, y) or holds(content_P, t, slots_per_rank, x):
        return np.inf
    content_P[p], content_P[q] = y, x
    score = replica_score(tokens_NE, heaviest_NE, content_P, coefficient_S6, split, limit, room)
    content_P[p], content_P[q] = x, y
    return score


@compiled
def attempt_replica(problem, content_P, p, expert, num_replicas_E, limit, room):
    """Score after filling slot p with another expert if its own has a replica elsewhere, else inf.

    The content is left as it was.
    """
    tokens_NE, heaviest_NE, coefficient_S6, split = problem
    slots_per_rank = len(content_P) // len(coefficient_S6)
    old = content_P[p]
    if num_replicas_E[old] < 2 or holds(content_P, p // slots_per_rank, slots_per_rank, expert):
        return np.inf
    content_P[p] = expert
    score = replica_score(tokens_NE, heaviest_NE, content_P, coefficient_S6, split, limit, room)
    content_P[p] = old
    return score


@compiled
def descend_replicas(tokens_NE, content_P, coefficient_S6, split, trials, scores):
    """Moves until none lowers the score, or for `trials` moves tried. Changes content_P.

    Returns (score, moves made); the scores, starting score first, go into `scores` as far as it
    reaches.
    """
    num_experts, num_slots = tokens_NE.shape[1], len(content_P)
    heaviest_NE = np.empty(tokens_NE.shape, np.int64)
    for n in range(len(tokens_NE)):
        heaviest_NE[n] = np.argsort(-tokens_NE[n], kind="mergesort")
    room = (
        np.empty((num_experts, num_slots), np.int64),
        np.empty(num_experts, np.int64),
        np.empty((len(coefficient_S6), 3)),
    )
    problem = (tokens_NE, heaviest_NE, coefficient_S6, split)
    score = replica_score(tokens_NE, heaviest_NE, content_P, coefficient_S6, split, np.inf, room)
    num_replicas_E = np.zeros(num_experts, np.int64)
    index(content_P, room[0], num_replicas_E)
    if len(scores):
        scores[0] = score
    is_slowest_S = np.empty(len(coefficient_S6), np.bool_)
    slowest_ranks(problem, room, is_slowest_S)
    slots_per_rank = num_slots // len(coefficient_S6)
    made, tried, idle, p = 0, 0, 0, 0
    while idle < num_slots and tried < trials:
        idle += 1
        for other in range(num_slots + num_experts):
            limit = score * (1.0 - 1e-9)
            if other < num_slots:
                # A swap that leaves the slowest ranks as they are lowers nothing.
                if not is_slowest_S[p // slots_per_rank] and (
                    not is_slowest_S[other // slots_per_rank]
                ):
                    continue
                trial = attempt(problem, content_P, p, other, limit, room)
            else:
                expert = other - num_slots
                trial = attempt_replica(problem, content_P, p, expert, num_replicas_E, limit, room)
            tried += 1
            if trial < limit:
                if other < num_slots:
                    content_P[p], content_P[other] = content_P[other], content_P[p]
                else:
                    content_P[p] = other - num_slots
                index(content_P, room[0], num_replicas_E)
                room[1][:] = num_replicas_E
                slowest_ranks(problem, room, is_slowest_S)
                score, idle, made = trial, 0, made + 1
                if made < len(scores):
                    scores[made] = score
        p = (p + 1) % num_slots
    return score, made
