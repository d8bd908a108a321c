"""The pairs of one rank on the CPU: one pass instead of a dozen small tensors."""

from __future__ import annotations

import numpy as np
import torch

from ..numba_memory import entry, float32_at, get, int32_at, int64_at, ints_at


@entry
def _select(ids, wide, T, K, weights, local, P, token, expert, weight, first):
    slots, weight_TK, local_P = ints_at(ids, wide), float32_at(weights, T * K), int32_at(local, P)
    token_N, expert_N = int64_at(token, T * K), int32_at(expert, T * K)
    weight_N, first_T = float32_at(weight, T * K), int64_at(first, T)
    found = 0
    for t in range(T):
        first_T[t] = found
        for i in range(t * K, (t + 1) * K):
            slot = get(slots, i)
            mine = local_P[slot] if 0 <= slot < P else np.int32(-1)
            # A foreign pair is written too and overwritten: no branch that nothing could predict.
            token_N[found], expert_N[found], weight_N[found] = t, mine, weight_TK[i]
            found += mine >= 0
    return found


def select(
    topk_ids_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    local_P: torch.Tensor,
    out: tuple[torch.Tensor, ...],
) -> int:
    """As ``kernels.local_pairs.select``, arguments already checked; returns the number of pairs.

    Args:
        out: token_N, expert_N, weight_N and first_T, with room for all pairs.
    """
    return _select(
        topk_ids_TK.data_ptr(),
        topk_ids_TK.dtype is torch.int64,
        *topk_ids_TK.shape,
        topk_weights_TK.data_ptr(),
        local_P.data_ptr(),
        local_P.numel(),
        *(tensor.data_ptr() for tensor in out),
    )
