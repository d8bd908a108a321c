"""Algorithm 2 of HarMoEny (arXiv 2506.12417) on the CPU, step by step as the paper states it."""

from __future__ import annotations

import numpy as np

from ..numba_memory import jit


@jit
def rebalance(tokens_FE, num_ranks, q, moved_FES):
    """Fills S[from, e, to]: all tokens at the expert's home, then moved while a rank is above the
    mean. Ties go to the lowest source, expert and rank."""
    num_sources, num_experts = tokens_FE.shape
    num_home = num_experts // num_ranks
    moved_FES[:] = 0
    from_FS = np.zeros((num_sources, num_ranks), np.int64)
    for source in range(num_sources):
        for expert in range(num_experts):
            home = expert // num_home
            moved_FES[source, expert, home] = tokens_FE[source, expert]
            from_FS[source, home] += tokens_FE[source, expert]
    tokens_S = from_FS.sum(0)
    mean = tokens_S.sum() // num_ranks
    while tokens_S.max() > mean:
        busiest, idlest = tokens_S.argmax(), tokens_S.argmin()
        source = from_FS[:, busiest].argmax()
        expert = moved_FES[source, :, busiest].argmax()
        movable = np.int64(moved_FES[source, expert, busiest])
        if movable < q or idlest == busiest or tokens_S[idlest] + q > mean:
            break
        tokens = min(movable, mean - tokens_S[idlest])
        moved_FES[source, expert, busiest] -= tokens
        moved_FES[source, expert, idlest] += tokens
        from_FS[source, busiest] -= tokens
        from_FS[source, idlest] += tokens
        tokens_S[busiest] -= tokens
        tokens_S[idlest] += tokens


@jit
def keep_what_fits(moved_FES, num_dynamic, move_3M):
    """Moves of the schedule, per rank the D experts with most tokens, lower expert first among
    equals; the rest stays at home, as a rank has no slot for it. Returns the moves."""
    num_experts, num_ranks = moved_FES.shape[1:]
    num_home = num_experts // num_ranks
    moves = 0
    for rank in range(num_ranks):
        tokens_E = np.zeros(num_experts, np.int64)
        for source in range(moved_FES.shape[0]):
            for expert in range(num_experts):
                tokens_E[expert] += moved_FES[source, expert, rank]
        tokens_E[rank * num_home : (rank + 1) * num_home] = 0
        for _ in range(num_dynamic):
            expert = tokens_E.argmax()
            if tokens_E[expert] == 0:
                break
            move_3M[0, moves], move_3M[1, moves] = expert, rank
            move_3M[2, moves] = tokens_E[expert]
            tokens_E[expert] = 0
            moves += 1
    return moves
