"""Descent by swaps between ranks, compiled. Import this inside a call: it imports numba.

One layer at a time. Items are slots with a load per step; a rank holds the same number of items
throughout. Coefficients of the ranks are float64 [S, 8]: a, b, b2, c, beta, tile_tokens (0: no
further tiles), free_tokens, in_turn.

The state of a search is (coefficient_S8, activated_NS, tokens_NS, further_NS, time_NS, left_N,
gain_SN). Counts are exact integers, so that nothing drifts while they are updated. left_N is what
the steps from n on take, gain_SN the most that they could take less without rank s: a swap of two
ranks is given up as soon as what it could still gain is not enough.
"""

# Compiled functions carry no annotations, as those in kernels/.
# mypy: ignore-errors

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from vllm_balance.kernels.numba_cache import kept

compiled = partial(kept, folder=Path(__file__).parent, nogil=True, error_model="numpy")


@compiled
def rank_time(coefficient_8, activated, tokens, further):
    """`CostModel.time_us` of one rank."""
    if tokens <= 0:
        return 0.0
    memory = coefficient_8[0] + coefficient_8[1] * activated + coefficient_8[2] * further
    compute = coefficient_8[3] + coefficient_8[4] * tokens
    return memory + compute if coefficient_8[7] else max(memory, compute)


@compiled
def num_further(tokens, coefficient_8):
    """`CostModel.further` of one expert with whole tokens."""
    tile, free = np.int64(coefficient_8[5]), np.int64(coefficient_8[6])
    if tile == 0 or tokens <= free:
        return np.int64(0)
    return (tokens - free + tile - 1) // tile


@compiled
def new_state(num_steps, coefficient_S8):
    """Room for a state."""
    num_ranks = len(coefficient_S8)
    activated_NS = np.empty((num_steps, num_ranks), np.int64)
    return (
        coefficient_S8,
        activated_NS,
        np.empty_like(activated_NS),
        np.empty_like(activated_NS),
        np.empty((num_steps, num_ranks)),
        np.empty(num_steps + 1),
        np.empty((num_ranks, num_steps + 1)),
    )


@compiled
def fill(tokens_NI, rank_of_I, state, top_N3):
    """Computes the state from scratch and returns the score."""
    coefficient_S8, activated_NS, tokens_NS, further_NS, time_NS = state[:5]
    activated_NS[:], tokens_NS[:], further_NS[:] = 0, 0, 0
    num_steps, num_items = tokens_NI.shape
    for n in range(num_steps):
        for i in range(num_items):
            s = rank_of_I[i]
            tokens = tokens_NI[n, i]
            activated_NS[n, s] += tokens > 0
            tokens_NS[n, s] += tokens
            further_NS[n, s] += num_further(tokens, coefficient_S8[s])
        for s in range(len(coefficient_S8)):
            time_NS[n, s] = rank_time(
                coefficient_S8[s], activated_NS[n, s], tokens_NS[n, s], further_NS[n, s]
            )
    return look_ahead(time_NS, top_N3, state[5], state[6])


@compiled
def exchange(tokens_NI, rank_of_I, i, j, state, top_N3):
    """Swaps the ranks of items i and j, keeps the state up with it and returns the score."""
    coefficient_S8, activated_NS, tokens_NS, further_NS, time_NS = state[:5]
    for s, leaves, enters in ((rank_of_I[i], i, j), (rank_of_I[j], j, i)):
        for n in range(len(tokens_NI)):
            for item, sign in ((leaves, -1), (enters, 1)):
                tokens = tokens_NI[n, item]
                activated_NS[n, s] += sign * np.int64(tokens > 0)
                tokens_NS[n, s] += sign * tokens
                further_NS[n, s] += sign * num_further(tokens, coefficient_S8[s])
            time_NS[n, s] = rank_time(
                coefficient_S8[s], activated_NS[n, s], tokens_NS[n, s], further_NS[n, s]
            )
    rank_of_I[i], rank_of_I[j] = rank_of_I[j], rank_of_I[i]
    return look_ahead(time_NS, top_N3, state[5], state[6])


@compiled
def look_ahead(time_NS, top_N3, left_N, gain_SN):
    """Fills top_N3, left_N and gain_SN from the times and returns the score."""
    top_three(time_NS, top_N3)
    left_N[-1], gain_SN[:, -1] = 0.0, 0.0
    for n in range(len(time_NS) - 1, -1, -1):
        slowest, third = top_N3[n, 0], top_N3[n, 2]
        left_N[n] = left_N[n + 1] + time_NS[n, slowest]
        gain_SN[:, n] = gain_SN[:, n + 1]
        gain_SN[slowest, n] += time_NS[n, slowest] - (time_NS[n, third] if third >= 0 else 0.0)
    return left_N[0]


