"""Bookkeeping of a routed batch: load per physical expert and counters, on the device.

For policies whose own kernel does not record. ``layout.py`` documents the counters.
"""

from __future__ import annotations

import torch

from ..custom_op import register
from ..tensor_checks import require_routing_buffers, unsupported_device
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
