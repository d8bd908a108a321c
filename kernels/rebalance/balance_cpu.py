"""The improved schedule on the CPU: few large moves to a target, and the least target reached.

`fill` tries to bring all ranks to a target; the target is the mean plus the tolerance if it can be
reached, otherwise it is found by bisection. reference.py says the same in plain Python.
"""

from __future__ import annotations

import numpy as np

from ..numba_memory import jit

HELD, HELD_FIRST, LARGEST_FIRST = 0, 1, 2
"""Ways to fill: only replicas that are there; those first, then fetches; or expert by expert, the
one with most tokens first, so that small ones do not block slots."""


@jit
def sort_keys(weights_N, keys_N):
    """Sorts keys so that the largest weight is last, and the lower index among equals.

    A key is weight * N + (N - 1 - index), so ``N - 1 - key % N`` is the index. Keys of one kind
    need one compiled sort; argsort would be a second."""
    size = len(weights_N)
    for i in range(size):
        keys_N[i] = np.int64(weights_N[i]) * size + size - 1 - i
    keys_N.sort()


@jit
def _sort_home(tokens_E, home_S, goal, keys_E, key_S):
    """Sorts the ranks, and the experts of each rank above the goal, as ``sort_keys`` does."""
    num_experts, num_home = len(tokens_E), len(tokens_E) // len(home_S)
    for expert in range(num_experts):
        keys_E[expert] = np.int64(tokens_E[expert]) * num_experts + num_experts - 1 - expert
    for rank in range(len(home_S)):
        if home_S[rank] > goal:
            keys_E[rank * num_home : (rank + 1) * num_home].sort()
    sort_keys(home_S, key_S)


@jit
def _record(expert, donor, receiver, tokens, end, left_E, load_S, used_S, move_3M, moves):
    left_E[expert] -= tokens
    load_S[donor] -= tokens
    load_S[receiver] = end
    used_S[receiver] += 1
    move_3M[0, moves], move_3M[1, moves], move_3M[2, moves] = expert, receiver, tokens
    return moves + 1


@jit
def _use_holders(expert, donor, target, num_dynamic, head_E, next_X, left_E, load_S, used_S,
                 move_3M, moves):  # fmt: skip
    """Moves tokens to replicas that are there, least loaded rank first; returns the moves."""
    while load_S[donor] > target and left_E[expert] > 0:
        receiver, least = -1, target
        x = head_E[expert]
        while x >= 0:
            rank = x // num_dynamic
            if load_S[rank] < least and used_S[rank] < num_dynamic:
                receiver, least = rank, load_S[rank]
            x = next_X[x]
        if receiver < 0:
            break
        tokens = min(left_E[expert], load_S[donor] - target, target - least)
        moves = _record(
            expert, donor, receiver, tokens, least + tokens, left_E, load_S, used_S, move_3M, moves
        )
    return moves


@jit
def _fetch(expert, donor, target, q, cost, num_dynamic, left_E, load_S, used_S, fetches_S, move_3M,
           moves):  # fmt: skip
    """Moves at least q tokens per fetch, to the rank that can start first; returns the moves.

    The first fetch of a rank arrives after q - cost, each further one while at least q tokens of
    the one before are computed."""
    while load_S[donor] > target and left_E[expert] >= q:
        receiver, least = -1, target - cost - q + 1
        for rank in range(len(load_S)):
            start = load_S[rank] if fetches_S[rank] else max(load_S[rank], q - cost)
            if start < least and used_S[rank] < num_dynamic:
                receiver, least = rank, start
        if receiver < 0:
            break
        tokens = min(left_E[expert], max(load_S[donor] - target, q), target - cost - least)
        fetches_S[receiver] += 1
        end = least + tokens + cost
        moves = _record(
            expert, donor, receiver, tokens, end, left_E, load_S, used_S, move_3M, moves
        )
    return moves


