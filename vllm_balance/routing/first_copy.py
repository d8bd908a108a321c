"""Every token of an expert goes to its first replica: a baseline that never looks at the batch."""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_balance.kernels.record import Regime, record
from vllm_balance.routing.policy import LayerTables


class FirstCopyRouting:
    """The first replica of each expert, whatever the batch."""

    name: ClassVar[str] = "first_copy"
    counts_decide: ClassVar[bool] = False

    def route(
        self,
        topk_ids_TK: torch.Tensor,
        tables: LayerTables,
        num_valid_tokens: torch.Tensor | None,
    ) -> torch.Tensor:
        arguments = tables.kernel_arguments(num_valid_tokens)
        if topk_ids_TK.is_cpu:
            from vllm_balance.kernels.eplb_hash import map_and_record

            return map_and_record(
                topk_ids_TK,
                logical_to_physical_ER=tables.logical_to_physical_ER,
                num_replicas_E=tables.ones_E,
                regime=Regime.MEMORY_BOUND,
                **arguments,
            )
        first_E = tables.logical_to_physical_ER[:, 0].to(topk_ids_TK.dtype)
        physical_TK = torch.where(
            topk_ids_TK >= 0, first_E[topk_ids_TK.clamp(min=0).long()], topk_ids_TK
        )
        record(physical_TK, regime=Regime.MEMORY_BOUND, **arguments)
        return physical_TK
