"""Schedules with dynamic slots: which tokens move to which rank, and which experts follow them.

HarMoEny (arXiv 2506.12417): tokens of overloaded ranks are computed on underloaded ones, whose
dynamic slots take in the experts that this needs. ``docs/harmoeny.md`` describes the methods.

The decision is made on the host, from counts. Batches for which it matters are compute-bound
prefills, and servers that fetch experts run eagerly, so the host may read a few counts there.
"""

from __future__ import annotations

import torch

from ...types import DynamicSlots, Outcome, Placement, Plan, Schedule
from ..tensor_checks import require_dense, require_integers, require_routing_buffers
from .rules import Eviction, Method, Rules

__all__ = ["Eviction", "Method", "Rules", "count", "schedule"]


def count(
    topk_ids_TK: torch.Tensor, num_logical: int, num_valid_tokens: torch.Tensor | None = None
) -> torch.Tensor:
    """Pairs of each expert, int32 [E] on the CPU; a batch's demand where one rank sees all of it.

    Args:
        topk_ids_TK: logical ids, int32 or int64 [T, K] contiguous, on the CPU. An id that is no
            expert counts nowhere.
        num_logical: E.
        num_valid_tokens: int32, one element: rows from here on are padding. None: no padding.

    Raises:
        ValueError: a tensor has the wrong dtype, shape or device.
    """
    require_routing_buffers(topk_ids_TK, 1, 1, None, None, num_valid_tokens, None, 0)
    if not topk_ids_TK.is_cpu:
        raise ValueError(f"count takes ids on the CPU, got {topk_ids_TK.device.type}.")
    from .numba_cpu import count as backend

    tokens_E = torch.empty(num_logical, dtype=torch.int32)
    backend(topk_ids_TK, num_valid_tokens, tokens_E)
    return tokens_E


def schedule(
    tokens_FE: torch.Tensor, slots: DynamicSlots, rules: Rules, method: Method = Method.HARMOENY
) -> Schedule:
    """What a batch does with the dynamic slots: tokens per replica, fetches, the state after it.

    Pure and deterministic: equal arguments give equal results on every rank. No rank is planned
    more foreign experts than it has dynamic slots, and the home rank of an expert always keeps it.

    Args:
        tokens_FE: pairs of each expert by source rank, int32 [F, E] on the CPU; F is 1 where
            every rank sees all tokens. Only the paper's schedule tells sources apart.
        slots: what the dynamic slots hold before the batch.
        rules: threshold, costs, regime and eviction.
        method: which schedule.

    Raises:
        ValueError: a tensor has the wrong dtype, shape or device, or a slot holds an expert that
            does not exist, is at home on that rank, or is in another slot of it.
    """
    num_ranks, num_dynamic, num_experts = slots.num_ranks, slots.num_dynamic, slots.num_logical
    require_integers("tokens_FE", tokens_FE, dim=2)
    if not tokens_FE.is_cpu or tokens_FE.shape[1] != num_experts or not len(tokens_FE):
        raise ValueError(
            f"a schedule takes counts [F, {num_experts}] on the CPU, got "
            f"{tuple(tokens_FE.shape)} on {tokens_FE.device.type}. Copy them to the host."
        )
    require_dense("tokens_FE", tokens_FE, torch.int32, at_least=1, device=tokens_FE.device)
    for name in ("content_SD", "idle_SD"):
        require_dense(
            name,
            getattr(slots, name),
            torch.int32,
            at_least=num_ranks * num_dynamic,
            device=tokens_FE.device,
        )
    from .numba_cpu import schedule as backend

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32)

    content_SD, idle_SD, fetch_SD = (empty(num_ranks, num_dynamic) for _ in range(3))
    split_ER, table_ER = empty(num_experts, num_ranks), empty(num_experts, num_ranks)
    replicas_E = empty(num_experts)
    status = backend(
        tokens_FE,
        (slots.content_SD, slots.idle_SD),
        method,
        rules,
        (content_SD, idle_SD, fetch_SD, split_ER, table_ER, replicas_E),
    )
    if status < 0:
        _raise_wrong_content(slots, -1 - status)
    return Schedule(
        plan=Plan(split_ER=split_ER),
        fetch_SD=fetch_SD,
        placement=Placement(
            logical_to_physical_ER=table_ER,
            num_replicas_E=replicas_E,
            num_ranks=num_ranks,
            num_physical=slots.num_physical,
        ),
        slots=DynamicSlots(num_logical=num_experts, content_SD=content_SD, idle_SD=idle_SD),
        outcome=Outcome(status),
    )


def _raise_wrong_content(slots: DynamicSlots, position: int) -> None:
    rank, slot = divmod(position, slots.num_dynamic)
    raise ValueError(
        f"dynamic slot {slot} of rank {rank} holds expert {int(slots.content_SD[rank, slot])}. A "
        f"slot takes an expert from 0 to {slots.num_logical - 1} that is not at home on its rank "
        f"and in no other slot of it, or -1: the rank holds {slots.content_SD[rank].tolist()}."
    )
