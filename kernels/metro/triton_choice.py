"""The choice of METRO as Triton device functions; parallel_reference.py says what they compute.

One program holds everything in registers: experts along ``EB`` (E rounded up to a power of two),
replicas along ``RB``, ranks along ``SB``. ``hosts_E`` has bit s set if the expert has a replica on
rank s. Nothing but the maps is read from memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .parallel_reference import ALONE as _ALONE
from .parallel_reference import MAX_SHIFTS as _MAX_SHIFTS

NONE = tl.constexpr(2**30)
"""Larger than every 32-bit key."""
NONE64 = tl.constexpr(2**62)
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
def load_slots(table, replicas, stride, E, P, expert_E, EB: tl.constexpr, RB: tl.constexpr):
    """Slots of the experts, [EB, RB] int32, -1 where there is none (or beyond ``RB``)."""
    inside_E = expert_E < E
    count_E = tl.load(replicas + expert_E, mask=inside_E, other=0).to(tl.int32)
    column_R = tl.arange(0, RB)
    usable_ER = (column_R[None, :] < count_E[:, None]) & (column_R < stride)[None, :]
    address_ER = table + expert_E.to(tl.int64)[:, None] * stride + column_R[None, :]
    slot_ER = tl.load(address_ER, mask=usable_ER, other=-1).to(tl.int32)
    return tl.where((slot_ER >= 0) & (slot_ER < P), slot_ER, -1)


@triton.jit
def _claim(ranks_ER, rank_E, waiting_E, activated_S, limit, expert_E, rank_S,
           EB: tl.constexpr, RB: tl.constexpr):  # fmt: skip
    """One claim round: the new ranks, who still waits, activated experts, whether any claimed."""
    safe_ER = tl.where(ranks_ER < 0, 0, ranks_ER)
    activated_ER = tl.gather(activated_S, tl.reshape(safe_ER, [EB * RB]), 0)
    activated_ER = tl.reshape(activated_ER, [EB, RB])
    key_ER = activated_ER * 4096 + ((ranks_ER - expert_E[:, None]) & 63) * 64 + safe_ER
    usable_ER = (ranks_ER >= 0) & (activated_ER < limit)
    best_E = tl.min(tl.where(usable_ER, key_ER, NONE), 1)
    claims_E = waiting_E & (best_E < NONE)
    target_E = tl.where(claims_E, best_E & 63, -1)
    claims_ES = (target_E[:, None] == rank_S[None, :]).to(tl.int32)
    order_ES = tl.cumsum(claims_ES, 0)
    accepted_ES = tl.where(order_ES <= (limit - activated_S)[None, :], claims_ES, 0)
    accepted_E = tl.max(accepted_ES, 1) > 0
    rank_E = tl.where(accepted_E, target_E, rank_E)
    activated_S += tl.sum(accepted_ES, 0)
    return rank_E, waiting_E & (~accepted_E), activated_S, tl.max(claims_E.to(tl.int32), 0) > 0


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
def _shift_tokens(tokens_E, ranks_ER, hosts_E, rank_E, movable_E, activated_S, tokens_S, limit,
                  expert_E, rank_S, EB: tl.constexpr, RB: tl.constexpr):  # fmt: skip
    """Moves or swaps experts off the rank with the most tokens; returns ranks, both loads."""
    safe_E = tl.reshape(tl.where(ranks_ER < 0, 0, ranks_ER), [EB * RB])
    shifts = tl.zeros_like(limit)
    while shifts < MAX_SHIFTS:
        shifts += 1
        first = tl.max(tokens_S * 64 + (63 - rank_S), 0)
        most, busiest = first // 64, 63 - (first & 63)
        returns_E = movable_E & _has(hosts_E, busiest)
        here_ES = returns_E[:, None] & (rank_E[:, None] == rank_S[None, :])
        key_E = tokens_E * 1024 + expert_E
        partner_S = tl.min(tl.where(here_ES, key_E[:, None], 2147483647), 0)
        partner_S = tl.where(activated_S < limit, ALONE, partner_S)
        partner_ER = tl.reshape(tl.gather(partner_S, safe_E, 0), [EB, RB])
        load_ER = tl.reshape(tl.gather(tokens_S, safe_E, 0), [EB, RB])
        gain_ER = tokens_E[:, None] - partner_ER // 1024
        larger_ER = tl.maximum(load_ER + gain_ER, most - gain_ER).to(tl.int64)
        usable_ER = (ranks_ER >= 0) & (ranks_ER != busiest) & (gain_ER > 0)
        usable_ER &= (movable_E & (rank_E == busiest))[:, None]
        key_ER = (larger_ER * 1024 + expert_E[:, None]) * 64 + ranks_ER
        best = tl.min(tl.min(tl.where(usable_ER, key_ER, NONE64), 1), 0)
        if (best >> 16) < most:
            expert, rank = ((best >> 6) & 1023).to(tl.int32), (best & 63).to(tl.int32)
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
def choose_columns(tokens_E, slot_ER, slots_per_rank, num_ranks, expert_E,
                   EB: tl.constexpr, RB: tl.constexpr, SB: tl.constexpr):  # fmt: skip
    """Column per expert (-1: inactive), activated experts [SB] and tokens [SB] per rank."""
    rank_S = tl.arange(0, SB)
    column_R = tl.arange(0, RB)
    ranks_ER = tl.where(slot_ER >= 0, slot_ER // slots_per_rank, -1)
    home_E = tl.max(tl.where(column_R[None, :] == 0, ranks_ER, -1), 1)
    active_E = (tokens_E > 0) & (home_E >= 0)
    differs_ER = (ranks_ER >= 0) & (ranks_ER != home_E[:, None])
    movable_E = active_E & (tl.max(differs_ER.to(tl.int32), 1) > 0)
    bits_ER = tl.full([1, 1], 1, tl.int64) << tl.where(ranks_ER < 0, 0, ranks_ER).to(tl.int64)
    hosts_E = tl.reduce(tl.where(ranks_ER >= 0, bits_ER, 0), 1, _or)
    rank_E = tl.where(active_E & (~movable_E), home_E, -1)
    activated_S = tl.sum((rank_E[:, None] == rank_S[None, :]).to(tl.int32), 0)
    num_active = tl.sum(active_E.to(tl.int32), 0)
    limit = tl.maximum(tl.max(activated_S, 0), (num_active + num_ranks - 1) // num_ranks)
    waiting_E = movable_E
    left = tl.max(waiting_E.to(tl.int32), 0) > 0
    while left:
        claiming = left
        while claiming:
            rank_E, waiting_E, activated_S, claiming = _claim(
                ranks_ER, rank_E, waiting_E, activated_S, limit, expert_E, rank_S, EB, RB
            )
        left = tl.max(waiting_E.to(tl.int32), 0) > 0
        if left:
            target, depth, depth_S, limit = _search(
                hosts_E, rank_E, waiting_E, activated_S, limit, rank_S
            )
            if target != NONE:
                rank = target & 63
                activated_S += (rank_S == rank).to(tl.int32)
                rank_E, waiting_E = _place(
                    hosts_E, rank_E, waiting_E, depth_S, rank, depth, expert_E, rank_S
                )
                left = tl.max(waiting_E.to(tl.int32), 0) > 0
    tokens_S = tl.sum(tl.where(rank_E[:, None] == rank_S[None, :], tokens_E[:, None], 0), 0)
    rank_E, activated_S, tokens_S = _shift_tokens(
        tokens_E, ranks_ER, hosts_E, rank_E, movable_E, activated_S, tokens_S, limit,
        expert_E, rank_S, EB, RB,
    )  # fmt: skip
    on_rank_ER = (ranks_ER == rank_E[:, None]) & (ranks_ER >= 0)
    column_E = tl.min(tl.where(on_rank_ER, column_R[None, :], RB), 1)
    return tl.where(active_E, column_E, -1), activated_S, tokens_S
