"""METRO on the CPU: count, decide the regime, choose, map and record in one call."""

from __future__ import annotations

import numpy as np
import torch

from ..assign.numba_cpu import even_share, map_padding
from ..numba_memory import (
    entry,
    get,
    int32_at,
    int64_at,
    ints_at,
    jit,
    num_valid_pairs,
    put,
)
from ..record.layout import FIXED, Regime
from ..record.numba_cpu import add_batch, add_physical, recording
from .choice_cpu import collect, greedy, minimise_activated
from .tokens_cpu import minimise_tokens
from .turns_cpu import time_if_even, time_with_one

_MEMORY_BOUND, _COMPUTE_BOUND = int(Regime.MEMORY_BOUND), int(Regime.COMPUTE_BOUND)


@jit
def count(ids, pairs, tokens_E):
    """Fills ``tokens_E`` with the pairs of each expert."""
    num_experts = len(tokens_E)
    tokens_E[:] = 0
    for i in range(pairs):
        expert = get(ids, i)
        if 0 <= expert < num_experts:
            tokens_E[expert] += 1


@jit
def is_compute_bound(tokens_E, knee):
    """Whether the mean tokens per active expert exceed the knee (float32, as on the GPU)."""
    total, active = np.int64(0), np.int64(0)
    for expert in range(len(tokens_E)):
        total += tokens_E[expert]
        active += tokens_E[expert] > 0
    return total > 0 and np.float32(total) > np.float32(knee) * np.float32(active)


