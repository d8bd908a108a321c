"""General assignment on the CPU: one pass over the pairs with a cursor per expert."""

from __future__ import annotations

import numpy as np
import torch

from ..numba_memory import entry, get, int32_at, ints_at, jit, num_valid_pairs, put

_ENDLESS = np.int64(2**62)
"""More tokens than any batch has."""


@jit
def even_share(expert, tokens, replicas, column):
    """Tokens of one replica under the even split (see reference.py)."""
    base = tokens // replicas
    return base + (1 if (column - expert - base) % replicas < tokens % replicas else 0)


@jit
def _first_column(split_ER, expert):
    """First replica with a share; 0 if none has one."""
    for column in range(split_ER.shape[1]):
        if split_ER[expert, column] > 0:
            return column
    return 0


@jit
def _start_cursor(split_ER, table, stride, expert, skip, column_E, left_E, last_E):
    """Points the expert's cursor at occurrence ``skip``: current column, tokens left in it.

    The last column with a share never runs out. Columns end with the expert's replicas."""
    column, last = -1, -1
    left = np.int64(0)
    for replica in range(split_ER.shape[1]):
        if get(table, expert * stride + replica) < 0:
            break
        share = np.int64(split_ER[expert, replica])
        if share <= 0:
            continue
        last = replica
        if column < 0:
            if skip < share:
                column, left = replica, share - skip
            else:
                skip -= share
    column_E[expert] = max(column if column >= 0 else last, 0)
    left_E[expert] = left if 0 <= column < last else _ENDLESS
    last_E[expert] = last


@jit
def _walk(ids, valid_pairs, split_ER, table, stride, column_E, left_E, last_E, slot_E, out):
    num_experts = len(column_E)
    for expert in range(num_experts):
        slot_E[expert] = get(table, expert * stride + column_E[expert])
    for i in range(valid_pairs):
        expert = get(ids, i)
        if expert < 0 or expert >= num_experts:
            put(out, i, -1)
            continue
        if left_E[expert] == 0:
            column = column_E[expert] + 1
            while split_ER[expert, column] <= 0:
                column += 1
            column_E[expert] = column
            left_E[expert] = split_ER[expert, column] if column < last_E[expert] else _ENDLESS
            slot_E[expert] = get(table, expert * stride + column)
        left_E[expert] -= 1
        put(out, i, slot_E[expert])


@jit
def map_padding(ids, begin, end, first_E, out):
    """Writes slots ``first_E`` (-1 for an id that is no expert) for the pairs begin to end."""
    for i in range(begin, end):
        expert = get(ids, i)
        put(out, i, first_E[expert] if 0 <= expert < len(first_E) else -1)


@entry
def _assign(ids, wide, pairs, top_k, E, R, split, split_stride, table, wide_table, stride,
            offset, wide_offset, valid, out):  # fmt: skip
    split_ER = int32_at(split, E * split_stride).reshape(E, split_stride)[:, :R]
    topk_ids, slots = ints_at(ids, wide), ints_at(out, wide)
    table_ER, offset_E = ints_at(table, wide_table), ints_at(offset, wide_offset)
    column_E, last_E = np.empty(E, np.int32), np.empty(E, np.int32)
    left_E, slot_E = np.empty(E, np.int64), np.empty(E, np.int64)
    for expert in range(E):
        skip = get(offset_E, expert) if offset != 0 else np.int64(0)
        _start_cursor(split_ER, table_ER, stride, expert, skip, column_E, left_E, last_E)
    valid_pairs = num_valid_pairs(valid, pairs, top_k)
    _walk(
        topk_ids, valid_pairs, split_ER, table_ER, stride, column_E, left_E, last_E, slot_E, slots
    )  # fmt: skip
    if valid_pairs < pairs:
        for expert in range(E):
            first = _first_column(split_ER, expert)
            slot_E[expert] = get(table_ER, expert * stride + first)
        map_padding(topk_ids, valid_pairs, pairs, slot_E, slots)


def assign(
    topk_ids_TK: torch.Tensor,
    split_ER: torch.Tensor,
    logical_to_physical_ER: torch.Tensor,
    offset_E: torch.Tensor | None,
    num_valid_tokens: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """As ``kernels.assign.assign`` into ``out``, arguments already checked."""
    _assign(
        topk_ids_TK.data_ptr(),
        topk_ids_TK.dtype is torch.int64,
        topk_ids_TK.numel(),
        topk_ids_TK.shape[1],
        split_ER.shape[0],
        split_ER.shape[1],
        split_ER.data_ptr(),
        split_ER.stride(0),
        logical_to_physical_ER.data_ptr(),
        logical_to_physical_ER.dtype is torch.int64,
        logical_to_physical_ER.stride(0),
        0 if offset_E is None else offset_E.data_ptr(),
        offset_E is not None and offset_E.dtype is torch.int64,
        0 if num_valid_tokens is None else num_valid_tokens.data_ptr(),
        out.data_ptr(),
    )
