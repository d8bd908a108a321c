"""vLLM's EPLB mapping on the CPU, where stock vLLM returns its input unchanged."""

from __future__ import annotations

import numpy as np
import torch

from ..numba_memory import entry, get, ints_at, jit, num_valid_pairs, put
from ..record.numba_cpu import add_physical
from .reference import KNUTH_MULTIPLIER

_MULTIPLIER = np.uint64(KNUTH_MULTIPLIER)
_MASK = np.uint64(0xFFFFFFFF)


@jit
def map_by_hash(ids, num_tokens, top_k, table, stride, replicas, num_experts, out):
    """Writes the slot of each pair: replica ``hash(token) mod r``."""
    for token in range(num_tokens):
        hashed = (np.uint64(token) * _MULTIPLIER) & _MASK
        for i in range(token * top_k, (token + 1) * top_k):
            expert = get(ids, i)
            slot = np.int64(-1)
            if 0 <= expert < num_experts:
                count = max(get(replicas, expert), 1)
                column = hashed % np.uint64(count) if count > 1 else np.uint64(0)
                slot = get(table, expert * stride + np.int64(column))
            put(out, i, slot)


@entry
def _map_and_record(ids, wide, num_tokens, top_k, table, wide_table, stride, replicas,
                    wide_replicas, E, P, S, load, record, valid, counters, regime,
                    out):  # fmt: skip
    pairs = num_tokens * top_k
    slots = ints_at(out, wide)
    map_by_hash(
        ints_at(ids, wide), num_tokens, top_k, ints_at(table, wide_table),
        stride, ints_at(replicas, wide_replicas), E, slots,
    )  # fmt: skip
    tokens_P = np.zeros(P, np.int32)
    for i in range(num_valid_pairs(valid, pairs, top_k)):
        slot = get(slots, i)
        if 0 <= slot < P:
            tokens_P[slot] += 1
    add_physical(tokens_P, S, load, record, counters, regime)


def map_and_record(
    topk_ids_TK: torch.Tensor,
    logical_to_physical_ER: torch.Tensor,
    num_replicas_E: torch.Tensor,
    num_ranks: int,
    num_physical: int,
    load_P: torch.Tensor | None,
    record_enabled: torch.Tensor | None,
    num_valid_tokens: torch.Tensor | None,
    counters: torch.Tensor,
    regime: int,
    out: torch.Tensor,
) -> None:
    """As ``kernels.eplb_hash.map_and_record`` into ``out``, arguments already checked."""
    _map_and_record(
        topk_ids_TK.data_ptr(),
        topk_ids_TK.dtype is torch.int64,
        topk_ids_TK.shape[0],
        topk_ids_TK.shape[1],
        logical_to_physical_ER.data_ptr(),
        logical_to_physical_ER.dtype is torch.int64,
        logical_to_physical_ER.stride(0),
        num_replicas_E.data_ptr(),
        num_replicas_E.dtype is torch.int64,
        num_replicas_E.shape[0],
        num_physical,
        num_ranks,
        0 if load_P is None else load_P.data_ptr(),
        0 if record_enabled is None else record_enabled.data_ptr(),
        0 if num_valid_tokens is None else num_valid_tokens.data_ptr(),
        counters.data_ptr(),
        regime,
        out.data_ptr(),
    )
