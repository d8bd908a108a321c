"""The second objective of METRO on the CPU: the busiest rank's tokens, within a given lambda.

Local search. While a move of one expert off the busiest rank, or a swap with an expert of another
rank, lowers the pair's larger token count below the busiest rank's, the best one is done. The
result cannot be improved by any single move or swap off the busiest rank (unless MAX_SHIFTS
stopped it).
"""

from __future__ import annotations

import numpy as np

from ..numba_memory import jit
from .choice_cpu import MAX_SHIFTS, move


@jit
def _best_swap(m, busiest, rank, best, weight_M, first_M, options, tokens_S, head_S, next_M):
    """The expert of ``rank`` to swap with m, and the larger token count of the two ranks then."""
    partner, other = -1, head_S[rank]
    while other >= 0:
        gain = weight_M[m] - weight_M[other]
        if gain > 0:
            larger = max(tokens_S[busiest] - gain, tokens_S[rank] + gain)
            if larger < best:
                for i in range(first_M[other], first_M[other + 1]):
                    if options[i] == busiest:
                        partner, best = other, larger
                        break
        other = next_M[other]
    return partner, best


@jit
def _best_shift(busiest, limit, weight_M, first_M, options, activated_S, tokens_S, head_S, next_M):
    """The best move (partner -1) or swap off the busiest rank: expert, rank, partner."""
    best, expert, target, partner = tokens_S[busiest], -1, -1, -1
    m = head_S[busiest]
    while m >= 0:
        for i in range(first_M[m], first_M[m + 1]):
            rank = options[i]
            if rank == busiest or tokens_S[rank] >= tokens_S[busiest]:
                continue
            if activated_S[rank] < limit:
                larger = max(tokens_S[busiest] - weight_M[m], tokens_S[rank] + weight_M[m])
                if larger < best:
                    best, expert, target, partner = larger, m, rank, -1
            other, larger = _best_swap(
                m, busiest, rank, best, weight_M, first_M, options, tokens_S, head_S, next_M
            )
            if other >= 0:
                best, expert, target, partner = larger, m, rank, other
        m = next_M[m]
    return expert, target, partner


@jit
def minimise_tokens(limit, weight_M, first_M, options, activated_S, tokens_S, rank_M,
                    head_S, next_M, previous_M):  # fmt: skip
    """Lowers the busiest rank's tokens without raising any rank above ``limit`` activated."""
    num_ranks = len(tokens_S)
    mean = (np.sum(tokens_S) + num_ranks - 1) // num_ranks
    for _ in range(MAX_SHIFTS):
        busiest = np.int64(np.argmax(tokens_S))
        if tokens_S[busiest] <= mean:
            return
        m, rank, partner = _best_shift(
            busiest, limit, weight_M, first_M, options, activated_S, tokens_S, head_S, next_M
        )
        if m < 0:
            return
        move(m, rank, weight_M, rank_M, tokens_S, head_S, next_M, previous_M)
        if partner >= 0:
            move(partner, busiest, weight_M, rank_M, tokens_S, head_S, next_M, previous_M)
        else:
            activated_S[busiest] -= 1
            activated_S[rank] += 1
