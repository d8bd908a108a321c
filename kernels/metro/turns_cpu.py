"""When one replica per expert loses to all of them, where a rank computes its experts in turn.

A core that computes one expert after the other takes, in units of the time of a token,
knee + max(0, n - free) for an expert with n tokens. Spreading an expert over replicas can only add
work then; what it can gain is balance. So both are added up, and the one whose slowest rank ends
first is taken: no threshold on the batch could tell (docs/metro.md).
"""

from __future__ import annotations

import numpy as np

from ..assign.numba_cpu import even_share
from ..numba_memory import get, jit


@jit
def expert_time(tokens, knee, free):
    """Time of one expert, in tokens."""
    return knee + max(0.0, tokens - free) if tokens > 0 else 0.0


@jit
def time_with_one(tokens_E, table, stride, column_E, num_physical, num_ranks, knee, free):
    """Time of the slowest rank if each expert uses its chosen column, in tokens."""
    time_S, slots = np.zeros(num_ranks), num_physical // num_ranks
    for expert in range(len(tokens_E)):
        if column_E[expert] >= 0:
            rank = get(table, expert * stride + column_E[expert]) // slots
            time_S[rank] += expert_time(tokens_E[expert], knee, free)
    return time_S.max()


@jit
def time_if_even(tokens_E, table, stride, replicas, num_physical, num_ranks, knee, free):
    """Time of the slowest rank if each expert is spread evenly over its replicas, in tokens.

    Or -1 - e if expert e has tokens but a replica without slot."""
    time_S, slots = np.zeros(num_ranks), num_physical // num_ranks
    for expert in range(len(tokens_E)):
        if tokens_E[expert] == 0:
            continue
        count = max(min(get(replicas, expert), stride), 1)
        for column in range(count):
            share = even_share(expert, np.int64(tokens_E[expert]), count, column)
            slot = get(table, expert * stride + column)
            if slot < 0 or slot >= num_physical:
                return -1.0 - expert
            time_S[slot // slots] += expert_time(share, knee, free)
    return time_S.max()
