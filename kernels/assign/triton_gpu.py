"""General assignment on the GPU: one program per expert, no atomics, deterministic.

Program e reads all ids in blocks and finds the occurrences of expert e by a running prefix sum;
one more program writes -1 for ids that are no expert. So every pair is written by one program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..record.triton_gpu import BLOCK_PAIRS, bins, valid_pairs_of


@triton.jit
def write_non_experts(ids, out, pairs, num_experts, BLOCK: tl.constexpr):
    """Writes -1 for every id that is no expert."""
    for start in range(0, pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        inside = pair < pairs
        expert = tl.load(ids + pair, mask=inside, other=0).to(tl.int32)
        tl.store(out + pair, tl.full([BLOCK], -1, tl.int32),
                 mask=inside & ((expert < 0) | (expert >= num_experts)))  # fmt: skip


@triton.jit
def occurrences(ids, start, pairs, valid_pairs, expert, seen, BLOCK: tl.constexpr):
    """Of one block: the pairs, which are this expert's, their occurrence numbers (-1 for padding)
    and the number seen after the block."""
    pair = start + tl.arange(0, BLOCK)
    mine = tl.load(ids + pair, mask=pair < pairs, other=-1).to(tl.int32) == expert
    counted = (mine & (pair < valid_pairs)).to(tl.int32)
    number = tl.where(counted > 0, seen + tl.cumsum(counted, 0) - 1, -1)
    return pair, mine, number, seen + tl.sum(counted, 0)


@triton.jit
def replicas_of(row, R, RB: tl.constexpr):
    """Slots in a row of the map, which has -1 behind the last one."""
    column_R = tl.arange(0, RB)
    slot_R = tl.load(row + column_R, mask=column_R < R, other=-1)
    return tl.sum((slot_R >= 0).to(tl.int32), 0)


@triton.jit(do_not_specialize=["pairs"])
def assign_kernel(ids, split, table, offset, valid, out, pairs, top_k, E, R, split_stride, stride,
                  HAS_OFFSET: tl.constexpr, HAS_VALID: tl.constexpr, RB: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    expert = tl.program_id(0)
    if expert == E:
        write_non_experts(ids, out, pairs, E, BLOCK)
    else:
        valid_pairs = valid_pairs_of(valid, pairs, top_k, HAS_VALID)
        first = tl.full([], -1, tl.int32)
        last = tl.full([], 0, tl.int32)
        count = replicas_of(table + expert.to(tl.int64) * stride, R, RB)
        for column in range(count):
            share = tl.load(split + expert * split_stride + column)
            last = tl.where(share > 0, column, last)
            first = tl.where((first < 0) & (share > 0), column, first)
        first = tl.maximum(first, 0)
        seen = tl.zeros([], tl.int32)
        if HAS_OFFSET:
            seen = tl.load(offset + expert).to(tl.int32)
        for start in range(0, pairs, BLOCK):
            pair, mine, number, seen = occurrences(
                ids, start, pairs, valid_pairs, expert, seen, BLOCK
            )
            column_B = tl.full([BLOCK], 0, tl.int32) + first
            end = tl.zeros([], tl.int32)
            for column in range(count):
                share = tl.load(split + expert * split_stride + column)
                inside = (number >= end) & ((number < end + share) | (column == last))
                column_B = tl.where((share > 0) & inside, column, column_B)
                end += tl.maximum(share, 0)
            slot = tl.load(table + expert.to(tl.int64) * stride + column_B, mask=mine)
            tl.store(out + pair, slot, mask=mine)


def assign(
    topk_ids_TK: torch.Tensor,
    split_ER: torch.Tensor,
    logical_to_physical_ER: torch.Tensor,
    offset_E: torch.Tensor | None,
    num_valid_tokens: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """As ``kernels.assign.assign`` into ``out``, arguments already checked."""
    num_experts, num_columns = split_ER.shape
    assign_kernel[(num_experts + 1,)](
        topk_ids_TK,
        split_ER,
        logical_to_physical_ER,
        offset_E,
        num_valid_tokens,
        out,
        topk_ids_TK.numel(),
        topk_ids_TK.shape[1],
        num_experts,
        num_columns,
        split_ER.stride(0),
        logical_to_physical_ER.stride(0),
        HAS_OFFSET=offset_E is not None,
        HAS_VALID=num_valid_tokens is not None,
        RB=bins(num_columns),
        BLOCK=BLOCK_PAIRS,
        num_warps=4,
    )
