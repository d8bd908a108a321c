"""What the balancer did, per rank: read from the device counters only when somebody asks."""

from __future__ import annotations

from typing import Any

import torch

from vllm_balance.kernels.record import (
    Counter,
    Regime,
    activated_slice,
    record_split,
    tokens_slice,
)
from vllm_balance.types import Placement, Plan


def add_plan(
    counters: torch.Tensor, plan: Plan, placement: Placement, regime: Regime | None = None
) -> None:
    """Adds a batch to ``counters`` from its plan, where a rank sees only its own tokens.

    No host sync where both are one device's. A plan may be the host's, as a schedule is: then its
    batch is counted there and copied, which waits for the copy.

    Args:
        regime: how the batch was routed; None: compute-bound if an expert's tokens go to several
            replicas.
    """
    is_beside = counters.device == plan.split_ER.device
    batch = counters if is_beside else torch.zeros_like(counters, device=plan.split_ER.device)
    record_split(
        plan.split_ER,
        placement.logical_to_physical_ER,
        num_physical=placement.num_physical,
        num_ranks=placement.num_ranks,
        counters=batch,
        regime=regime,
    )
    if not is_beside:
        counters += batch.to(counters.device)


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