@jit
def fill(target, way, q, cost, num_dynamic, tokens_E, home_S, key_S, keys_E, head_E, next_X,
         left_E, load_S, used_S, fetches_S, move_3M):  # fmt: skip
    """Moves tokens off every rank above the target; returns the moves, -1 if one stays above."""
    num_experts, num_ranks = len(tokens_E), len(home_S)
    num_home = num_experts // num_ranks
    left_E[:] = tokens_E
    load_S[:] = home_S
    used_S[:] = 0
    fetches_S[:] = 0
    moves = 0
    for stage in range(2 if way == HELD_FIRST else 1):
        for j in range(num_ranks - 1, -1, -1):
            donor = num_ranks - 1 - key_S[j] % num_ranks
            if home_S[donor] <= target:
                break
            for i in range((donor + 1) * num_home - 1, donor * num_home - 1, -1):
                if load_S[donor] <= target:
                    break
                expert = num_experts - 1 - keys_E[i] % num_experts
                if way == LARGEST_FIRST or stage == 0:
                    moves = _use_holders(
                        expert, donor, target, num_dynamic, head_E, next_X, left_E, load_S,
                        used_S, move_3M, moves,
                    )  # fmt: skip
                if way == LARGEST_FIRST or stage == 1:
                    moves = _fetch(
                        expert, donor, target, q, cost, num_dynamic, left_E, load_S, used_S,
                        fetches_S, move_3M, moves,
                    )  # fmt: skip
            if load_S[donor] > target and (way != HELD_FIRST or stage == 1):
                return -1
    return moves


@jit
def balance(tokens_E, num_ranks, num_dynamic, q, cost, tolerance, head_E, next_X, move_3M):
    """Fills ``move_3M``; returns (moves, whether the home ranks are even enough as they are)."""
    num_experts = len(tokens_E)
    num_home = num_experts // num_ranks
    home_S = np.zeros(num_ranks, np.int64)
    for expert in range(num_experts):
        home_S[expert // num_home] += tokens_E[expert]
    mean = (home_S.sum() + num_ranks - 1) // num_ranks
    slack = np.int64(mean * tolerance)
    goal, gain, precision = mean + slack, max(slack, 1), max(slack // 4, 1)
    peak = home_S.max()
    if peak <= goal:
        return 0, True
    key_S, keys_E = np.empty(num_ranks, np.int64), np.empty(num_experts, np.int64)
    left_E = np.empty(num_experts, np.int64)
    load_S, used_S = np.empty(num_ranks, np.int64), np.empty(num_ranks, np.int64)
    fetches_S = np.empty(num_ranks, np.int64)
    _sort_home(tokens_E, home_S, mean, keys_E, key_S)
    work = (q, cost, num_dynamic, tokens_E, home_S, key_S, keys_E, head_E, next_X, left_E,
            load_S, used_S, fetches_S, move_3M)  # fmt: skip
    target, way = peak, HELD
    for candidate in range(3):
        if candidate == HELD or target - goal >= gain:
            found = _least(candidate, goal, target, precision, work)
            if candidate == HELD or target - found >= gain:
                target, way = found, candidate
    return _settle(target, way, mean, fetches_S, work), False


@jit
def _least(way, goal, high, precision, work):
    """The least target that can be reached, to ``precision``; ``high`` if none below it can."""
    low, target = goal, goal
    while True:
        if fill(target, way, *work) >= 0:
            high = target
        else:
            low = target
        if high - low <= precision:
            return high
        target = (low + high) // 2


@jit
def _settle(target, way, mean, fetches_S, work):
    """Moves for a lower target, down to the mean, if that takes no more fetches; else for the
    target. The last fill counts; ``fetches_S`` is the one in ``work``."""
    moves = fill(target, way, *work)
    most = fetches_S.sum()
    for quarter in range(5):
        moves = fill(mean + (target - mean) * quarter // 4, way, *work)
        if moves >= 0 and fetches_S.sum() <= most:
            break
    return moves
