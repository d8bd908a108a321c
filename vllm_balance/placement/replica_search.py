"""Descent over placements with replicas, compiled. Import this inside a call: it imports numba.

Moves are swaps of two slots and new content for a slot whose expert has another replica. A move is
scored from its changes alone, block of steps after block, and given up when it has fallen behind.
What is kept of a placement is computed from scratch, so that nothing drifts.
"""

# Compiled functions carry no annotations, as those in kernels/.
# mypy: ignore-errors

from __future__ import annotations

import numpy as np

from vllm_balance.placement.replica_load import (
    EVEN,
    add,
    index,
    is_fixed,
    rank_times,
    serve_with_one,
)
from vllm_balance.placement.swap_search import compiled

BLOCK = 16
"""Steps after which a move may be given up if shares are even."""
FEW = 4
"""Steps that say too little to give a move up, if one replica serves; later it is asked of each."""
BEHIND, BEHIND_WITH_ONE = 0.05, 0.01
"""Mean steps' time by which a move may be behind before the last block, or the last step."""


@compiled
def remember(problem, content_P, replicas, kept):
    """Keeps loads and times of a placement and returns its score."""
    tokens_NE, tokens_EN, heaviest_NE, coefficient_S8, split = problem
    load_S3N, time_SN, slowest_N, is_slowest_S = kept
    index(content_P, replicas)
    load_S3N[:] = 0.0
    for s, e in zip(replicas[0], content_P):  # noqa: B905, numba knows no strict
        num_replicas = replicas[2][e]
        if is_fixed(split, num_replicas):
            add(load_S3N[s], tokens_EN[e], num_replicas, coefficient_S8[s], 1.0)
    for s in range(len(load_S3N)):
        rank_times(load_S3N[s], coefficient_S8[s], time_SN[s])
    for n in range(len(slowest_N)):
        if split != EVEN:
            load_S3, time_S = load_S3N[:, :, n].copy(), time_SN[:, n]
            serve_with_one(tokens_NE[n], heaviest_NE[n], replicas, coefficient_S8, load_S3, time_S)
        slowest_N[n] = time_SN[:, n].max()
    for s in range(len(time_SN)):
        is_slowest_S[s] = (time_SN[s] >= slowest_N).any()
    return slowest_N.sum()


@compiled
def changes(content_P, replicas, p, q, expert, change_M4):
    """What a move does to even shares, as rows (rank, expert, replicas, sign); returns how many.

    The move swaps slots p and q, or fills slot p with `expert` if q is -1.
    """
    rank_of_P, ranks_ER, num_replicas_E, _ = replicas
    s, old, m = rank_of_P[p], content_P[p], 0
    if q >= 0:
        t, new = rank_of_P[q], content_P[q]
        for rank, e, sign in ((s, old, -1), (s, new, 1), (t, new, -1), (t, old, 1)):
            change_M4[m] = rank, e, num_replicas_E[e], sign
            m += 1
        return m
    for e, more in ((old, -1), (expert, 1)):
        before, after = num_replicas_E[e], num_replicas_E[e] + more
        for r in range(before):
            change_M4[m] = ranks_ER[e, r], e, before, -1
            change_M4[m + 1] = ranks_ER[e, r], e, after, 1
            m += 2
        change_M4[m] = s, e, after, more
        m += 1
    return m


@compiled
def holds(content_P, s, slots_per_rank, expert):
    """Whether rank s has a slot with this expert."""
    for p in range(s * slots_per_rank, (s + 1) * slots_per_rank):  # noqa: SIM110, numba has no any
        if content_P[p] == expert:
            return True
    return False


@compiled
def allowed(content_P, replicas, is_slowest_S, p, q, expert):
    """Whether a move keeps every expert, puts no two copies on a rank, and might help."""
    rank_of_P, _, num_replicas_E, _ = replicas
    slots_per_rank = len(content_P) // len(is_slowest_S)
    s, x = rank_of_P[p], content_P[p]
    if q < 0:
        return num_replicas_E[x] > 1 and not holds(content_P, s, slots_per_rank, expert)
    t, y = rank_of_P[q], content_P[q]
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
def even_score(load_S3B, is_changed_S, coefficient_S8, time_SN, time_B, slowest_B):
    """Sum over steps of the slowest rank's time, where some ranks have new loads."""
    slowest_B[:] = 0.0
    for s in range(len(time_SN)):
        if is_changed_S[s]:
            rank_times(load_S3B[s], coefficient_S8[s], time_B)
        else:
            time_B[:] = time_SN[s]
        for n in range(len(time_B)):
            slowest_B[n] = max(slowest_B[n], time_B[n])
    return slowest_B.sum()


