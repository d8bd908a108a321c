"""What happens to one batch in one layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from vllm_balance.exchange import AllReduce, Way, counts_per_rank
from vllm_balance.experts.local_pairs import LocalPairExperts
from vllm_balance.kernels.assign import assign
from vllm_balance.kernels.record import counters_size, record_load
from vllm_balance.metrics import add_plan, layer_metrics, num_batches
from vllm_balance.routing import CountingPolicy, LayerTables, RoutingPolicy
from vllm_balance.types import Demand


@dataclass(slots=True, kw_only=True)
class LayerBalancer:
    """The balancer of one MoE layer on one rank.

    The seams call :meth:`of_first_rank` with what a router on CPU chose, :meth:`in_router` with
    this rank's logical ids and, where the dispatch gathers all tokens, :meth:`after_gather` with
    the gathered ones.
    """

    layer_name: str
    policy: RoutingPolicy
    tables: LayerTables
    way: Way
    rank: int
    all_reduce: AllReduce
    record: Callable[[torch.Tensor, torch.Tensor | None], None] | None = None
    """Takes the logical ids of this rank's tokens, and how many of the rows are real."""
    experts: LocalPairExperts | None = None
    """What computes this rank's share on CPU; None where vLLM's kernels take global ids."""
    decide_ns: int = 0
    """Host time spent deciding, ns. On a GPU: the time to launch, not to compute."""
    exchanged_bytes: int = 0
    """Bytes this rank put into exchanges of counts and ids beyond vLLM's own collectives."""
    exchange_ns: int = 0
    ranks_are_alike: bool = True
    """Whether all ranks have the same processor and number of threads."""
    last_physical_TK: torch.Tensor | None = None
    """Slots of the last batch, for those who ask; on CPU only, where it takes host memory."""

    def in_router(
        self, topk_ids_TK: torch.Tensor, num_valid_tokens: torch.Tensor | None
    ) -> torch.Tensor:
        """Slots of the pairs of this rank's tokens, or the ids as they are if mapped later."""
        if self.record is not None:
            self.record(topk_ids_TK, num_valid_tokens)
        if self.way == "after_gather":
            return topk_ids_TK
        return self._decide(topk_ids_TK, num_valid_tokens)

    def after_gather(
        self, topk_ids_GK: torch.Tensor, rows_F: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Slots of the pairs of all ranks' tokens; ids of padding rows are below 0 already.

        Args:
            rows_F: rows of each source, one behind the other. None: sources are not told apart.
        """
        if self.way != "after_gather":
            return topk_ids_GK
        return self._decide(topk_ids_GK, None, rows_F)

    def _decide(
        self,
        topk_ids_TK: torch.Tensor,
        num_valid_tokens: torch.Tensor | None,
        rows_F: Sequence[int] | None = None,
    ) -> torch.Tensor:
        start = time.perf_counter_ns()
        physical_TK = self._route(topk_ids_TK.contiguous(), num_valid_tokens, rows_F)
        self.decide_ns += time.perf_counter_ns() - start
        self.last_physical_TK = physical_TK if physical_TK.is_cpu else None
        return physical_TK

    def of_first_rank(
        self, weights_TK: torch.Tensor, ids_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What rank 0's router chose where ranks with the same tokens may differ; a collective.

        With ids of their own, ranks would compute a pair twice or not at all. The weights go with
        them: vLLM's routers on CPU do not sort, so the same experts may stand at other places.

        Args:
            weights_TK: float32, as this rank's router chose; ids_TK likewise, logical.
        """
        if not self._ranks_may_differ(ids_TK):
            return weights_TK, ids_TK
        start = time.perf_counter_ns()
        # Bits of the weights, which a sum with zeros leaves as they are.
        own_T2K = torch.cat([ids_TK.int(), weights_TK.float().view(torch.int32)], dim=1)
        first_T2K = self.summed(own_T2K if self.rank == 0 else torch.zeros_like(own_T2K))
        first_ids_TK, bits_TK = (part.contiguous() for part in first_T2K.chunk(2, dim=1))
        self.decide_ns += time.perf_counter_ns() - start
        weights_TK = bits_TK.view(torch.float32).to(weights_TK.dtype)
        return weights_TK, first_ids_TK.to(ids_TK.dtype)

    def _ranks_may_differ(self, topk_ids_TK: torch.Tensor) -> bool:
        """Whether ranks with the same tokens may have chosen other ids for them.

        vLLM's all-reduce in shared memory adds a rank's own part first. From three ranks on, hidden
        states then differ in the last bit, and a near tie of two experts falls differently. So it
        may where ranks have other processors or numbers of threads, which sum in another order.
        """
        return (
            self.way == "replicated"
            and topk_ids_TK.is_cpu
            and topk_ids_TK.numel() > 0
            and (self.tables.num_ranks > 2 or not self.ranks_are_alike)
        )

    def summed(self, own: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, counted as an exchange of this layer; a collective."""
        start = time.perf_counter_ns()
        total_of_ranks = self.all_reduce(own)
        self.exchange_ns += time.perf_counter_ns() - start
        self.exchanged_bytes += own.numel() * own.element_size()
        return total_of_ranks

    def _route(
        self,
        topk_ids_TK: torch.Tensor,
        num_valid_tokens: torch.Tensor | None,
        rows_F: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Maps and counts one batch. Policies on fixed placements do not tell sources apart."""
        if self.way == "all_reduce" and self.policy.counts_decide:
            return self._route_by_exchanged_counts(topk_ids_TK, cast(CountingPolicy, self.policy))
        return self.policy.route(topk_ids_TK, self.tables, num_valid_tokens)

    def _route_by_exchanged_counts(
        self, topk_ids_TK: torch.Tensor, policy: CountingPolicy
    ) -> torch.Tensor:
        tables, placement = self.tables, self.tables.placement
        counts_SE = self._exchanged_counts(topk_ids_TK)
        tokens_E = counts_SE.sum(0, dtype=torch.int32)
        plan = policy.plan(Demand(tokens_E=tokens_E, tokens_SE=counts_SE), placement)
        physical_TK = assign(
            topk_ids_TK,
            plan.split_ER,
            placement.logical_to_physical_ER,
            offset_E=counts_SE[: self.rank].sum(0, dtype=torch.int32),
        )
        add_plan(tables.counters, plan, placement)
        if tables.load_P is not None:
            record_load(
                physical_TK,
                num_physical=tables.num_physical,
                load_P=tables.load_P,
                record_enabled=tables.record_enabled,
            )
        return physical_TK

    def _exchanged_counts(self, topk_ids_TK: torch.Tensor) -> torch.Tensor:
        """Pairs of each expert on each rank, [S, E] int32; a collective."""
        return counts_per_rank(
            topk_ids_TK,
            num_logical=self.tables.num_logical,
            rank=self.rank,
            num_ranks=self.tables.num_ranks,
            all_reduce=self.summed,
        )

    def trial(self, ids_TK: torch.Tensor, tables: LayerTables) -> torch.Tensor:
        """Slots of ids that are no batch's, in the layer's way, counted in `tables` alone; nothing
        is fetched.

        A collective where the way is one.
        """
        return replace(self, tables=tables)._route(ids_TK, None)

    def reset(self) -> None:
        """Sets all counters to zero."""
        self.tables.counters.zero_()
        self.decide_ns = self.exchanged_bytes = self.exchange_ns = 0
        if self.experts is not None:
            self.experts.reset()

    def slots(self) -> dict[str, list[int]]:
        """The expert in each slot now, and the pairs of the last batch that went there.

        With the all-reduce way the batch is this rank's tokens, otherwise all tokens. Without a
        last batch at hand (GPU) there are no pairs.
        """
        experts_P = self.content_P()
        tokens_P = torch.zeros_like(experts_P)
        if self.last_physical_TK is not None:
            slots_N = self.last_physical_TK.flatten().long()
            valid_N = slots_N[(slots_N >= 0) & (slots_N < len(experts_P))]
            tokens_P = valid_N.bincount(minlength=len(experts_P))
        return {"physical_to_logical": experts_P.tolist(), "slot_tokens": tokens_P.tolist()}

    def content_P(self) -> torch.Tensor:
        """The expert in each slot now, int32 [P]; -1 in a slot that holds none."""
        return self.tables.placement.physical_to_logical_P

    def recent_experts_us(self) -> list[float]:
        """Time of this rank's experts in each of the last batches, us; empty on GPUs."""
        return [ns / 1e3 for ns in self.experts.recent_ns] if self.experts else []

    def stepped_aside(self, summed: dict[str, Any]) -> dict[str, int]:
        """Batches in which the balancer did not do what its name says, by reason.

        Args:
            summed: the status summed over the layers.
        """
        if not self.policy.counts_decide:
            return {}
        if self.tables.num_physical == self.tables.num_logical:
            return {"one_copy": summed["decisions"]}
        return {
            "compute_bound": summed["compute_bound_batches"],
            "no_tokens": summed["empty_batches"],
        }

    def status(self) -> dict[str, Any]:
        """This layer's counters by name."""
        counted = layer_metrics(self.tables.counters, self.tables.num_ranks)
        return {
            "layer": self.layer_name,
            "decisions": num_batches(counted),
            "decide_us": self.decide_ns / 1e3,
            "exchange_us": self.exchange_ns / 1e3,
            "exchanged_bytes": self.exchanged_bytes,
            "experts_us": self.experts.kernel_ns / 1e3 if self.experts else 0.0,
            "experts_wrapping_us": self.experts.wrapping_ns / 1e3 if self.experts else 0.0,
            **counted,
        }


def warm_up(layer: LayerBalancer, *, top_k: int) -> None:
    """Compiles the kernels that the layer uses, so that no request waits for it.

    Routes two tokens on scratch buffers: nothing is counted. Every rank takes part.
    """
    load_P, counters = layer.tables.load_P, torch.zeros_like(layer.tables.counters)
    # vLLM's kernel takes no batch without a load, and ours would be compiled for another case.
    scratch_P = None if load_P is None else torch.zeros_like(load_P)
    tables = replace(layer.tables, load_P=scratch_P, counters=counters)
    device = tables.counters.device
    for dtype in (torch.int32, torch.int64):
        ids_TK = torch.zeros((2, top_k), dtype=dtype, device=device)
        physical_TK = layer.trial(ids_TK, tables)
        if layer.experts is not None:
            layer.experts.select(physical_TK, torch.zeros(ids_TK.shape))


def new_counters(num_ranks: int, device: torch.device) -> torch.Tensor:
    """Zeroed counters of one layer, int64."""
    return torch.zeros(counters_size(num_ranks), dtype=torch.int64, device=device)
