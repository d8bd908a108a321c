"""What the balancer did, per rank: read from the device counters only when somebody asks."""

from __future__ import annotations

from typing import Any

import torch

from vllm_balance.kernels.record.layout import Counter, Regime, activated_slice, tokens_slice
from vllm_balance.types import Placement, Plan


def add_plan(
    counters: torch.Tensor, plan: Plan, placement: Placement, regime: Regime | None = None
) -> None:
    """Adds a batch to ``counters`` from its plan, where a rank sees only its own tokens.

    No host sync.

    Args:
        regime: how the batch was routed; None: compute-bound if an expert's tokens go to several
            replicas.
    """
    split_ER, table_ER = plan.split_ER, placement.logical_to_physical_ER
    slots_ER = torch.where(table_ER < 0, placement.num_physical, table_ER).long()
    tokens_P = split_ER.new_zeros(placement.num_physical + 1)
    tokens_P.scatter_add_(0, slots_ER.flatten(), split_ER.flatten())
    tokens_SP = tokens_P[:-1].view(placement.num_ranks, -1)
    tokens_S, activated_S = tokens_SP.sum(1), (tokens_SP > 0).sum(1)
    is_empty = (tokens_S.sum() == 0).long()
    if regime is None:
        is_spread = ((split_ER > 0).sum(1) > 1).any().long()
    else:
        is_spread = (1 - is_empty) * int(regime is Regime.COMPUTE_BOUND)
    batch = torch.zeros_like(counters, device=split_ER.device)
    batch[Counter.EMPTY_BATCHES] = is_empty
    batch[Counter.COMPUTE_BOUND_BATCHES] = is_spread
    batch[Counter.MEMORY_BOUND_BATCHES] = 1 - is_empty - is_spread
    batch[Counter.MAX_ACTIVATED_SUM] = activated_S.max()
    batch[Counter.MAX_TOKENS_SUM] = tokens_S.max()
    batch[Counter.PAIRS] = tokens_S.sum()
    batch[Counter.ACTIVATED_SUM] = activated_S.sum()
    batch[activated_slice(placement.num_ranks)] = activated_S
    batch[tokens_slice(placement.num_ranks)] = tokens_S
    counters += batch.to(counters.device)  # A plan may be the host's, as a schedule is.


def add_load(load_P: torch.Tensor, physical_TK: torch.Tensor, record_enabled: torch.Tensor) -> None:
    """Adds this rank's pairs to vLLM's load per slot (int32 [P]); ids below 0 do not count."""
    slots_N = physical_TK.flatten().long()
    counts_N = ((slots_N >= 0) & record_enabled.view(())).to(load_P.dtype)
    load_P.scatter_add_(0, slots_N.clamp(min=0), counts_N)


def layer_metrics(counters: torch.Tensor, num_ranks: int) -> dict[str, Any]:
    """Named values of one layer's counters (int64 [counters_size(S)], any device)."""
    values = counters.tolist()
    named: dict[str, Any] = {counter.name.lower(): values[counter] for counter in Counter}
    named["activated_per_rank"] = values[activated_slice(num_ranks)]
    named["tokens_per_rank"] = values[tokens_slice(num_ranks)]
    return named


def num_batches(counted: dict[str, Any]) -> int:
    """Batches of a layer, from its `layer_metrics`: each is of one of the three kinds."""
    kinds = (Counter.MEMORY_BOUND_BATCHES, Counter.COMPUTE_BOUND_BATCHES, Counter.EMPTY_BATCHES)
    return sum(int(counted[kind.name.lower()]) for kind in kinds)


def total(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """The same values summed over layers.

    ``max_activated_sum`` becomes the sum over layers and batches of the per-layer maximum over
    ranks: what the ranks wait for.
    """
    summed: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            if isinstance(value, list):
                before = summed.get(key, [0] * len(value))
                summed[key] = [a + b for a, b in zip(before, value, strict=True)]
            else:
                summed[key] = summed.get(key, 0) + value
    return summed
