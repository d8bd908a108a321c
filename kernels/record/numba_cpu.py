"""Bookkeeping of one routed batch on the CPU."""

from __future__ import annotations

import numpy as np
import torch

from ..numba_memory import entry, get, int32_at, int64_at, ints_at, jit, num_valid_pairs, uint8_at
from .layout import FIXED, Counter, Regime

_EMPTY = int(Counter.EMPTY_BATCHES)
_MAX_ACTIVATED = int(Counter.MAX_ACTIVATED_SUM)
_MAX_TOKENS = int(Counter.MAX_TOKENS_SUM)
_PAIRS = int(Counter.PAIRS)
_ACTIVATED = int(Counter.ACTIVATED_SUM)
_MEMORY_BOUND, _COMPUTE_BOUND = int(Regime.MEMORY_BOUND), int(Regime.COMPUTE_BOUND)


@jit
def add_batch(counters, activated_S, tokens_S, regime):
    """Adds one batch to the counters; see layout.py."""
    num_ranks = len(activated_S)
    pairs = np.int64(0)
    for rank in range(num_ranks):
        pairs += tokens_S[rank]
    if pairs == 0:
        counters[_EMPTY] += 1
        return
    counters[regime] += 1
    max_activated = max_tokens = total_activated = np.int64(0)
    for rank in range(num_ranks):
        activated, tokens = np.int64(activated_S[rank]), np.int64(tokens_S[rank])
        counters[FIXED + rank] += activated
        counters[FIXED + num_ranks + rank] += tokens
        total_activated += activated
        max_activated = max(max_activated, activated)
        max_tokens = max(max_tokens, tokens)
    counters[_MAX_ACTIVATED] += max_activated
    counters[_MAX_TOKENS] += max_tokens
    counters[_PAIRS] += pairs
    counters[_ACTIVATED] += total_activated


@jit
def recording(load, record):
    """Whether there is a load (addresses) and its flag, if there is one, is set."""
    return load != 0 and (record == 0 or uint8_at(record, 1)[0] != 0)


@jit
def add_physical(tokens_P, num_ranks, load, record, counters, regime):
    """Adds a batch with ``tokens_P`` pairs per slot to the counters and the load (addresses)."""
    num_physical = len(tokens_P)
    slots = num_physical // num_ranks
    per_rank = np.zeros((2, num_ranks), np.int32)
    record_load = recording(load, record)
    load_P = int32_at(load, num_physical)
    for rank in range(num_ranks):
        for slot in range(rank * slots, (rank + 1) * slots):
            tokens = tokens_P[slot]
            if tokens > 0:
                per_rank[0, rank] += 1
                per_rank[1, rank] += tokens
                if record_load:
                    load_P[slot] += tokens
    add_batch(int64_at(counters, FIXED + 2 * num_ranks), per_rank[0], per_rank[1], regime)


@entry
def _record(ids, wide_ids, num_pairs, top_k, P, S, load, record, valid, counters, regime):
    tokens_P = np.zeros(P, np.int32)
    physical_ids = ints_at(ids, wide_ids)
    for i in range(num_valid_pairs(valid, num_pairs, top_k)):
        slot = get(physical_ids, i)
        if 0 <= slot < P:
            tokens_P[slot] += 1
    add_physical(tokens_P, S, load, record, counters, regime)


@entry
def _record_split(split, E, R, table, wide_table, stride, P, S, counters, regime):
    tokens_P, is_spread = np.zeros(P, np.int32), False
    split_ER, table_ER = int32_at(split, E * R).reshape(E, R), ints_at(table, wide_table)
    for expert in range(E):
        served = 0
        for column in range(R):
            slot = get(table_ER, expert * stride + column)
            if not 0 <= slot < P:
                break
            tokens_P[slot] += split_ER[expert, column]
            served += split_ER[expert, column] > 0
        is_spread |= served > 1
    if regime < 0:
        regime = _COMPUTE_BOUND if is_spread else _MEMORY_BOUND
    add_physical(tokens_P, S, 0, 0, counters, regime)


@entry
def _record_load(ids, wide_ids, num_pairs, P, load, record):
    if not recording(load, record):
        return
    physical_ids, load_P = ints_at(ids, wide_ids), int32_at(load, P)
    for i in range(num_pairs):
        slot = get(physical_ids, i)
        if 0 <= slot < P:
            load_P[slot] += 1


def record(
    physical_ids_TK: torch.Tensor,
    num_physical: int,
    num_ranks: int,
    load_P: torch.Tensor | None,
    record_enabled: torch.Tensor | None,
    num_valid_tokens: torch.Tensor | None,
    counters: torch.Tensor,
    regime: int,
) -> None:
    """As ``kernels.record.record``, arguments already checked."""
    _record(
        physical_ids_TK.data_ptr(),
        physical_ids_TK.dtype is torch.int64,
        physical_ids_TK.numel(),
        physical_ids_TK.shape[1],
        num_physical,
        num_ranks,
        0 if load_P is None else load_P.data_ptr(),
        0 if record_enabled is None else record_enabled.data_ptr(),
        0 if num_valid_tokens is None else num_valid_tokens.data_ptr(),
        counters.data_ptr(),
        int(regime),
    )


def record_load(
    physical_ids_TK: torch.Tensor,
    num_physical: int,
    load_P: torch.Tensor,
    record_enabled: torch.Tensor | None,
) -> None:
    """As ``kernels.record.record_load``, arguments already checked."""
    _record_load(
        physical_ids_TK.data_ptr(),
        physical_ids_TK.dtype is torch.int64,
        physical_ids_TK.numel(),
        num_physical,
        load_P.data_ptr(),
        0 if record_enabled is None else record_enabled.data_ptr(),
    )


def record_split(
    split_ER: torch.Tensor,
    logical_to_physical_ER: torch.Tensor,
    num_physical: int,
    num_ranks: int,
    counters: torch.Tensor,
    regime: int | None,
) -> None:
    """As ``kernels.record.record_split``, arguments already checked."""
    _record_split(
        split_ER.data_ptr(),
        *split_ER.shape,
        logical_to_physical_ER.data_ptr(),
        logical_to_physical_ER.dtype is torch.int64,
        logical_to_physical_ER.stride(0),
        num_physical,
        num_ranks,
        counters.data_ptr(),
        -1 if regime is None else int(regime),
    )
