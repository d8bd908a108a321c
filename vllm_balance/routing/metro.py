"""METRO: one replica per active expert, so that the most activated rank has the fewest experts.

arXiv 2512.09277, with the exact optimum in place of the paper's greedy (docs/metro.md). In the
compute-bound regime tokens decide, not experts, and they are spread evenly (section 4 there).

`route` is what a batch meets where a rank sees all ids: one fused kernel (`kernels/metro/`, numba
on CPU, Triton on GPU), and vLLM's own for the largest GPU batches. `plan` is for the `all_reduce`
way: the same decision on exchanged counts. Tests hold both against
`kernels/metro/reference.py` (the smallest lambda by maximum flow, the mapping), and the GPU's
choice against `parallel_reference.py`.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_balance.kernels.limits import MAX_PAIRS
from vllm_balance.kernels.metro import route, split
from vllm_balance.routing.eplb import vllm_hash
from vllm_balance.routing.policy import LayerTables
from vllm_balance.types import Demand, Placement, Plan


class MetroRouting:
    """One replica per active expert, or tokens spread evenly where that is the faster way.

    Where experts overlap, above ``knee_tokens`` tokens per active expert. Where a rank computes
    its experts in turn (``free_tokens`` given), if the slowest rank then ends sooner: an expert
    with n tokens takes the time of ``knee_tokens + max(0, n - free_tokens)`` tokens.

    On a GPU a batch that is compute-bound by its shape is spread by vLLM's hash: in parallel over
    its pairs, all of which the fused kernel reads for each expert.
    """

    name: ClassVar[str] = "metro"
    counts_decide: ClassVar[bool] = True

    def __init__(self, knee_tokens: float, free_tokens: float | None = None) -> None:
        self.knee_tokens = knee_tokens
        self.free_tokens = free_tokens

    def plan(self, demand: Demand, placement: Placement) -> Plan:
        """One replica or all, as `route` decides, without a host sync; exactly even where all."""
        return Plan(split_ER=split(demand.tokens_E, placement, self.knee_tokens, self.free_tokens))

    def route(
        self,
        topk_ids_TK: torch.Tensor,
        tables: LayerTables,
        num_valid_tokens: torch.Tensor | None,
    ) -> torch.Tensor:
        if self._is_spread(topk_ids_TK, tables):
            return vllm_hash(topk_ids_TK, tables, num_valid_tokens)
        return route(
            topk_ids_TK,
            logical_to_physical_ER=tables.logical_to_physical_ER,
            num_replicas_E=tables.num_replicas_E,
            knee_tokens=self.knee_tokens,
            free_tokens=self.free_tokens,
            **tables.kernel_arguments(num_valid_tokens),
        )

    def _is_spread(self, topk_ids_TK: torch.Tensor, tables: LayerTables) -> bool:
        """Whether the shape of a GPU batch says that it is compute-bound: the same on all ranks.

        Its active experts, which are at most all, have more than ``knee_tokens`` on average, even
        if all ranks' rows but one's are padding, where there may be any. Or it is larger than the
        fused kernel takes.
        """
        if topk_ids_TK.is_cpu or tables.load_P is None:
            return False
        is_full = tables.most_padded is not None and len(topk_ids_TK) > tables.most_padded
        sources = 1 if is_full else tables.num_ranks
        surely = sources * self.knee_tokens * tables.num_logical
        return topk_ids_TK.numel() > min(surely, MAX_PAIRS)