@compiled
def gains(problem, change_M4, replicas, kept, scratch):
    """Whether the score falls by the changes of a move; `replicas` are those after it.

    No if it is BEHIND after one of the blocks, or, where one replica serves, of the steps: it might
    have caught up, but seldom does.
    """
    tokens_NE, tokens_EN, heaviest_NE, coefficient_S8, split = problem
    load_S3N, time_SN, slowest_N, _ = kept
    load_S3B, time_2B, load_S3, time_S, is_changed_S = scratch
    num_steps, score, before = len(slowest_N), 0.0, 0.0
    slack = (BEHIND if split == EVEN else BEHIND_WITH_ONE) * slowest_N.mean()
    is_changed_S[:] = False
    for rank, _, _, _ in change_M4:
        is_changed_S[rank] = True
    for start in range(0, num_steps, BLOCK):
        end = min(start + BLOCK, num_steps)
        size = end - start
        for s in range(len(is_changed_S)):
            if is_changed_S[s] or split != EVEN:
                load_S3B[s, :, :size] = load_S3N[s, :, start:end]
        for rank, e, num_replicas, sign in change_M4:
            if is_fixed(split, num_replicas):
                load_3B, tokens_B = load_S3B[rank, :, :size], tokens_EN[e, start:end]
                add(load_3B, tokens_B, num_replicas, coefficient_S8[rank], float(sign))
        if split == EVEN:
            times = (time_SN[:, start:end], time_2B[0, :size], time_2B[1, :size])
            score += even_score(load_S3B[:, :, :size], is_changed_S, coefficient_S8, *times)
            before += slowest_N[start:end].sum()
        else:
            for n in range(start, end):
                load_S3[:] = load_S3B[:, :, n - start]
                serve_with_one(
                    tokens_NE[n], heaviest_NE[n], replicas, coefficient_S8, load_S3, time_S
                )
                score += time_S.max()
                before += slowest_N[n]
                if n + 1 >= FEW and score >= before + slack:
                    return False
        if split == EVEN and score >= before + slack:
            return False
    # A gain far above rounding errors, so that the score from scratch falls too.
    return score < before * (1.0 - 1e-9)


@compiled
def descend_replicas(tokens_NE, content_P, coefficient_S8, split, trials, scores):
    """Moves until none lowers the score, or for `trials` moves tried. Changes content_P.

    Returns (score, moves made); the scores, starting score first, go into `scores` as far as it
    reaches. Swaps are not tried again until a move was made. Tokens are whole numbers in float64.
    """
    num_steps, num_experts = tokens_NE.shape
    num_slots, num_ranks = len(content_P), len(coefficient_S8)
    heaviest_NE = np.empty(tokens_NE.shape, np.int64)
    for n in range(num_steps):
        heaviest_NE[n] = np.argsort(-tokens_NE[n], kind="mergesort")
    tokens_EN = np.ascontiguousarray(tokens_NE.T)
    problem = (tokens_NE, tokens_EN, heaviest_NE, coefficient_S8, split)
    replicas = (
        np.arange(num_slots) // (num_slots // num_ranks),
        np.empty((num_experts, num_slots), np.int64),
        np.empty(num_experts, np.int64),
        np.empty(1, np.int64),
    )
    kept = (
        np.empty((num_ranks, 3, num_steps)),
        np.empty((num_ranks, num_steps)),
        np.empty(num_steps),
        np.empty(num_ranks, np.bool_),
    )
    scratch = (
        np.empty((num_ranks, 3, BLOCK)),
        np.empty((2, BLOCK)),
        np.empty((num_ranks, 3)),
        np.empty(num_ranks),
        np.empty(num_ranks, np.bool_),
    )
    change_M4 = np.empty((2 * num_slots + 8, 4), np.int64)
    score = remember(problem, content_P, replicas, kept)
    if len(scores):
        scores[0] = score
    made, tried, idle, p = 0, 0, 0, 0
    while idle < num_slots and tried < trials:
        idle += 1
        for other in range(num_slots + num_experts):
            q = other if other < num_slots else -1
            expert = other - num_slots
            if q >= 0 and (p - q) % num_slots < idle:
                continue
            if not allowed(content_P, replicas, kept[3], p, q, expert):
                continue
            tried += 1
            m = changes(content_P, replicas, p, q, expert, change_M4)
            old = make(content_P, p, q, expert)
            index(content_P, replicas)
            if gains(problem, change_M4[:m], replicas, kept, scratch):
                score = remember(problem, content_P, replicas, kept)
                idle, made = 0, made + 1
                if made < len(scores):
                    scores[made] = score
            else:
                make(content_P, p, q, old)
                index(content_P, replicas)
        p = (p + 1) % num_slots
    return score, made
