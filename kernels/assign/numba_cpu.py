"""General assignment on the CPU: one pass over the pairs with a cursor per expert."""

from __future__ import annotations

import numpy as np
import torch

from ..numba_memory import entry, get, int32_at, ints_at, jit, num_valid_pairs, put


@jit
def even_share(expert, tokens, replicas, column):
    """Tokens of one replica under the even split (see reference.py)."""
    base = tokens // replicas
    return base + (1 if (column - expert - base) % replicas < tokens % replicas else 0)


@jit
def _start_cursor(split_ER, expert, skip, column_E, left_E, last_E):
    """Points the expert's cursor at occurrence ``skip``: current column, tokens left in it."""
    column, last = -1, -1
    left = np.int64(0)
    for replica in range(split_ER.shape[1]):
        share = np.int64(split_ER[expert, replica])
        if share <= 0:
            continue
        last = replica
        if column < 0:
            if skip < share:
                column, left = replica, share - skip
            else:
                skip -= share
    column_E[expert] = column if column >= 0 else last
    left_E[expert] = left
    last_E[expert] = last


@jit
def _walk(ids, valid_pairs, split_ER, table, stride, column_E, left_E, last_E, out):
    for i in range(valid_pairs):
        expert = get(ids, i)
        if expert < 0 or expert >= len(column_E):
            put(out, i, -1)
            continue
        column = column_E[expert]
        if left_E[expert] == 0 and column < last_E[expert]:
            column += 1
            while split_ER[expert, column] <= 0:
                column += 1
            column_E[expert] = column
            left_E[expert] = split_ER[expert, column]
        left_E[expert] = max(left_E[expert] - 1, 0)
        put(out, i, get(table, expert * stride + max(column, 0)))


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
    topk_ids, slots = ints_at(ids, pairs, wide), ints_at(out, pairs, wide)
    table_ER, offset_E = ints_at(table, E * stride, wide_table), ints_at(offset, E, wide_offset)
    column_E, last_E = np.empty(E, np.int32), np.empty(E, np.int32)
    left_E, first_E = np.empty(E, np.int64), np.empty(E, np.int64)
    for expert in range(E):
        _start_cursor(split_ER, expert, 0, column_E, left_E, last_E)
        first_E[expert] = get(table_ER, expert * stride + max(column_E[expert], 0))
        if offset != 0:
            _start_cursor(split_ER, expert, get(offset_E, expert), column_E, left_E, last_E)
    valid_pairs = num_valid_pairs(valid, pairs, top_k)
    _walk(topk_ids, valid_pairs, split_ER, table_ER, stride, column_E, left_E, last_E, slots)
    map_padding(topk_ids, valid_pairs, pairs, first_E, slots)


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
