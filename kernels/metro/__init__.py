"""METRO: every active expert uses one replica, so that the most activated rank has the fewest.

Zhu et al., "Efficient MoE Serving in the Memory-Bound Regime" (arXiv 2512.09277), with the exact
optimum in place of the paper's greedy (Algorithm 1). ``docs/metro.md`` describes the algorithm.
"""

from __future__ import annotations

import torch

from ...types import Placement
from ..custom_op import call, register
from ..record.layout import counters_size
from ..tensor_checks import (
    require_dense,
    require_map,
    require_routing_buffers,
    unsupported_device,
)

__all__ = ["choose", "route", "split"]


def choose(tokens_E: torch.Tensor, placement: Placement) -> torch.Tensor:
    """Column of ``logical_to_physical_ER`` that serves each expert, int32 [E]; -1 if inactive.

    The largest number of activated experts on any rank (lambda) is minimal, on a GPU among choices
    of the first 8 replicas of each expert. Within that, the busiest rank's tokens are lowered by
    local search. Deterministic: equal input, equal choice on every rank.

    Args:
        tokens_E: (token, choice) pairs of each expert in the global batch, [E] integers.
        placement: where the experts live, on the same device.

    Raises:
        ValueError: an expert with tokens has no slot, or no kernel serves the device.
    """
    tokens_E = _checked(tokens_E, placement)
    table, replicas = placement.logical_to_physical_ER, placement.num_replicas_E
    if tokens_E.is_cpu:
        from .numba_cpu import choose as backend
    elif tokens_E.is_cuda:
        from .triton_gpu import choose as backend
    else:
        raise unsupported_device("choose", tokens_E)
    replica_E = torch.empty_like(tokens_E)
    backend(tokens_E, table, replicas, placement.num_ranks, placement.num_physical, replica_E)
    return replica_E


def split(
    tokens_E: torch.Tensor,
    placement: Placement,
    knee_tokens: float,
    free_tokens: float | None = None,
) -> torch.Tensor:
    """Tokens for each replica, int32 [E, R]: what ``route`` does, where a rank knows only counts.

    ``assign`` puts the pairs of each rank into slots by it. Deterministic, no host sync.

    Args:
        tokens_E: (token, choice) pairs of each expert in the global batch, [E] integers.
        placement: where the experts live, on the same device; R columns, or more.
        knee_tokens: as for ``route``.
        free_tokens: likewise.

    Raises:
        ValueError: an expert with tokens has no slot (on the CPU), no kernel serves the device, or
            free_tokens is given on a GPU.
    """
    tokens_E = _checked(tokens_E, placement)
    table, replicas = placement.logical_to_physical_ER, placement.num_replicas_E
    if tokens_E.is_cpu:
        from .numba_cpu import split as backend
    elif tokens_E.is_cuda:
        from .triton_gpu import split as backend
    else:
        raise unsupported_device("split", tokens_E)
    split_ER = torch.empty(table.shape, dtype=torch.int32, device=table.device)
    backend(
        tokens_E,
        table,
        replicas,
        placement.num_ranks,
        placement.num_physical,
        knee_tokens,
        free_tokens,
        split_ER,
    )
    return split_ER


def _checked(tokens_E: torch.Tensor, placement: Placement) -> torch.Tensor:
    """The counts as the kernels take them. Raises ValueError if they do not fit the placement."""
    table, replicas = placement.logical_to_physical_ER, placement.num_replicas_E
    tokens_E = tokens_E.to(torch.int32).contiguous()
    require_map(tokens_E, table, replicas)
    require_dense("tokens_E", tokens_E, torch.int32, at_least=len(replicas), device=table.device)
    return tokens_E


