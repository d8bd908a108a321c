"""Bookkeeping of a routed batch: load per physical expert and counters, on the device.

For policies whose own kernel does not record. ``layout.py`` documents the counters.
"""

from __future__ import annotations

import torch

from ..custom_op import register
from ..tensor_checks import (
    require_dense,
    require_integers,
    require_routing_buffers,
    unsupported_device,
)
from .layout import (
    Counter,
    Regime,
    activated_slice,
    counters_size,
    tokens_slice,
)

__all__ = [
    "Counter",
    "Regime",
    "activated_slice",
    "counters_size",
    "record",
    "record_load",
    "record_split",
    "tokens_slice",
]


def _run(
    physical_ids: torch.Tensor,
    num_physical: int,
    num_ranks: int,
    load: torch.Tensor | None,
    record_enabled: torch.Tensor | None,
    num_valid_tokens: torch.Tensor | None,
    counters: torch.Tensor,
    regime: int,
) -> None:
    if physical_ids.is_cpu:
        from .numba_cpu import record as backend
    elif physical_ids.is_cuda:
        from .triton_gpu import record as backend
    else:
        raise unsupported_device("record", physical_ids)
    backend(
        physical_ids,
        num_physical,
        num_ranks,
        load,
        record_enabled,
        num_valid_tokens,
        counters,
        regime,
    )


_op = register(
    "record(Tensor physical_ids, int num_physical, int num_ranks, Tensor(a!)? load, "
    "Tensor? record_enabled, Tensor? num_valid_tokens, Tensor(b!) counters, int regime) -> ()",
    _run,
    lambda *_: None,
)


def record(
    physical_ids_TK: torch.Tensor,
    *,
    num_physical: int,
    num_ranks: int,
    load_P: torch.Tensor | None,
    record_enabled: torch.Tensor | None,
    num_valid_tokens: torch.Tensor | None,
    counters: torch.Tensor,
    regime: int,
) -> None:
    """Adds one routed batch to ``load_P`` and ``counters``, both changed in place.

    Args:
        physical_ids_TK: slot of each (token, choice) pair, int32 or int64 [T, K] contiguous; ids
            outside 0 to P - 1 (-1 by convention) count nowhere.
        num_physical: P. Slots of a rank are consecutive.
        num_ranks: S, a divisor of P.
        load_P: pairs per slot are added here, int32 [P or more]; None records no load.
        record_enabled: bool, one element; false leaves ``load_P`` alone. None means true.
        num_valid_tokens: int32, one element: rows from here on are padding. None: no padding.
        counters: int64 [counters_size(S)], see layout.py.
        regime: a ``Regime``, how the batch was routed.

    Raises:
        ValueError: a tensor has the wrong dtype, shape or device.
    """
    require_routing_buffers(
        physical_ids_TK,
        num_ranks,
        num_physical,
        load_P,
        record_enabled,
        num_valid_tokens,
        counters,
        counters_size(num_ranks),
    )
    run = _op if torch.compiler.is_compiling() else _run
    run(
        physical_ids_TK,
        num_physical,
        num_ranks,
        load_P,
        record_enabled,
        num_valid_tokens,
        counters,
        int(regime),
    )


def record_load(
    physical_ids_TK: torch.Tensor,
    *,
    num_physical: int,
    load_P: torch.Tensor,
    record_enabled: torch.Tensor | None,
) -> None:
    """Adds one routed batch to ``load_P``, in place; no host sync. Arguments as for ``record``.

    Raises:
        ValueError: a tensor has the wrong dtype, shape or device.
    """
    require_routing_buffers(physical_ids_TK, 1, num_physical, load_P, record_enabled, None, None, 0)
    if physical_ids_TK.is_cpu:
        from .numba_cpu import record_load as backend
    elif physical_ids_TK.is_cuda:
        from .triton_gpu import record_load as backend
    else:
        raise unsupported_device("record_load", physical_ids_TK)
    backend(physical_ids_TK, num_physical, load_P, record_enabled)


def record_split(
    split_ER: torch.Tensor,
    logical_to_physical_ER: torch.Tensor,
    *,
    num_physical: int,
    num_ranks: int,
    counters: torch.Tensor,
    regime: int | None = None,
) -> None:
    """Adds a batch to ``counters`` from its split, where a rank sees only its own tokens.

    Changes them in place, without a host sync.

    Args:
        split_ER: pairs of each expert for each replica, int32 [E, R] contiguous; zero where there
            is no replica.
        logical_to_physical_ER: slots, int32 or int64 [E, R or wider], last axis dense, -1 behind
            the last replica.
        num_physical: P. Slots of a rank are consecutive.
        num_ranks: S, a divisor of P.
        counters: int64 [counters_size(S)], see layout.py.
        regime: how the batch was routed; None: compute-bound if an expert's pairs go to several
            replicas.

    Raises:
        ValueError: a tensor has the wrong dtype, shape or device.
    """
    require_integers("logical_to_physical_ER", logical_to_physical_ER, dim=2)
    num_experts, num_columns = logical_to_physical_ER.shape
    device = logical_to_physical_ER.device
    require_dense("split_ER", split_ER, torch.int32, at_least=0, device=device)
    require_dense(
        "counters", counters, torch.int64, at_least=counters_size(num_ranks), device=device
    )
    if split_ER.dim() != 2 or len(split_ER) != num_experts or split_ER.shape[1] > num_columns:
        raise ValueError(
            f"split_ER must be [{num_experts}, {num_columns} or fewer], as wide as "
            f"logical_to_physical_ER, got {tuple(split_ER.shape)}."
        )
    if split_ER.is_cpu:
        from .numba_cpu import record_split as backend
    elif split_ER.is_cuda:
        from .triton_gpu import record_split as backend
    else:
        raise unsupported_device("record_split", split_ER)
    backend(split_ER, logical_to_physical_ER, num_physical, num_ranks, counters, regime)
