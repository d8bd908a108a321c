"""GEM's placement needs no choice: the only copy, or evenly where its map has replicas."""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_balance.routing.eplb import EplbRouting
from vllm_balance.routing.first_copy import FirstCopyRouting
from vllm_balance.routing.policy import LayerTables

_ONLY_COPY, _EVEN = FirstCopyRouting(), EplbRouting()


class GemRouting:
    """The only copy of each expert; tokens spread over the copies of a map with redundancy."""

    name: ClassVar[str] = "gem"
    counts_decide: ClassVar[bool] = False

    def route(
        self,
        topk_ids_TK: torch.Tensor,
        tables: LayerTables,
        num_valid_tokens: torch.Tensor | None,
    ) -> torch.Tensor:
        redundant = tables.num_physical > tables.num_logical
        policy = _EVEN if redundant else _ONLY_COPY
        return policy.route(topk_ids_TK, tables, num_valid_tokens)
