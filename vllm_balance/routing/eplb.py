"""vLLM's own EPLB as the baseline: tokens spread over an expert's replicas by vLLM's hash."""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_balance.kernels.record import Regime, record
from vllm_balance.routing.policy import LayerTables


class EplbRouting:
    """Even over replicas. The hash runs over the token's index in the batch it is given."""

    name: ClassVar[str] = "eplb"
    counts_decide: ClassVar[bool] = False

    def route(
        self,
        topk_ids_TK: torch.Tensor,
        tables: LayerTables,
        num_valid_tokens: torch.Tensor | None,
    ) -> torch.Tensor:
        if topk_ids_TK.is_cpu:
            from vllm_balance.kernels.eplb_hash import map_and_record

            return map_and_record(
                topk_ids_TK,
                logical_to_physical_ER=tables.logical_to_physical_ER,
                num_replicas_E=tables.num_replicas_E,
                **tables.kernel_arguments(num_valid_tokens),
            )
        return vllm_hash(topk_ids_TK, tables, num_valid_tokens)


def vllm_hash(
    topk_ids_TK: torch.Tensor, tables: LayerTables, num_valid_tokens: torch.Tensor | None
) -> torch.Tensor:
    """Slots of a batch on a GPU, as `RoutingPolicy.route`: vLLM's own kernel for mapping and load,
    ours for the counters. Needs ``tables.load_P``."""
    from vllm.model_executor.layers.fused_moe.router.base_router import (
        eplb_map_to_physical_and_record,
    )

    physical_TK = eplb_map_to_physical_and_record(
        topk_ids=topk_ids_TK,
        expert_load_view=tables.load_P,
        logical_to_physical_map=tables.logical_to_physical_ER,
        logical_replica_count=tables.num_replicas_E,
        record_enabled=tables.record_enabled,
        num_unpadded_tokens=num_valid_tokens,
    )
    arguments = tables.kernel_arguments(num_valid_tokens)
    counted_only = arguments | {"load_P": None, "record_enabled": None}
    record(physical_TK, regime=Regime.COMPUTE_BOUND, **counted_only)
    return physical_TK