def _run(
    topk_ids: torch.Tensor,
    logical_to_physical: torch.Tensor,
    num_replicas: torch.Tensor,
    num_ranks: int,
    num_physical: int,
    knee_tokens: float,
    free_tokens: float | None,
    load: torch.Tensor | None,
    record_enabled: torch.Tensor | None,
    num_valid_tokens: torch.Tensor | None,
    counters: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    if topk_ids.is_cpu:
        from .numba_cpu import route as backend
    elif topk_ids.is_cuda:
        from .triton_gpu import route as backend
    else:
        raise unsupported_device("route", topk_ids)
    out = torch.empty_like(topk_ids) if out is None else out
    backend(
        topk_ids,
        logical_to_physical,
        num_replicas,
        num_ranks,
        num_physical,
        knee_tokens,
        free_tokens,
        load,
        record_enabled,
        num_valid_tokens,
        counters,
        out,
    )
    return out


_op = register(
    "metro_route(Tensor topk_ids, Tensor logical_to_physical, Tensor num_replicas, int num_ranks, "
    "int num_physical, float knee_tokens, float? free_tokens, Tensor(a!)? load, "
    "Tensor? record_enabled, Tensor? num_valid_tokens, Tensor(b!) counters) -> Tensor",
    _run,
    lambda topk_ids, *_: torch.empty_like(topk_ids),
)


def route(
    topk_ids_TK: torch.Tensor,
    *,
    logical_to_physical_ER: torch.Tensor,
    num_replicas_E: torch.Tensor,
    num_ranks: int,
    num_physical: int,
    knee_tokens: float,
    free_tokens: float | None = None,
    load_P: torch.Tensor | None,
    record_enabled: torch.Tensor | None,
    num_valid_tokens: torch.Tensor | None,
    counters: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Slot of each pair, [T, K] with the dtype of the ids; counts, chooses, maps and records.

    If the batch has more than ``knee_tokens`` pairs per active expert on average (compute-bound),
    every expert's tokens are split evenly over its replicas by occurrence, as
    ``assign.even_split`` and ``assign.assign`` define. Otherwise (memory-bound) each active expert
    uses one replica, as ``choose`` defines. With ``free_tokens`` (CPU only) the time of the slowest
    rank decides instead, as ``reference.is_even_sooner`` defines.

    Args:
        topk_ids_TK: logical expert ids of the *global* batch, int32 or int64 [T, K] contiguous.
            An id that is no expert (-1) stays -1 and counts nowhere.
        logical_to_physical_ER: slots, int32 or int64 [E, R or wider], last axis dense. Read on
            every call, so it may be changed in place.
        num_replicas_E: int32 or int64 [E].
        num_ranks: S, a divisor of P. Slots of a rank are consecutive.
        num_physical: P.
        knee_tokens: tokens per expert where the expert's GEMM turns from memory- to
            compute-bound; infinity: always memory-bound; 0: always compute-bound.
        free_tokens: where a rank computes its experts in turn: tokens of an expert that streaming
            its weights hides. None: experts overlap, and the mean decides.
        load_P: pairs per slot are added here, int32 [P or more]; None records no load.
        record_enabled: bool, one element; false leaves ``load_P`` alone. None means true.
        num_valid_tokens: int32, one element: rows from here on are padding, mapped to the slot
            their expert uses, or its first slot if it is inactive, and counted nowhere. None: no
            padding.
        counters: int64 [counters_size(S)], see record/layout.py; added to without a host sync.
        out: [T, K] of the ids' dtype, not the ids themselves; allocated if None.

    Raises:
        ValueError: a tensor has the wrong dtype, shape or device, or (on the CPU) an expert with
            tokens has no slot.
    """
    require_map(topk_ids_TK, logical_to_physical_ER, num_replicas_E)
    require_routing_buffers(
        topk_ids_TK,
        num_ranks,
        num_physical,
        load_P,
        record_enabled,
        num_valid_tokens,
        counters,
        counters_size(num_ranks),
    )
    arguments = (
        topk_ids_TK,
        logical_to_physical_ER,
        num_replicas_E,
        num_ranks,
        num_physical,
        knee_tokens,
        free_tokens,
        load_P,
        record_enabled,
        num_valid_tokens,
        counters,
    )
    return call(_op, _run, arguments, out)
