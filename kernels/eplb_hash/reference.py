"""vLLM's EPLB mapping in plain numpy: the definition the kernels are tested against."""

from __future__ import annotations

import numpy as np

KNUTH_MULTIPLIER = 2654435769
"""floor(2^32 / phi), as in vLLM's ``_eplb_map_and_record_i32_kernel``."""


def map_to_physical(
    topk_ids_TK: np.ndarray, logical_to_physical_ER: np.ndarray, num_replicas_E: np.ndarray
) -> np.ndarray:
    """Slot of each pair: replica ``(token * multiplier mod 2^32) mod r``; -1 if no expert."""
    token_T = np.arange(topk_ids_TK.shape[0], dtype=np.uint64)[:, None]
    hash_T = (token_T * np.uint64(KNUTH_MULTIPLIER)) & np.uint64(0xFFFFFFFF)
    is_expert = (topk_ids_TK >= 0) & (topk_ids_TK < len(num_replicas_E))
    safe = np.where(is_expert, topk_ids_TK, 0)
    replicas = np.maximum(num_replicas_E, 1)[safe].astype(np.uint64)
    slots = logical_to_physical_ER[safe, (hash_T % replicas).astype(np.int64)]
    return np.where(is_expert, slots, -1).astype(topk_ids_TK.dtype)
