"""METRO: one replica per active expert, so that the most activated rank has the fewest experts.

arXiv 2512.09277, with the exact optimum in place of the paper's greedy (docs/metro.md). In the
compute-bound regime tokens decide, not experts, and they are spread evenly (section 4 there).

`route` is what a batch meets where a rank sees all ids: one fused kernel (`kernels/metro/`, numba
on CPU, Triton on GPU). `plan` is for the `all_reduce` way: the kernel `choose` on exchanged counts,
the split in torch operations. Tests hold both against `kernels/metro/reference.py` (the smallest
lambda by maximum flow, the mapping), and the GPU's choice against `parallel_reference.py`.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_balance.kernels.assign import even_split
from vllm_balance.kernels.metro import choose, route
from vllm_balance.routing.policy import LayerTables
from vllm_balance.types import Demand, Placement, Plan


class MetroRouting:
    """One replica per active expert, or tokens spread evenly where that is the faster way.

    Where experts overlap, above ``knee_tokens`` tokens per active expert. Where a rank computes
    its experts in turn (``free_tokens`` given), if the slowest rank then ends sooner: an expert
    with n tokens takes the time of ``knee_tokens + max(0, n - free_tokens)`` tokens.
    """

    name: ClassVar[str] = "metro"
    counts_decide: ClassVar[bool] = True

    def __init__(self, knee_tokens: float, free_tokens: float | None = None) -> None:
        self.knee_tokens = knee_tokens
        self.free_tokens = free_tokens

    def plan(self, demand: Demand, placement: Placement) -> Plan:
        """Both answers and a choice between them on the device, without a host sync."""
        table_ER = placement.logical_to_physical_ER
        tokens_E = demand.tokens_E.to(torch.int32)
        replica_E = choose(tokens_E, placement).clamp(min=0).long()
        one_ER = torch.zeros_like(table_ER).scatter_(1, replica_E[:, None], tokens_E[:, None])
        even_ER = even_split(tokens_E, placement.num_replicas_E, table_ER.shape[1])
        spread = (
            self.is_compute_bound(tokens_E)
            if self.free_tokens is None
            else self._time(even_ER, placement) < self._time(one_ER, placement)
        )
        return Plan(split_ER=torch.where(spread, even_ER, one_ER))

    def is_compute_bound(self, tokens_E: torch.Tensor) -> torch.Tensor:
        """Whether the mean tokens per active expert exceed the knee; bool, no axes."""
        return tokens_E.sum() > self.knee_tokens * (tokens_E > 0).sum()

    def _time(self, split_ER: torch.Tensor, placement: Placement) -> torch.Tensor:
        """Time of the slowest rank that computes its experts in turn, in tokens; float64."""
        assert self.free_tokens is not None
        beyond_ER = (split_ER - self.free_tokens).clamp(min=0).double()
        time_ER = torch.where(split_ER > 0, self.knee_tokens + beyond_ER, 0.0)
        slots = placement.num_physical // placement.num_ranks
        rank_ER = placement.logical_to_physical_ER.clamp(min=0).long() // slots
        time_S = time_ER.new_zeros(placement.num_ranks)
        return time_S.index_add_(0, rank_ER.flatten(), time_ER.flatten()).max()

    def route(
        self,
        topk_ids_TK: torch.Tensor,
        tables: LayerTables,
        num_valid_tokens: torch.Tensor | None,
    ) -> torch.Tensor:
        return route(
            topk_ids_TK,
            logical_to_physical_ER=tables.logical_to_physical_ER,
            num_replicas_E=tables.num_replicas_E,
            knee_tokens=self.knee_tokens,
            free_tokens=self.free_tokens,
            **tables.kernel_arguments(num_valid_tokens),
        )