@compiled
def top_three(time_NS, top_N3):
    """The three slowest ranks of each step; -1 where there are fewer ranks."""
    for n in range(len(time_NS)):
        top_N3[n] = -1
        for s in range(time_NS.shape[1]):
            for place in range(3):
                other = top_N3[n, place]
                if other < 0 or time_NS[n, s] > time_NS[n, other]:
                    for later in range(2, place, -1):
                        top_N3[n, later] = top_N3[n, later - 1]
                    top_N3[n, place] = s
                    break


@compiled
def moved(tokens_NI, n, leaves, enters, s, coefficient_8, activated_NS, tokens_NS, further_NS):
    """Time of rank s in step n if one item left it and another entered."""
    out, into = tokens_NI[n, leaves], tokens_NI[n, enters]
    return rank_time(
        coefficient_8,
        activated_NS[n, s] + np.int64(into > 0) - np.int64(out > 0),
        tokens_NS[n, s] + into - out,
        further_NS[n, s] + num_further(into, coefficient_8) - num_further(out, coefficient_8),
    )


@compiled
def swapped_score(tokens_NI, i, j, s, t, limit, state, top_N3):
    """Score if items i of rank s and j of rank t changed places; inf if that passes limit."""
    coefficient_S8, activated_NS, tokens_NS, further_NS, time_NS, left_N, gain_SN = state
    score = 0.0
    for n in range(len(tokens_NI)):
        if score + left_N[n] - gain_SN[s, n] - gain_SN[t, n] >= limit:
            return np.inf
        slowest = 0.0
        for place in range(3):
            other = top_N3[n, place]
            if other >= 0 and other != s and other != t:
                slowest = time_NS[n, other]
                break
        if tokens_NI[n, i] == tokens_NI[n, j]:
            slowest = max(slowest, time_NS[n, s], time_NS[n, t])
        else:
            at_s = moved(
                tokens_NI, n, i, j, s, coefficient_S8[s], activated_NS, tokens_NS, further_NS
            )
            at_t = moved(
                tokens_NI, n, j, i, t, coefficient_S8[t], activated_NS, tokens_NS, further_NS
            )
            slowest = max(slowest, at_s, at_t)
        score += slowest
    return score if score < limit else np.inf


@compiled
def descend(tokens_NI, rank_of_I, coefficient_S8, scores):
    """Swaps until no swap lowers the score. Changes rank_of_I; returns (score, swaps made).

    The scores after each swap, starting score first, go into `scores` as far as it reaches. An
    item is tried with all others in turn, but not with those that were tried with it since the last
    swap: those of the last `idle - 1` turns.
    """
    num_steps, num_items = tokens_NI.shape
    state = new_state(num_steps, coefficient_S8)
    top_N3 = np.empty((num_steps, 3), np.int64)
    score = fill(tokens_NI, rank_of_I, state, top_N3)
    swaps, idle = 0, 0
    if len(scores):
        scores[0] = score
    i = 0
    while idle < num_items:
        idle += 1
        for j in range(num_items):
            s, t = rank_of_I[i], rank_of_I[j]
            if s == t or (i - j) % num_items < idle:
                continue
            limit = score * (1.0 - 1e-9)
            if swapped_score(tokens_NI, i, j, s, t, limit, state, top_N3) < limit:
                score = exchange(tokens_NI, rank_of_I, i, j, state, top_N3)
                swaps, idle = swaps + 1, 0
                if swaps < len(scores):
                    scores[swaps] = score
        i = (i + 1) % num_items
    return score, swaps


@compiled
def search(tokens_NI, starts_MI, coefficient_S8, kicks, patience, seed):
    """Descends from every start, then kicks the best and descends again, keeping what is better.

    Returns the rank of each item, int64 [I].
    """
    np.random.seed(seed)
    none = np.empty(0)
    best_I = starts_MI[0].copy()
    best = np.inf
    descents = 0
    for start_I in starts_MI:
        trial_I = start_I.copy()
        score, _ = descend(tokens_NI, trial_I, coefficient_S8, none)
        descents += 1
        if score < best:
            best, best_I = score, trial_I
    num_items = len(best_I)
    fruitless = 0
    while descents < len(starts_MI) + kicks and fruitless < patience:
        trial_I = best_I.copy()
        for _ in range(2 + np.random.randint(3)):
            i, j = np.random.randint(num_items), np.random.randint(num_items)
            trial_I[i], trial_I[j] = trial_I[j], trial_I[i]
        score, _ = descend(tokens_NI, trial_I, coefficient_S8, none)
        descents += 1
        fruitless += 1
        if score < best * (1.0 - 1e-9):
            best, best_I, fruitless = score, trial_I, 0
    return best_I
