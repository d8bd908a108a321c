"""General assignment and even split in plain numpy: the definition the kernels are tested against.

Rule: the n-th occurrence (from 0) of an expert in global token order goes to the replica whose
cumulative split covers n.
"""

from __future__ import annotations

import numpy as np


def even_split(tokens_E: np.ndarray, num_replicas_E: np.ndarray, R: int) -> np.ndarray:
    """Tokens per replica, int32 [E, R]: n // r each, the remainder to replicas in turn.

    The first to get one more is replica ``(e + n // r) % r``: it differs from expert to expert and
    from batch to batch, so that no replica is favoured by its number.
    """
    tokens = tokens_E.astype(np.int64)[:, None]
    replicas = np.maximum(num_replicas_E.astype(np.int64), 1)[:, None]
    base, rest = tokens // replicas, tokens % replicas
    experts, columns = np.arange(len(tokens_E))[:, None], np.arange(R)[None]
    extra = (columns - experts - base) % replicas < rest
    return np.where(columns < replicas, base + extra, 0).astype(np.int32)


def assign(
    topk_ids_TK: np.ndarray,
    split_ER: np.ndarray,
    logical_to_physical_ER: np.ndarray,
    offset_E: np.ndarray | None = None,
    num_valid_tokens: int | None = None,
) -> np.ndarray:
    """Slot of each pair, same shape and dtype as the ids; -1 where the id is no expert.

    Padding rows go to the expert's first replica with a share, without one to its first replica.
    Occurrences behind the end of the split go to the last replica with a share.
    """
    num_experts = split_ER.shape[0]
    limit = topk_ids_TK.size
    if num_valid_tokens is not None:
        limit = max(num_valid_tokens, 0) * topk_ids_TK.shape[1]
    seen_E = np.zeros(num_experts, np.int64) if offset_E is None else offset_E.astype(np.int64)
    seen_E = seen_E.copy()
    out = np.full(topk_ids_TK.size, -1, topk_ids_TK.dtype)
    for i, expert in enumerate(topk_ids_TK.ravel().tolist()):
        if not 0 <= expert < num_experts:
            continue
        shares = np.flatnonzero(split_ER[expert] > 0)
        column = shares[0] if len(shares) else 0
        if i < limit and len(shares):
            ends = np.cumsum(split_ER[expert][shares])
            covering = np.searchsorted(ends, seen_E[expert], side="right")
            column = shares[min(covering, len(shares) - 1)]
            seen_E[expert] += 1
        out[i] = logical_to_physical_ER[expert, column]
    return out.reshape(topk_ids_TK.shape)
