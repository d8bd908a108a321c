"""Bookkeeping of one routed batch on the GPU: one launch, or three of a large one; no host
synchronisation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..limits import MAX_PHYSICAL, MAX_RANKS
from .layout import FIXED as _FIXED
from .layout import Counter, Regime

FIXED = tl.constexpr(_FIXED)
EMPTY = tl.constexpr(int(Counter.EMPTY_BATCHES))
MAX_ACTIVATED = tl.constexpr(int(Counter.MAX_ACTIVATED_SUM))
MAX_TOKENS = tl.constexpr(int(Counter.MAX_TOKENS_SUM))
PAIRS = tl.constexpr(int(Counter.PAIRS))
ACTIVATED = tl.constexpr(int(Counter.ACTIVATED_SUM))
MEMORY_BOUND = tl.constexpr(int(Regime.MEMORY_BOUND))
COMPUTE_BOUND = tl.constexpr(int(Regime.COMPUTE_BOUND))
BLOCK_PAIRS = 1024
FEW_BLOCKS = 4
"""Blocks of pairs that one program counts; of a larger batch several count in parallel."""


@triton.jit
def add_batch(counters, activated_S, tokens_S, num_ranks, regime, SB: tl.constexpr):
    """Adds one batch to the counters; see layout.py. Only one program may do this.

    Atomic additions whose result is not used: nothing waits for memory."""
    pairs = tl.sum(tokens_S, 0)
    if pairs == 0:
        tl.atomic_add(counters + EMPTY, tl.full([], 1, tl.int64))
    else:
        rank_S = tl.arange(0, SB)
        inside_S = rank_S < num_ranks
        tl.atomic_add(counters + regime, tl.full([], 1, tl.int64))
        tl.atomic_add(counters + MAX_ACTIVATED, tl.max(activated_S, 0).to(tl.int64))
        tl.atomic_add(counters + MAX_TOKENS, tl.max(tokens_S, 0).to(tl.int64))
        tl.atomic_add(counters + PAIRS, pairs.to(tl.int64))
        tl.atomic_add(counters + ACTIVATED, tl.sum(activated_S, 0).to(tl.int64))
        tl.atomic_add(counters + FIXED + rank_S, activated_S.to(tl.int64), mask=inside_S)
        rank_tokens = counters + FIXED + num_ranks + rank_S
        tl.atomic_add(rank_tokens, tokens_S.to(tl.int64), mask=inside_S)


@triton.jit
def valid_pairs_of(valid, pairs, top_k, HAS_VALID: tl.constexpr):
    """Pairs in front of the padding."""
    if HAS_VALID:
        pairs = tl.minimum(tl.maximum(tl.load(valid).to(tl.int32) * top_k, 0), pairs)
    return pairs


@triton.jit
def recording(record_enabled, HAS_LOAD: tl.constexpr, HAS_RECORD: tl.constexpr):
    """Whether the load is to be recorded; known to the compiler if there is no flag."""
    if HAS_LOAD and HAS_RECORD:
        return tl.load(record_enabled) != 0
    else:
        return HAS_LOAD


@triton.jit
def count_ids(ids, begin, end, bound, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """How often each id from 0 to ``bound - 1`` occurs in the pairs begin to end, int32 [BINS]."""
    count = tl.zeros([BINS], tl.int32)
    for start in range(begin, end, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        value = tl.load(ids + pair, mask=pair < end, other=-1).to(tl.int32)
        inside = (value >= 0) & (value < bound)
        count += tl.histogram(tl.where(inside, value, 0), BINS, mask=inside)
    return count


@triton.jit
def widen(part_C, first, rank_S, SC: tl.constexpr):
    """[SB] with ``part_C`` at ``first`` to ``first + SC - 1`` and zero elsewhere."""
    part_S = tl.gather(part_C, rank_S & (SC - 1), 0)
    return tl.where((rank_S >= first) & (rank_S < first + SC), part_S, 0)


@triton.jit
def sum_on_ranks(rank_N, values_N, rank_S, SB: tl.constexpr, SC: tl.constexpr):
    """Sum of the values on each rank, [SB]; ``SC`` ranks at a time, to save registers."""
    sum_S = tl.zeros([SB], tl.int32)
    for first in range(0, SB, SC):
        rank_C = first + tl.arange(0, SC)
        here_CN = rank_N[None, :] == rank_C[:, None]
        sum_S += widen(tl.sum(tl.where(here_CN, values_N[None, :], 0), 1), first, rank_S, SC)
    return sum_S


@triton.jit(do_not_specialize=["pairs"])
def count_kernel(ids, out, record_enabled, valid, pairs, top_k, bound,
                 HAS_RECORD: tl.constexpr, HAS_VALID: tl.constexpr, BINS: tl.constexpr,
                 BLOCK: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    """Adds how often each id occurs to ``out``; each program counts ``BLOCKS`` blocks of pairs."""
    if recording(record_enabled, True, HAS_RECORD):
        begin = tl.program_id(0) * BLOCK * BLOCKS
        end = valid_pairs_of(valid, pairs, top_k, HAS_VALID)
        count = count_ids(ids, begin, tl.minimum(begin + BLOCK * BLOCKS, end), bound, BINS, BLOCK)
        bin_B = tl.arange(0, BINS)
        tl.atomic_add(out + bin_B, count, mask=(bin_B < bound) & (count > 0))


@triton.jit(do_not_specialize=["pairs", "regime"])
def record_kernel(ids, counted, load, record_enabled, valid, counters, pairs, top_k, P, S, regime,
                  HAS_COUNTED: tl.constexpr, HAS_LOAD: tl.constexpr, HAS_RECORD: tl.constexpr,
                  HAS_VALID: tl.constexpr, PB: tl.constexpr, SB: tl.constexpr, SC: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    slot_P = tl.arange(0, PB)
    inside_P = slot_P < P
    if HAS_COUNTED:
        tokens_P = tl.load(counted + slot_P, mask=inside_P, other=0)
    else:
        end = valid_pairs_of(valid, pairs, top_k, HAS_VALID)
        tokens_P = count_ids(ids, 0, end, P, PB, BLOCK)
    if recording(record_enabled, HAS_LOAD, HAS_RECORD):
        tl.store(load + slot_P, tl.load(load + slot_P, mask=inside_P) + tokens_P, mask=inside_P)
    rank_P, rank_S = slot_P // (P // S), tl.arange(0, SB)
    tokens_S = sum_on_ranks(rank_P, tokens_P, rank_S, SB, SC)
    activated_S = sum_on_ranks(rank_P, (tokens_P > 0).to(tl.int32), rank_S, SB, SC)
    add_batch(counters, activated_S, tokens_S, S, regime, SB)


@triton.jit
def record_split_kernel(split, table, counters, E, R, P, S, split_stride, stride, regime,
                        HAS_REGIME: tl.constexpr, EB: tl.constexpr, SB: tl.constexpr,
                        SC: tl.constexpr):  # fmt: skip
    expert_E, rank_S = tl.arange(0, EB), tl.arange(0, SB)
    row_E = expert_E.to(tl.int64)
    tokens_S, activated_S = tl.zeros([SB], tl.int32), tl.zeros([SB], tl.int32)
    served_E, width_E = tl.zeros([EB], tl.int32), tl.zeros([EB], tl.int32) + R
    column, held = 0, 1
    while held > 0:
        inside_E = (expert_E < E) & (column < width_E)
        slot_E = tl.load(table + row_E * stride + column, mask=inside_E, other=-1).to(tl.int32)
        is_slot_E = (slot_E >= 0) & (slot_E < P)
        share_E = tl.load(split + row_E * split_stride + column, mask=is_slot_E, other=0)
        rank_E = tl.where(is_slot_E, slot_E // (P // S), -1)
        tokens_S += sum_on_ranks(rank_E, share_E, rank_S, SB, SC)
        activated_S += sum_on_ranks(rank_E, (share_E > 0).to(tl.int32), rank_S, SB, SC)
        served_E += (share_E > 0).to(tl.int32)
        column += 1
        held = tl.max(is_slot_E.to(tl.int32), 0)
    if HAS_REGIME:
        add_batch(counters, activated_S, tokens_S, S, regime, SB)
    else:
        is_spread = (tl.max(served_E, 0) > 1).to(tl.int32)
        how = MEMORY_BOUND + (COMPUTE_BOUND - MEMORY_BOUND) * is_spread
        add_batch(counters, activated_S, tokens_S, S, how, SB)


def bins(size: int, least: int = 1) -> int:
    """``size`` rounded up to a power of two, at least ``least``."""
    return max(triton.next_power_of_2(max(size, 1)), least)


def require_limit(what: str, found: int, most: int) -> None:
    """Returns if a size is within what the GPU kernels hold in registers.

    Raises:
        ValueError: otherwise.
    """
    if found > most:
        raise ValueError(f"the GPU kernels take at most {most} {what}, got {found}.")


def rank_blocks(num_slots: int, num_ranks: int) -> dict[str, int]:
    """SB, and SC: how many ranks fit beside so many slots in the registers of 8 warps."""
    SB = bins(num_ranks, 2)
    return {"SB": SB, "SC": min(SB, 8 if num_slots > 256 else 16)}


def count(
    ids_TK: torch.Tensor,
    out_N: torch.Tensor,
    bound: int,
    record_enabled: torch.Tensor | None = None,
    num_valid_tokens: torch.Tensor | None = None,
) -> None:
    """Adds how often each id from 0 to ``bound - 1`` occurs to ``out_N``, int32; one launch.

    Args:
        record_enabled: bool, one element: false leaves ``out_N`` alone.
        num_valid_tokens: rows from here on do not count.
    """
    require_limit("kinds of ids", bound, MAX_PHYSICAL)
    blocks = triton.cdiv(ids_TK.numel(), BLOCK_PAIRS * FEW_BLOCKS)
    count_kernel[(max(blocks, 1),)](
        ids_TK,
        out_N,
        record_enabled,
        num_valid_tokens,
        ids_TK.numel(),
        ids_TK.shape[1],
        bound,
        HAS_RECORD=record_enabled is not None,
        HAS_VALID=num_valid_tokens is not None,
        BINS=bins(bound, 32),
        BLOCK=BLOCK_PAIRS,
        BLOCKS=FEW_BLOCKS,
        num_warps=8,
    )


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
    require_limit("physical experts", num_physical, MAX_PHYSICAL)
    require_limit("ranks", num_ranks, MAX_RANKS)
    counted_P = None
    if physical_ids_TK.numel() > BLOCK_PAIRS * FEW_BLOCKS:
        counted_P = torch.zeros(num_physical, dtype=torch.int32, device=counters.device)
        count(physical_ids_TK, counted_P, num_physical, num_valid_tokens=num_valid_tokens)
    record_kernel[(1,)](
        physical_ids_TK,
        counted_P,
        load_P,
        record_enabled,
        num_valid_tokens,
        counters,
        physical_ids_TK.numel(),
        physical_ids_TK.shape[1],
        num_physical,
        num_ranks,
        int(regime),
        HAS_COUNTED=counted_P is not None,
        HAS_LOAD=load_P is not None,
        HAS_RECORD=record_enabled is not None,
        HAS_VALID=num_valid_tokens is not None,
        PB=bins(num_physical, 32),
        BLOCK=BLOCK_PAIRS,
        num_warps=8,
        **rank_blocks(num_physical, num_ranks),
    )


def record_load(
    physical_ids_TK: torch.Tensor,
    num_physical: int,
    load_P: torch.Tensor,
    record_enabled: torch.Tensor | None,
) -> None:
    """As ``kernels.record.record_load``, arguments already checked."""
    count(physical_ids_TK, load_P, num_physical, record_enabled)


def record_split(
    split_ER: torch.Tensor,
    logical_to_physical_ER: torch.Tensor,
    num_physical: int,
    num_ranks: int,
    counters: torch.Tensor,
    regime: int | None,
) -> None:
    """As ``kernels.record.record_split``, arguments already checked."""
    num_experts, num_columns = split_ER.shape
    require_limit("experts", num_experts, MAX_PHYSICAL)
    require_limit("ranks", num_ranks, MAX_RANKS)
    record_split_kernel[(1,)](
        split_ER,
        logical_to_physical_ER,
        counters,
        num_experts,
        num_columns,
        num_physical,
        num_ranks,
        split_ER.stride(0),
        logical_to_physical_ER.stride(0),
        0 if regime is None else int(regime),
        HAS_REGIME=regime is not None,
        EB=bins(num_experts, 32),
        num_warps=8,
        **rank_blocks(num_experts, num_ranks),
    )
