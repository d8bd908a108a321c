"""The best few swaps from where experts are now, compiled. Import this inside a call: numba.

Unlike `swap_search.descend`, which takes the first swap that helps and goes on to the end, this
takes the best one of all and stops after a few: every swap moves the weights of two experts.
"""

# Compiled functions carry no annotations, as those in kernels/.
# mypy: ignore-errors

from __future__ import annotations

import numpy as np

from vllm_balance.placement.swap_search import compiled, exchange, fill, new_state, swapped_score


@compiled
def best_swap(tokens_NI, rank_of_I, score, state, top_N3):
    """(item, item) of the swap with the lowest score below `score`; (-1, -1) if there is none."""
    num_items = len(rank_of_I)
    first, second = -1, -1
    limit = score * (1.0 - 1e-9)
    for i in range(num_items):
        for j in range(i + 1, num_items):
            s, t = rank_of_I[i], rank_of_I[j]
            if s == t:
                continue
            found = swapped_score(tokens_NI, i, j, s, t, limit, state, top_N3)
            if found < limit:
                limit, first, second = found, i, j
    return first, second


@compiled
def few_swaps(tokens_NI, rank_of_I, coefficient_S8, swap_M2):
    """Steepest descent of at most len(swap_M2) swaps, which it writes there; returns how many.

    Changes rank_of_I.
    """
    state = new_state(len(tokens_NI), coefficient_S8)
    top_N3 = np.empty((len(tokens_NI), 3), np.int64)
    score = fill(tokens_NI, rank_of_I, state, top_N3)
    for swap in range(len(swap_M2)):
        i, j = best_swap(tokens_NI, rank_of_I, score, state, top_N3)
        if i < 0:
            return swap
        score = exchange(tokens_NI, rank_of_I, i, j, state, top_N3)
        swap_M2[swap] = i, j
    return len(swap_M2)
