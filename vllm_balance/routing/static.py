"""One copy of every expert, at its place: vLLM without redundant experts."""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_balance.kernels.record import Regime, record
from vllm_balance.routing.first_copy import FirstCopyRouting
from vllm_balance.routing.policy import LayerTables


class StaticRouting(FirstCopyRouting):
    """The only copy of each expert, whose slot has its number. On a GPU nothing is mapped."""

    name: ClassVar[str] = "static"

    def route(
        self,
        topk_ids_TK: torch.Tensor,
        tables: LayerTables,
        num_valid_tokens: torch.Tensor | None,
    ) -> torch.Tensor:
        if topk_ids_TK.is_cpu:
            return super().route(topk_ids_TK, tables, num_valid_tokens)
        record(topk_ids_TK, regime=Regime.MEMORY_BOUND, **tables.kernel_arguments(num_valid_tokens))
        return topk_ids_TK
