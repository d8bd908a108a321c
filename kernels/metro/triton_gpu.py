"""METRO on the GPU in one launch: program 0 counts, chooses, maps and records.

In the memory-bound regime the other programs (one per expert) leave after counting; in the
compute-bound regime each splits its expert's tokens over the replicas. Fixed buffers, no scratch
memory, nothing that depends on the order of programs, no host synchronisation: safe inside CUDA
graphs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..assign.triton_gpu import occurrences, write_non_experts
from ..limits import MAX_EXPERTS, MAX_PAIRS, MAX_PHYSICAL, MAX_RANKS
from ..record.triton_gpu import (
    BLOCK_PAIRS,
    COMPUTE_BOUND,
    MEMORY_BOUND,
    add_batch,
    bins,
    count_ids,
    recording,
    require_limit,
    sum_on_ranks,
    valid_pairs_of,
)
from .triton_choice import choose_columns, load_ranks

MAX_REPLICAS = 8
"""The choice uses the first 8 replicas of an expert; the even split uses all."""


@triton.jit
def map_pairs(ids, out, pairs, slot_E, E, BLOCK: tl.constexpr):
    """Writes the slot of each pair's expert, -1 where the id is no expert."""
    for start in range(0, pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        inside = pair < pairs
        expert = tl.load(ids + pair, mask=inside, other=-1).to(tl.int32)
        is_expert = (expert >= 0) & (expert < E)
        slot = tl.gather(slot_E, tl.where(is_expert, expert, 0), 0)
        tl.store(out + pair, tl.where(is_expert, slot, -1), mask=inside)


@triton.jit
def even_share(expert, tokens, count, column):
    """Tokens of one replica under the even split (assign/reference.py)."""
    base = tokens // count
    turn = (column + count - (expert + base) % count) % count
    return base + (turn < tokens % count).to(tl.int32)


@triton.jit
def record_even(tokens_E, table, replicas, stride, E, P, S, counters, expert_E,
                EB: tl.constexpr, SB: tl.constexpr, SC: tl.constexpr):  # fmt: skip
    """Adds a batch split evenly over all replicas to the counters."""
    inside_E = expert_E < E
    count_E = tl.load(replicas + expert_E, mask=inside_E, other=1).to(tl.int32)
    count_E = tl.minimum(tl.maximum(count_E, 1), stride)
    rank_S = tl.arange(0, SB)
    tokens_S, activated_S = tl.zeros([SB], tl.int32), tl.zeros([SB], tl.int32)
    for column in range(0, tl.max(count_E, 0)):
        share_E = even_share(expert_E, tokens_E, count_E, column)
        share_E = tl.where(inside_E & (column < count_E), share_E, 0)
        slot_E = tl.load(table + expert_E.to(tl.int64) * stride + column, mask=share_E > 0,
                         other=-1).to(tl.int32)  # fmt: skip
        rank_E = tl.where((slot_E >= 0) & (slot_E < P), slot_E // (P // S), -1)
        tokens_S += sum_on_ranks(rank_E, share_E, rank_S, SB, SC)
        activated_S += sum_on_ranks(rank_E, (rank_E >= 0).to(tl.int32), rank_S, SB, SC)
    add_batch(counters, activated_S, tokens_S, S, COMPUTE_BOUND, SB)


@triton.jit
def split_expert(ids, out, table, replicas, load, pairs, valid_pairs, tokens, expert, stride, P,
                 record_load, HAS_LOAD: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Writes the slots of one expert's pairs under the even split and records its load."""
    count = tl.minimum(tl.maximum(tl.load(replicas + expert).to(tl.int32), 1), stride)
    row = table + expert.to(tl.int64) * stride
    first = tl.full([], -1, tl.int32)
    for column in range(0, count):
        share = even_share(expert, tokens, count, column)
        first = tl.where((first < 0) & (share > 0), column, first)
        if HAS_LOAD:
            slot = tl.load(row + column).to(tl.int32)
            if record_load & (share > 0) & (slot >= 0) & (slot < P):
                tl.store(load + slot, tl.load(load + slot) + share)
    first = tl.maximum(first, 0)
    seen = tl.zeros([], tl.int32)
    for start in range(0, pairs, BLOCK):
        pair, mine, number, seen = occurrences(ids, start, pairs, valid_pairs, expert, seen, BLOCK)
        column_B = tl.zeros([BLOCK], tl.int32)
        end = tl.zeros([], tl.int32)
        for column in range(0, count):
            end += even_share(expert, tokens, count, column)
            column_B += (number >= end).to(tl.int32)
        column_B = tl.where(number < 0, first, column_B)
        tl.store(out + pair, tl.load(row + column_B, mask=mine), mask=mine)


@triton.jit
def is_compute_bound(tokens_E, knee_tokens):
    """Whether active experts have more than ``knee_tokens`` tokens on average."""
    total, active = tl.sum(tokens_E, 0), tl.sum((tokens_E > 0).to(tl.int32), 0)
    return (total > 0) & (total.to(tl.float32) > knee_tokens * active.to(tl.float32))


@triton.jit(do_not_specialize=["pairs"])
def route_kernel(ids, table, replicas, load, record_enabled, valid, counters, out,
                 knee_tokens, pairs, top_k, E, P, S, stride,
                 HAS_LOAD: tl.constexpr, HAS_RECORD: tl.constexpr, HAS_VALID: tl.constexpr,
                 EB: tl.constexpr, RB: tl.constexpr, SB: tl.constexpr, SC: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    expert_E = tl.arange(0, EB)
    valid_pairs = valid_pairs_of(valid, pairs, top_k, HAS_VALID)
    tokens_E = count_ids(ids, 0, valid_pairs, E, EB, BLOCK)
    compute_bound = is_compute_bound(tokens_E, knee_tokens)
    record_load = recording(record_enabled, HAS_LOAD, HAS_RECORD)
    if compute_bound:
        if program == 0:
            write_non_experts(ids, out, pairs, E, BLOCK)
            record_even(tokens_E, table, replicas, stride, E, P, S, counters, expert_E, EB, SB, SC)
        else:
            tokens = tl.sum(tl.where(expert_E == program - 1, tokens_E, 0), 0)
            split_expert(ids, out, table, replicas, load, pairs, valid_pairs, tokens, program - 1,
                         stride, P, record_load, HAS_LOAD, BLOCK)  # fmt: skip
    elif program == 0:
        packed_E = load_ranks(table, replicas, stride, E, P, S, expert_E, RB)
        column_E, activated_S, tokens_S = choose_columns(
            tokens_E, packed_E, S, expert_E, EB, RB, SB, SC
        )
        address_E = table + expert_E.to(tl.int64) * stride + tl.maximum(column_E, 0)
        slot_E = tl.load(address_E, mask=expert_E < E, other=-1).to(tl.int32)
        map_pairs(ids, out, pairs, slot_E, E, BLOCK)
        if HAS_LOAD:  # noqa: SIM102 - known to the compiler, the flag below is not
            if record_load:
                uses_E = (column_E >= 0) & (slot_E >= 0)
                old_E = tl.load(load + slot_E, mask=uses_E, other=0)
                tl.store(load + slot_E, old_E + tokens_E, mask=uses_E)
        add_batch(counters, activated_S, tokens_S, S, MEMORY_BOUND, SB)


@triton.jit
def choose_kernel(tokens, table, replicas, out, E, P, S, stride,
                  EB: tl.constexpr, RB: tl.constexpr, SB: tl.constexpr,
                  SC: tl.constexpr):  # fmt: skip
    expert_E = tl.arange(0, EB)
    tokens_E = tl.load(tokens + expert_E, mask=expert_E < E, other=0)
    packed_E = load_ranks(table, replicas, stride, E, P, S, expert_E, RB)
    column_E, _, _ = choose_columns(tokens_E, packed_E, S, expert_E, EB, RB, SB, SC)
    tl.store(out + expert_E, column_E, mask=expert_E < E)


@triton.jit
def split_kernel(tokens, table, replicas, out, knee_tokens, E, P, S, stride, out_stride,
                 EB: tl.constexpr, RB: tl.constexpr, SB: tl.constexpr,
                 SC: tl.constexpr):  # fmt: skip
    """Tokens of each replica, into zeros."""
    expert_E = tl.arange(0, EB)
    inside_E = expert_E < E
    tokens_E = tl.load(tokens + expert_E, mask=inside_E, other=0)
    row_E = out + expert_E.to(tl.int64) * out_stride
    if is_compute_bound(tokens_E, knee_tokens):
        count_E = tl.load(replicas + expert_E, mask=inside_E, other=1).to(tl.int32)
        count_E = tl.minimum(tl.maximum(count_E, 1), out_stride)
        for column in range(0, tl.max(count_E, 0)):
            share_E = even_share(expert_E, tokens_E, count_E, column)
            tl.store(row_E + column, share_E, mask=inside_E & (column < count_E))
    else:
        packed_E = load_ranks(table, replicas, stride, E, P, S, expert_E, RB)
        column_E, _, _ = choose_columns(tokens_E, packed_E, S, expert_E, EB, RB, SB, SC)
        tl.store(row_E + tl.maximum(column_E, 0), tokens_E, mask=inside_E & (column_E >= 0))


def block_sizes(num_experts: int, num_columns: int, num_ranks: int) -> dict[str, int]:
    """Sizes that the kernels are compiled for: powers of two, and the warps to hold them."""
    EB, SB = bins(num_experts, 32), bins(num_ranks, 2)
    num_warps = max(EB // 32, 4)
    return {
        "EB": EB,
        "RB": bins(min(num_columns, MAX_REPLICAS)),
        "SB": SB,
        "SC": min(SB, 8 if EB > 256 else 16),
        "num_warps": num_warps,
    } | _registers(num_warps)


def _registers(num_warps: int) -> dict[str, int]:
    """One program runs alone on its multiprocessor: it may have all registers. AMD's compiler has
    no such option."""
    if torch.version.hip is not None:
        return {}
    return {"maxnreg": min(65536 // (32 * num_warps) // 8 * 8, 255)}


def _refuse_turns(free_tokens: float | None) -> None:
    if free_tokens is not None:
        raise ValueError(
            f"free_tokens={free_tokens:g} describes ranks that compute their experts in turn, as "
            f"CPU cores do; a GPU's experts overlap. Leave it away there: knee_tokens decides."
        )


def _require_limits(num_experts: int, num_physical: int, num_ranks: int) -> None:
    require_limit("logical experts", num_experts, MAX_EXPERTS)
    require_limit("physical experts", num_physical, MAX_PHYSICAL)
    require_limit("ranks", num_ranks, MAX_RANKS)


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
    """As ``kernels.metro.route`` into ``out``, arguments already checked.

    Raises:
        ValueError: more experts, ranks or pairs than the kernel takes, or free_tokens.
    """
    _refuse_turns(free_tokens)
    num_experts, num_columns = logical_to_physical_ER.shape
    _require_limits(num_experts, num_physical, num_ranks)
    require_limit("(token, choice) pairs", topk_ids_TK.numel(), MAX_PAIRS)
    sizes = block_sizes(num_experts, num_columns, num_ranks)
    # With at most knee_tokens pairs no batch is compute-bound: one program is enough.
    programs = 1 if topk_ids_TK.numel() <= knee_tokens else 1 + num_experts
    route_kernel[(programs,)](
        topk_ids_TK,
        logical_to_physical_ER,
        num_replicas_E,
        load_P,
        record_enabled,
        num_valid_tokens,
        counters,
        out,
        float(knee_tokens),
        topk_ids_TK.numel(),
        topk_ids_TK.shape[1],
        num_experts,
        num_physical,
        num_ranks,
        logical_to_physical_ER.stride(0),
        HAS_LOAD=load_P is not None,
        HAS_RECORD=record_enabled is not None,
        HAS_VALID=num_valid_tokens is not None,
        BLOCK=BLOCK_PAIRS,
        **sizes,
    )


def choose(
    tokens_E: torch.Tensor,
    logical_to_physical_ER: torch.Tensor,
    num_replicas_E: torch.Tensor,
    num_ranks: int,
    num_physical: int,
    out: torch.Tensor,
) -> None:
    """As ``kernels.metro.choose`` into ``out``, arguments already checked.

    Raises:
        ValueError: more experts or ranks than the kernel takes.
    """
    num_experts, num_columns = logical_to_physical_ER.shape
    _require_limits(num_experts, num_physical, num_ranks)
    sizes = block_sizes(num_experts, num_columns, num_ranks)
    choose_kernel[(1,)](
        tokens_E,
        logical_to_physical_ER,
        num_replicas_E,
        out,
        num_experts,
        num_physical,
        num_ranks,
        logical_to_physical_ER.stride(0),
        **sizes,
    )


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
    """As ``kernels.metro.split`` into ``out``, [E, R] dense, arguments already checked.

    Raises:
        ValueError: more experts or ranks than the kernel takes, or free_tokens.
    """
    _refuse_turns(free_tokens)
    num_experts, num_columns = logical_to_physical_ER.shape
    _require_limits(num_experts, num_physical, num_ranks)
    out.zero_()
    split_kernel[(1,)](
        tokens_E,
        logical_to_physical_ER,
        num_replicas_E,
        out,
        float(knee_tokens),
        num_experts,
        num_physical,
        num_ranks,
        logical_to_physical_ER.stride(0),
        out.stride(0),
        **block_sizes(num_experts, num_columns, num_ranks),
    )
