"""Experts spread evenly over all ranks, on the CPU: FasterMoE's shadowing and the even split."""

from __future__ import annotations

import numpy as np

from ..assign.numba_cpu import even_share
from ..numba_memory import jit
from .balance_cpu import sort_keys


@jit
def spread(tokens_E, num_ranks, num_dynamic, q, always, head_E, next_X, move_3M):
    """Fills ``move_3M`` with even shares of the hottest experts; returns the moves.

    Experts are tried from the hottest down (lower one first among equals). One is spread if every
    other rank has a dynamic slot left and either ``always`` or the modelled time of the slowest
    rank falls: tokens + q per expert it does not hold. The first that lowers nothing ends it.
    Of an expert with fewer tokens than ranks only those that get one take a copy.
    """
    num_experts = len(tokens_E)
    num_home = num_experts // num_ranks
    load_S, after_S = np.zeros(num_ranks, np.int64), np.zeros(num_ranks, np.int64)
    used_S = np.zeros(num_ranks, np.int64)
    for expert in range(num_experts):
        load_S[expert // num_home] += tokens_E[expert]
    moves = 0
    keys_E = np.empty(num_experts, np.int64)
    sort_keys(tokens_E, keys_E)
    for i in range(num_experts - 1, -1, -1):
        expert = num_experts - 1 - keys_E[i] % num_experts
        home, tokens = expert // num_home, np.int64(tokens_E[expert])
        room = num_dynamic
        for rank in range(num_ranks):
            if rank != home:
                room = min(room, num_dynamic - used_S[rank])
        if tokens == 0 or num_ranks == 1 or (room == 0 and not always):
            break
        if room == 0:
            continue
        after_S[:] = load_S
        after_S[home] -= tokens
        for rank in range(num_ranks):
            share = even_share(expert, tokens, num_ranks, rank)
            after_S[rank] += share + (q if rank != home and share > 0 else 0)
        x = head_E[expert]
        while x >= 0:
            rank = x // num_dynamic
            after_S[rank] -= q if even_share(expert, tokens, num_ranks, rank) > 0 else 0
            x = next_X[x]
        if not always and after_S.max() >= load_S.max():
            break
        load_S[:] = after_S
        for rank in range(num_ranks):
            share = even_share(expert, tokens, num_ranks, rank)
            if rank != home and share > 0:
                move_3M[0, moves], move_3M[1, moves], move_3M[2, moves] = expert, rank, share
                used_S[rank] += 1
                moves += 1
    return moves