@jit
def choose_columns(tokens_E, table, stride, replicas, num_physical, column_E, per_rank):
    """Fills ``column_E`` (-1: inactive) and ``per_rank`` [2, S] (activated, tokens).

    Returns lambda, or -1 - e if expert e has tokens but no slot."""
    num_experts, num_ranks = len(tokens_E), per_rank.shape[1]
    slots = num_physical // num_ranks
    per_rank[:] = 0
    activated_S, tokens_S = per_rank[0], per_rank[1]
    expert_M, first_M = np.empty(num_experts, np.int32), np.empty(num_experts + 1, np.int32)
    options = np.empty(num_physical, np.int32)
    movable = collect(
        tokens_E, table, stride, replicas, slots, num_physical,
        column_E, activated_S, tokens_S, expert_M, first_M, options,
    )  # fmt: skip
    if movable < 0:
        return np.int64(movable)
    weight_M, rank_M = np.empty(movable, np.int32), np.empty(movable, np.int32)
    next_M, previous_M = np.empty(movable, np.int32), np.empty(movable, np.int32)
    head_S = np.full(num_ranks, -1, np.int32)
    fixed = activated_S.max()
    for m in range(movable):
        weight_M[m] = tokens_E[expert_M[m]]
    greedy(
        movable, weight_M, first_M, options, activated_S, tokens_S, rank_M,
        head_S, next_M, previous_M,
    )  # fmt: skip
    floor = max(fixed, (activated_S.sum() + num_ranks - 1) // num_ranks)
    limit = minimise_activated(
        floor, weight_M, first_M, options, activated_S, tokens_S, rank_M,
        head_S, next_M, previous_M,
    )  # fmt: skip
    minimise_tokens(
        limit, weight_M, first_M, options, activated_S, tokens_S, rank_M,
        head_S, next_M, previous_M,
    )  # fmt: skip
    for m in range(movable):
        column = 0
        while options[first_M[m] + column] != rank_M[m]:
            column += 1
        column_E[expert_M[m]] = column
    return np.int64(limit)


@jit
def decide(tokens_E, table, stride, replicas, P, S, knee, free, column_E, per_rank):
    """Whether to spread every expert over its replicas (1), or else (0) what ``choose_columns``
    fills; a negative ``free`` stands for experts that overlap.

    Returns -1 - e if expert e has tokens but a replica without slot that was looked at."""
    if free < 0 and is_compute_bound(tokens_E, knee):
        return np.int64(1)
    status = choose_columns(tokens_E, table, stride, replicas, P, column_E, per_rank)
    if status < 0:
        return status
    if free < 0:
        return np.int64(0)
    even = time_if_even(tokens_E, table, stride, replicas, P, S, knee, free)
    if even < 0:
        return np.int64(even)
    one = time_with_one(tokens_E, table, stride, column_E, P, S, knee, free)
    return np.int64(even < one)


@jit
def map_one_replica(ids, pairs, table, stride, column_E, slot_E, out):
    """Writes the chosen slot of each pair; padding of an inactive expert gets its first slot."""
    num_experts = len(column_E)
    for expert in range(num_experts):
        slot_E[expert] = get(table, expert * stride + max(column_E[expert], 0))
    map_padding(ids, 0, pairs, slot_E, out)


@jit
def map_even(ids, valid_pairs, pairs, table, stride, replicas, tokens_E, slot_E, tokens_P, out):
    """Splits every expert's pairs evenly, by occurrence; fills ``tokens_P``.

    Returns 0, or -1 - e if expert e has tokens but a replica without slot."""
    num_experts = len(tokens_E)
    column_E, left_E = np.empty(num_experts, np.int32), np.empty(num_experts, np.int32)
    tokens_P[:] = 0
    for expert in range(num_experts):
        count = max(min(get(replicas, expert), stride), 1)
        column_E[expert], left_E[expert] = -1, 0
        slot_E[expert] = get(table, expert * stride)
        for column in range(count if tokens_E[expert] > 0 else 0):
            share = even_share(expert, np.int64(tokens_E[expert]), count, column)
            slot = get(table, expert * stride + column)
            if slot < 0 or slot >= len(tokens_P):
                return np.int64(-1 - expert)
            tokens_P[slot] += share
            if share > 0 and column_E[expert] < 0:
                column_E[expert], left_E[expert], slot_E[expert] = column, share, slot
    map_padding(ids, valid_pairs, pairs, slot_E, out)
    for i in range(valid_pairs):
        expert = get(ids, i)
        if expert < 0 or expert >= num_experts:
            put(out, i, -1)
            continue
        while left_E[expert] == 0:
            column = column_E[expert] + 1
            column_E[expert] = column
            count = min(get(replicas, expert), stride)
            left_E[expert] = even_share(expert, np.int64(tokens_E[expert]), count, column)
            slot_E[expert] = get(table, expert * stride + column)
        left_E[expert] -= 1
        put(out, i, slot_E[expert])
    return np.int64(0)


@jit
def record_one_replica(tokens_E, column_E, slot_E, per_rank, num_physical, load, record, counters):
    """Adds a batch with one replica per expert to load and counters (addresses)."""
    if recording(load, record):
        load_P = int32_at(load, num_physical)
        for expert in range(len(tokens_E)):
            if column_E[expert] >= 0:
                load_P[slot_E[expert]] += tokens_E[expert]
    counters_N = int64_at(counters, FIXED + 2 * per_rank.shape[1])
    add_batch(counters_N, per_rank[0], per_rank[1], _MEMORY_BOUND)


@entry
def _route(ids, wide, pairs, top_k, table, wide_table, stride, replicas, wide_replicas,
           E, P, S, knee, free, load, record, valid, counters, out):  # fmt: skip
    """The whole batch, arguments by address; returns 0 or -1 - e for an expert without slot."""
    topk_ids, slots = ints_at(ids, wide), ints_at(out, wide)
    table_ER = ints_at(table, wide_table)
    replicas_E = ints_at(replicas, wide_replicas)
    tokens_E, slot_E = np.empty(E, np.int32), np.empty(E, np.int32)
    valid_pairs = num_valid_pairs(valid, pairs, top_k)
    count(topk_ids, valid_pairs, tokens_E)
    column_E, per_rank = np.empty(E, np.int32), np.empty((2, S), np.int32)
    decided = decide(tokens_E, table_ER, stride, replicas_E, P, S, knee, free, column_E, per_rank)
    if decided < 0:
        return decided
    if decided == 1:
        tokens_P = np.empty(P, np.int32)
        status = map_even(
            topk_ids, valid_pairs, pairs, table_ER, stride, replicas_E, tokens_E, slot_E,
            tokens_P, slots,
        )  # fmt: skip
        if status == 0:
            add_physical(tokens_P, S, load, record, counters, _COMPUTE_BOUND)
        return status
    map_one_replica(topk_ids, pairs, table_ER, stride, column_E, slot_E, slots)
    record_one_replica(tokens_E, column_E, slot_E, per_rank, P, load, record, counters)
    return np.int64(0)


@entry
def _choose(tokens, E, table, wide_table, stride, replicas, wide_replicas, P, S, out):
    per_rank = np.empty((2, S), np.int32)
    return choose_columns(
        int32_at(tokens, E), ints_at(table, wide_table), stride,
        ints_at(replicas, wide_replicas), P, int32_at(out, E), per_rank,
    )  # fmt: skip


@entry
def _split(tokens, E, R, table, wide_table, stride, replicas, wide_replicas, P, S, knee, free,
           out):  # fmt: skip
    """Everything by address; returns 0 or -1 - e for an expert without slot."""
    tokens_E, split_ER = int32_at(tokens, E), int32_at(out, E * R).reshape(E, R)
    table_ER = ints_at(table, wide_table)
    replicas_E = ints_at(replicas, wide_replicas)
    column_E, per_rank = np.empty(E, np.int32), np.empty((2, S), np.int32)
    decided = decide(tokens_E, table_ER, stride, replicas_E, P, S, knee, free, column_E, per_rank)
    if decided < 0:
        return decided
    split_ER[:] = 0
    for expert in range(E):
        pairs, count = np.int64(tokens_E[expert]), max(get(replicas_E, expert), 1)
        if pairs == 0:
            continue
        if count > R:
            return np.int64(-1 - expert)
        if decided == 0:
            split_ER[expert, column_E[expert]] = pairs
            continue
        for column in range(count):
            if not 0 <= get(table_ER, expert * stride + column) < P:
                return np.int64(-1 - expert)
            split_ER[expert, column] = even_share(expert, pairs, count, column)
    return np.int64(0)


def _raise_without_slot(status: int) -> None:
    raise ValueError(
        f"logical expert {-1 - status} has tokens but logical_to_physical_ER holds no valid slot "
        f"for one of its replicas. Every expert needs num_replicas_E slots between 0 and P - 1."
    )


def route(
    topk_ids_TK: torch.Tensor,
    logical_to_physical_ER: torch.Tensor,
    num_replicas_E: torch.Tensor,
    num_ranks: int,
    num_physical: int,
    knee_tokens: float,
    free_tokens: float | None,
    load_P: torch.Tensor | None,
    record_enabled: torch.Tensor | None,
    num_valid_tokens: torch.Tensor | None,
    counters: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """As ``kernels.metro.route`` into ``out``, arguments already checked."""
    status = _route(
        topk_ids_TK.data_ptr(),
        topk_ids_TK.dtype is torch.int64,
        topk_ids_TK.numel(),
        topk_ids_TK.shape[1],
        logical_to_physical_ER.data_ptr(),
        logical_to_physical_ER.dtype is torch.int64,
        logical_to_physical_ER.stride(0),
        num_replicas_E.data_ptr(),
        num_replicas_E.dtype is torch.int64,
        num_replicas_E.shape[0],
        num_physical,
        num_ranks,
        float(knee_tokens),
        -1.0 if free_tokens is None else float(free_tokens),
        0 if load_P is None else load_P.data_ptr(),
        0 if record_enabled is None else record_enabled.data_ptr(),
        0 if num_valid_tokens is None else num_valid_tokens.data_ptr(),
        counters.data_ptr(),
        out.data_ptr(),
    )
    if status < 0:
        _raise_without_slot(status)


def split(
    tokens_E: torch.Tensor,
    logical_to_physical_ER: torch.Tensor,
    num_replicas_E: torch.Tensor,
    num_ranks: int,
    num_physical: int,
    knee_tokens: float,
    free_tokens: float | None,
    out: torch.Tensor,
) -> None:
    """As ``kernels.metro.split`` into ``out``, arguments already checked."""
    status = _split(
        tokens_E.data_ptr(),
        *logical_to_physical_ER.shape,
        logical_to_physical_ER.data_ptr(),
        logical_to_physical_ER.dtype is torch.int64,
        logical_to_physical_ER.stride(0),
        num_replicas_E.data_ptr(),
        num_replicas_E.dtype is torch.int64,
        num_physical,
        num_ranks,
        float(knee_tokens),
        -1.0 if free_tokens is None else float(free_tokens),
        out.data_ptr(),
    )
    if status < 0:
        _raise_without_slot(status)


def choose(
    tokens_E: torch.Tensor,
    logical_to_physical_ER: torch.Tensor,
    num_replicas_E: torch.Tensor,
    num_ranks: int,
    num_physical: int,
    out: torch.Tensor,
) -> None:
    """As ``kernels.metro.choose`` into ``out``, arguments already checked."""
    status = _choose(
        tokens_E.data_ptr(),
        tokens_E.shape[0],
        logical_to_physical_ER.data_ptr(),
        logical_to_physical_ER.dtype is torch.int64,
        logical_to_physical_ER.stride(0),
        num_replicas_E.data_ptr(),
        num_replicas_E.dtype is torch.int64,
        num_physical,
        num_ranks,
        out.data_ptr(),
    )
    if status < 0:
        _raise_without_slot(status)
