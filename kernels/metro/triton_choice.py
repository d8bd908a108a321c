"""The choice of METRO as Triton device functions; parallel_reference.py says what they compute.

One program holds everything in registers: experts along ``EB`` (E rounded up to a power of two),
ranks along ``SB``, replicas along ``RB``. Experts are the last axis of every table, so that a
thread holds whole experts and not one expert many times; of experts x ranks only ``SC`` ranks
exist at a time. ``hosts_E`` has bit s set if the expert has a replica on rank s. Nothing but the
maps is read from memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..record.triton_gpu import sum_on_ranks, widen
from .parallel_reference import ALONE as _ALONE
from .parallel_reference import MAX_SHIFTS as _MAX_SHIFTS

NONE = tl.constexpr(2**30)
"""Larger than every 32-bit key."""
NO_RANK = tl.constexpr(255)
ALONE = tl.constexpr(_ALONE)
MAX_SHIFTS = tl.constexpr(_MAX_SHIFTS)


@triton.jit
def _or(left, right):
    return left | right


@triton.jit
def _any_of(masks_E, selected_E):
    """Bitwise or of the selected masks, a scalar."""
    return tl.reduce(tl.where(selected_E, masks_E, 0), 0, _or)


@triton.jit
def _has(mask, bit):
    """Whether a bit of an int64 mask is set."""
    return ((mask >> bit.to(tl.int64)) & 1) != 0


@triton.jit
def _at(values, index, position):
    """Element ``position`` of ``values``, a scalar; ``index`` is the arange over the axis."""
    return tl.sum(tl.where(index == position, values, 0), 0)


@triton.jit
def load_ranks(table, replicas, stride, E, P, S, expert_E, RB: tl.constexpr):
    """Ranks of each expert's replicas, 8 bits each in one int64, ``NO_RANK`` where there is none
    (or beyond ``RB``): two registers per expert, where a table would take ``RB``."""
    inside_E = expert_E < E
    count_E = tl.load(replicas + expert_E, mask=inside_E, other=0).to(tl.int32)
    count_E = tl.minimum(count_E, stride)
    row_E = table + expert_E.to(tl.int64) * stride
    packed_E = tl.zeros_like(expert_E).to(tl.int64)
    for column in tl.static_range(RB):
        slot_E = tl.load(row_E + column, mask=column < count_E, other=-1).to(tl.int32)
        rank_E = tl.where((slot_E >= 0) & (slot_E < P), slot_E // (P // S), NO_RANK)
        packed_E |= rank_E.to(tl.int64) << (8 * column)
    return packed_E


@triton.jit
def _unpack(packed_E, RB: tl.constexpr):
    """The ranks again, [RB, EB] int32."""
    shift_R = (tl.arange(0, RB) * 8).to(tl.int64)
    return ((packed_E[None, :] >> shift_R[:, None]) & NO_RANK).to(tl.int32)


@triton.jit
def _lookup(values_S, ranks_RE, RB: tl.constexpr, EB: tl.constexpr, SB: tl.constexpr):
    """``values_S`` at every rank, [RB, EB]; anything at ``NO_RANK``."""
    index = tl.reshape(ranks_RE & (SB - 1), [RB * EB])
    return tl.reshape(tl.gather(values_S, index, 0), [RB, EB])


@triton.jit
def _accept(target_E, activated_S, limit, rank_S, SB: tl.constexpr, SC: tl.constexpr):
    """Which claims are accepted, in expert order, 0 or 1 [EB], and how many per rank [SB]."""
    accepted_E = tl.zeros_like(target_E)
    accepted_S = tl.zeros([SB], tl.int32)
    for first in range(0, SB, SC):
        rank_C = first + tl.arange(0, SC)
        claims_CE = (target_E[None, :] == rank_C[:, None]).to(tl.int32)
        room_C = limit - tl.gather(activated_S, rank_C, 0)
        order_CE = tl.cumsum(claims_CE, 1)
        accepted_CE = tl.where(order_CE <= room_C[:, None], claims_CE, 0)
        accepted_E += tl.max(accepted_CE, 0)
        accepted_S += widen(tl.sum(accepted_CE, 1), first, rank_S, SC)
    return accepted_E, accepted_S


@triton.jit
def _claim(packed_E, rank_E, waiting_E, activated_S, limit, expert_E, rank_S,
           EB: tl.constexpr, RB: tl.constexpr, SB: tl.constexpr, SC: tl.constexpr):  # fmt: skip
    """One claim round: the new ranks, who still waits, activated experts, whether any claimed."""
    ranks_RE = _unpack(tl.where(waiting_E, packed_E, -1), RB)
    activated_RE = _lookup(activated_S, ranks_RE, RB, EB, SB)
    key_RE = activated_RE * 4096 + ((ranks_RE - expert_E[None, :]) & 63) * 64 + ranks_RE
    usable_RE = (ranks_RE != NO_RANK) & (activated_RE < limit)
    best_E = tl.min(tl.where(usable_RE, key_RE, NONE), 0)
    claims_E = best_E < NONE
    target_E = tl.where(claims_E, best_E & 63, -1)
    any_claim = tl.max(claims_E.to(tl.int32), 0) > 0
    if any_claim:
        accepted_E, accepted_S = _accept(target_E, activated_S, limit, rank_S, SB, SC)
        rank_E = tl.where(accepted_E > 0, target_E, rank_E)
        waiting_E = waiting_E & (accepted_E == 0)
        activated_S += accepted_S
    return rank_E, waiting_E, activated_S, any_claim


@triton.jit
def _search(hosts_E, rank_E, waiting_E, activated_S, limit, rank_S):
    """Breadth first from all waiting experts at once.

    Returns the free rank reached (NONE if there is none), its depth, the depth of every rank and
    the limit, raised if no free rank was reached.
    """
    reached = _any_of(hosts_E, waiting_E)
    latest = reached
    depth = tl.zeros_like(limit)
    depth_S = tl.where(_has(reached, rank_S), 0, -1)
    target = tl.min(tl.where((depth_S >= 0) & (activated_S < limit), activated_S * 64 + rank_S,
                             NONE), 0)  # fmt: skip
    searching = target == NONE
    while searching:
        on_latest_E = (rank_E >= 0) & _has(latest, tl.where(rank_E < 0, 0, rank_E))
        latest = _any_of(hosts_E, on_latest_E) & ~reached
        if latest == 0:
            carried = tl.sum(tl.where(depth_S >= 0, activated_S, 0), 0)
            carried += tl.sum(waiting_E.to(tl.int32), 0)
            full = tl.sum((depth_S >= 0).to(tl.int32), 0)
            limit = tl.maximum(limit + 1, (carried + full - 1) // full)
            searching = target != NONE
        else:
            depth += 1
            reached |= latest
            depth_S = tl.where(_has(latest, rank_S), depth, depth_S)
            free_S = (depth_S == depth) & (activated_S < limit)
            target = tl.min(tl.where(free_S, activated_S * 64 + rank_S, NONE), 0)
            searching = target == NONE
    return target, depth, depth_S, limit


@triton.jit
def _place(hosts_E, rank_E, waiting_E, depth_S, rank, depth, expert_E, rank_S):
    """Moves the experts on the path to ``rank`` one on; returns the ranks and who still waits."""
    while depth > 0:
        depth -= 1
        bit_S = tl.full([1], 1, tl.int64) << rank_S.to(tl.int64)
        before = tl.sum(tl.where(depth_S == depth, bit_S, 0), 0)
        can_E = (rank_E >= 0) & _has(before, tl.where(rank_E < 0, 0, rank_E)) & _has(hosts_E, rank)
        first = tl.min(tl.where(can_E, expert_E * 64 + rank_E, NONE), 0)
        rank_E = tl.where(expert_E == first // 64, rank, rank_E)
        rank = first & 63
    first = tl.min(tl.where(waiting_E & _has(hosts_E, rank), expert_E, NONE), 0)
    return tl.where(expert_E == first, rank, rank_E), waiting_E & (expert_E != first)


@triton.jit
def _partners(key_E, returns_E, rank_E, rank_S, SB: tl.constexpr, SC: tl.constexpr):
    """Least key of the experts of each rank that may return, [SB]."""
    partner_S = tl.zeros([SB], tl.int32)
    for first in range(0, SB, SC):
        rank_C = first + tl.arange(0, SC)
        here_CE = returns_E[None, :] & (rank_E[None, :] == rank_C[:, None])
        least_C = tl.min(tl.where(here_CE, key_E[None, :], 2147483647), 1)
        partner_S += widen(least_C, first, rank_S, SC)
    return partner_S


@triton.jit
def _shift_tokens(tokens_E, packed_E, hosts_E, rank_E, movable_E, activated_S, tokens_S, limit,
                  num_ranks, expert_E, rank_S, EB: tl.constexpr, RB: tl.constexpr,
                  SB: tl.constexpr, SC: tl.constexpr):  # fmt: skip
    """Moves or swaps experts off the rank with the most tokens; returns ranks, both loads."""
    mean = (tl.sum(tokens_S, 0) + num_ranks - 1) // num_ranks
    shifts = tl.zeros_like(limit)
    while shifts < MAX_SHIFTS:
        shifts += 1
        first = tl.max(tokens_S * 64 + (63 - rank_S), 0)
        most, busiest = first // 64, 63 - (first & 63)
        returns_E = movable_E & _has(hosts_E, busiest)
        key_E = tokens_E * 1024 + expert_E
        partner_S = _partners(key_E, returns_E, rank_E, rank_S, SB, SC)
        partner_S = tl.where(activated_S < limit, ALONE, partner_S)
        ranks_RE = _unpack(tl.where(movable_E & (rank_E == busiest), packed_E, -1), RB)
        partner_RE = _lookup(partner_S, ranks_RE, RB, EB, SB)
        load_RE = _lookup(tokens_S, ranks_RE, RB, EB, SB)
        gain_RE = tokens_E[None, :] - partner_RE // 1024
        usable_RE = (ranks_RE != NO_RANK) & (ranks_RE != busiest) & (gain_RE > 0)
        larger_RE = tl.where(usable_RE, tl.maximum(load_RE + gain_RE, most - gain_RE), NONE)
        best = tl.min(tl.min(larger_RE, 0), 0)
        if (best < most) & (most > mean):
            key_RE = tl.where(larger_RE == best, expert_E[None, :] * 64 + ranks_RE, NONE)
            first = tl.min(tl.min(key_RE, 0), 0)
            expert, rank = first // 64, first & 63
            partner = _at(partner_S, rank_S, rank)
            gain = _at(tokens_E, expert_E, expert) - partner // 1024
            step_S = (rank_S == rank).to(tl.int32) - (rank_S == busiest).to(tl.int32)
            tokens_S += step_S * gain
            activated_S += tl.where((partner & 1023) == ALONE, step_S, 0)
            rank_E = tl.where(expert_E == expert, rank, rank_E)
            rank_E = tl.where(expert_E == (partner & 1023), busiest, rank_E)
        else:
            shifts = tl.full([], MAX_SHIFTS, tl.int32)
    return rank_E, activated_S, tokens_S


@triton.jit
def choose_columns(tokens_E, packed_E, num_ranks, expert_E, EB: tl.constexpr, RB: tl.constexpr,
                   SB: tl.constexpr, SC: tl.constexpr):  # fmt: skip
    """Column per expert (-1: inactive), activated experts [SB] and tokens [SB] per rank.

    ``packed_E`` is from ``load_ranks``; ``SC``: ranks that are in registers at a time.
    """
    rank_S = tl.arange(0, SB)
    home_E = (packed_E & NO_RANK).to(tl.int32)
    active_E = (tokens_E > 0) & (home_E != NO_RANK)
    hosts_E = tl.zeros_like(packed_E)
    for column in tl.static_range(RB):
        host_E = (packed_E >> (8 * column)) & NO_RANK
        bit_E = tl.full([1], 1, tl.int64) << (host_E & 63)
        hosts_E |= tl.where(host_E != NO_RANK, bit_E, 0)
    movable_E = active_E & ((hosts_E & (hosts_E - 1)) != 0)
    rank_E = tl.where(active_E & (~movable_E), home_E, -1)
    activated_S = sum_on_ranks(rank_E, (rank_E >= 0).to(tl.int32), rank_S, SB, SC)
    num_active = tl.sum(active_E.to(tl.int32), 0)
    limit = tl.maximum(tl.max(activated_S, 0), (num_active + num_ranks - 1) // num_ranks)
    waiting_E = movable_E
    left = tl.max(waiting_E.to(tl.int32), 0) > 0
    claiming = left
    while left:
        while claiming:
            rank_E, waiting_E, activated_S, claiming = _claim(
                packed_E, rank_E, waiting_E, activated_S, limit, expert_E, rank_S,
                EB, RB, SB, SC,
            )  # fmt: skip
        left = tl.max(waiting_E.to(tl.int32), 0) > 0
        if left:
            target, depth, depth_S, limit = _search(
                hosts_E, rank_E, waiting_E, activated_S, limit, rank_S
            )
            claiming = target == NONE
            if target != NONE:
                rank = target & 63
                activated_S += (rank_S == rank).to(tl.int32)
                rank_E, waiting_E = _place(
                    hosts_E, rank_E, waiting_E, depth_S, rank, depth, expert_E, rank_S
                )
                left = tl.max(waiting_E.to(tl.int32), 0) > 0
    tokens_S = sum_on_ranks(rank_E, tokens_E, rank_S, SB, SC)
    rank_E, activated_S, tokens_S = _shift_tokens(
        tokens_E, packed_E, hosts_E, rank_E, movable_E, activated_S, tokens_S, limit, num_ranks,
        expert_E, rank_S, EB, RB, SB, SC,
    )  # fmt: skip
    column_E = tl.zeros_like(expert_E)
    for step in tl.static_range(RB):
        column = RB - 1 - step
        host_E = ((packed_E >> (8 * column)) & NO_RANK).to(tl.int32)
        column_E = tl.where(host_E == rank_E, column, column_E)
    return tl.where(active_E, column_E, -1), activated_S, tokens_S
