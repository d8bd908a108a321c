"""vLLM's own EPLB mapping (Knuth hash of the token index modulo replicas) for the baseline.

Stock vLLM has it as a Triton kernel and returns its input unchanged on the CPU. On CUDA the
baseline uses vLLM's kernel itself, so there is no second one here.
"""

from __future__ import annotations

import torch

from ..custom_op import call, register
from ..record.layout import Regime, counters_size
from ..tensor_checks import require_map, require_routing_buffers

__all__ = ["map_and_record"]


def _run(
    topk_ids: torch.Tensor,
    logical_to_physical: torch.Tensor,
    num_replicas: torch.Tensor,
    num_ranks: int,
    num_physical: int,
    load: torch.Tensor | None,
    record_enabled: torch.Tensor | None,
    num_valid_tokens: torch.Tensor | None,
    counters: torch.Tensor,
    regime: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    if not topk_ids.is_cpu:
        raise ValueError(
            f"eplb_hash serves CPU tensors, got one on {topk_ids.device.type}. Elsewhere use "
            f"vLLM's eplb_map_to_physical_and_record, then kernels.record for the counters."
        )
    from .numba_cpu import map_and_record as backend

    out = torch.empty_like(topk_ids) if out is None else out
    backend(
        topk_ids,
        logical_to_physical,
        num_replicas,
        num_ranks,
        num_physical,
        load,
        record_enabled,
        num_valid_tokens,
        counters,
        regime,
        out,
    )
    return out


_op = register(
    "eplb_map_and_record(Tensor topk_ids, Tensor logical_to_physical, Tensor num_replicas, "
    "int num_ranks, int num_physical, Tensor(a!)? load, Tensor? record_enabled, "
    "Tensor? num_valid_tokens, Tensor(b!) counters, int regime) -> Tensor",
    _run,
    lambda topk_ids, *_: torch.empty_like(topk_ids),
)


def map_and_record(
    topk_ids_TK: torch.Tensor,
    *,
    logical_to_physical_ER: torch.Tensor,
    num_replicas_E: torch.Tensor,
    num_ranks: int,
    num_physical: int,
    load_P: torch.Tensor | None,
    record_enabled: torch.Tensor | None,
    num_valid_tokens: torch.Tensor | None,
    counters: torch.Tensor,
    regime: int = Regime.COMPUTE_BOUND,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Slot of each pair, [T, K] with the dtype of the ids, exactly as vLLM's EPLB maps it.

    The token index is the row in ``topk_ids_TK``; padding rows are mapped too, but not recorded.

    Args:
        topk_ids_TK: logical expert ids, int32 or int64 [T, K] contiguous; -1 stays -1.
        logical_to_physical_ER: slots, int32 or int64 [E, R or wider], last axis dense.
        num_replicas_E: int32 or int64 [E]. Ones send every pair to the first replica.
        num_ranks: S, a divisor of P.
        num_physical: P.
        load_P: pairs per slot are added here, int32 [P or more]; None records no load.
        record_enabled: bool, one element; None means true.
        num_valid_tokens: int32, one element: rows from here on are padding. None: no padding.
        counters: int64 [counters_size(S)], see record/layout.py; added to.
        regime: a ``Regime``, how the batch is counted.
        out: [T, K] of the ids' dtype; allocated if None.

    Raises:
        ValueError: a tensor has the wrong dtype, shape or device, or is not on the CPU.
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
        load_P,
        record_enabled,
        num_valid_tokens,
        counters,
        int(regime),
    )
    return call(_op, _run, arguments, out)
