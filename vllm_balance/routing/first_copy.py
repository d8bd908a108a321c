"""Every token of an expert goes to its first replica: a baseline that never looks at the batch."""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_balance.kernels.record import Regime, record
from vllm_balance.routing.policy import LayerTables
from vllm_balance.types import Demand, Placement, Plan


class FirstCopyRouting:
    """The first replica of each expert, whatever the batch."""

    name: ClassVar[str] = "first_copy"
    counts_decide: ClassVar[bool] = False

    def plan(self, demand: Demand, placement: Placement) -> Plan:
        split_ER = torch.zeros_like(placement.logical_to_physical_ER)
        split_ER[:, 0] = demand.tokens_E
        return Plan(split_ER=split_ER)

    def route(
        self,
        topk_ids_TK: torch.Tensor,
        tables: LayerTables,
        num_valid_tokens: torch.Tensor | None,
    ) -> torch.Tensor:
        first_E = tables.logical_to_physical_ER[:, 0].to(topk_ids_TK.dtype)
        physical_TK = torch.where(
            topk_ids_TK >= 0, first_E[topk_ids_TK.clamp(min=0).long()], topk_ids_TK
        )
        record(physical_TK, regime=Regime.MEMORY_BOUND, **tables.kernel_arguments(num_valid_tokens))
        return physical_TK
