"""Bookkeeping of one routed batch on the GPU: one program, no host synchronisation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..limits import MAX_PHYSICAL, MAX_RANKS
from .layout import FIXED as _FIXED
from .layout import Counter, Regime, activated_slice, tokens_slice

FIXED = tl.constexpr(_FIXED)
EMPTY = tl.constexpr(int(Counter.EMPTY_BATCHES))
MAX_ACTIVATED = tl.constexpr(int(Counter.MAX_ACTIVATED_SUM))
MAX_TOKENS = tl.constexpr(int(Counter.MAX_TOKENS_SUM))
PAIRS = tl.constexpr(int(Counter.PAIRS))
ACTIVATED = tl.constexpr(int(Counter.ACTIVATED_SUM))
BLOCK_PAIRS = 1024


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


@triton.jit(do_not_specialize=["pairs"])
def record_kernel(ids, load, record_enabled, valid, counters, pairs, top_k, P, S, regime,
                  HAS_LOAD: tl.constexpr, HAS_RECORD: tl.constexpr, HAS_VALID: tl.constexpr,
                  PB: tl.constexpr, SB: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    end = valid_pairs_of(valid, pairs, top_k, HAS_VALID)
    tokens_P = count_ids(ids, 0, end, P, PB, BLOCK)
    slot_P = tl.arange(0, PB)
    if recording(record_enabled, HAS_LOAD, HAS_RECORD):
        inside_P = slot_P < P
        tl.store(load + slot_P, tl.load(load + slot_P, mask=inside_P) + tokens_P, mask=inside_P)
    here_PS = (slot_P // (P // S))[:, None] == tl.arange(0, SB)[None, :]
    tokens_S = tl.sum(tl.where(here_PS, tokens_P[:, None], 0), 0)
    activated_S = tl.sum((here_PS & (tokens_P > 0)[:, None]).to(tl.int32), 0)
    add_batch(counters, activated_S, tokens_S, S, regime, SB)


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
    record_kernel[(1,)](
        physical_ids_TK,
        load_P,
        record_enabled,
        num_valid_tokens,
        counters,
        physical_ids_TK.numel(),
        physical_ids_TK.shape[1],
        num_physical,
        num_ranks,
        int(regime),
        HAS_LOAD=load_P is not None,
        HAS_RECORD=record_enabled is not None,
        HAS_VALID=num_valid_tokens is not None,
        PB=bins(num_physical, 32),
        SB=bins(num_ranks, 2),
        BLOCK=BLOCK_PAIRS,
        num_warps=8,
    )


def record_load(
    physical_ids_TK: torch.Tensor,
    num_physical: int,
    load_P: torch.Tensor,
    record_enabled: torch.Tensor | None,
) -> None:
    """As ``kernels.record.record_load``, arguments already checked; in torch operations."""
    slots_N = physical_ids_TK.flatten().long()
    counted_N = (slots_N >= 0) & (slots_N < num_physical)
    if record_enabled is not None:
        counted_N &= record_enabled.view(())
    load_P.scatter_add_(0, slots_N.clamp(0, num_physical - 1), counted_N.to(load_P.dtype))


def record_split(
    split_ER: torch.Tensor,
    logical_to_physical_ER: torch.Tensor,
    num_physical: int,
    num_ranks: int,
    counters: torch.Tensor,
    regime: int | None,
) -> None:
    """As ``kernels.record.record_split``, arguments already checked; in torch operations."""
    table_ER = logical_to_physical_ER[:, : split_ER.shape[1]]
    slots_ER = torch.where(table_ER < 0, num_physical, table_ER).long()
    tokens_P = split_ER.new_zeros(num_physical + 1)
    tokens_P.scatter_add_(0, slots_ER.flatten(), split_ER.flatten())
    tokens_SP = tokens_P[:-1].view(num_ranks, -1)
    tokens_S, activated_S = tokens_SP.sum(1), (tokens_SP > 0).sum(1)
    is_empty = (tokens_S.sum() == 0).long()
    if regime is None:
        is_spread = ((split_ER > 0).sum(1) > 1).any().long()
    else:
        is_spread = (1 - is_empty) * int(regime == Regime.COMPUTE_BOUND)
    batch = torch.zeros_like(counters)
    batch[Counter.EMPTY_BATCHES] = is_empty
    batch[Counter.COMPUTE_BOUND_BATCHES] = is_spread
    batch[Counter.MEMORY_BOUND_BATCHES] = 1 - is_empty - is_spread
    batch[Counter.MAX_ACTIVATED_SUM] = activated_S.max()
    batch[Counter.MAX_TOKENS_SUM] = tokens_S.max()
    batch[Counter.PAIRS] = tokens_S.sum()
    batch[Counter.ACTIVATED_SUM] = activated_S.sum()
    batch[activated_slice(num_ranks)] = activated_S
    batch[tokens_slice(num_ranks)] = tokens_S
    counters += batch
