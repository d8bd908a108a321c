"""What happens to one batch in one layer with dynamic slots: schedule, fetch, route."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_balance.balancer import LayerBalancer
from vllm_balance.experts.dynamic_slots import LayerSlots
from vllm_balance.experts.look_ahead import LookAhead
from vllm_balance.kernels.assign import assign
from vllm_balance.kernels.rebalance import count
from vllm_balance.kernels.record import Regime, record
from vllm_balance.metrics import add_plan
from vllm_balance.routing import FetchingPolicy, LayerTables
from vllm_balance.types import Demand, Outcome, Schedule


@dataclass(slots=True, kw_only=True)
class SlotBalancer(LayerBalancer):
    """The balancer of one MoE layer with dynamic slots on one rank.

    Counts are read on the host, so nothing here can be part of a CUDA graph.
    """

    policy: FetchingPolicy  # type: ignore[assignment]
    dynamic: LayerSlots
    experts_wait: bool = False
    """The layer's experts compute those that are there and then wait for copies themselves."""
    look_ahead: LookAhead | None = None
    """Guesses what ``following`` will ask for; None: no guess."""
    following: SlotBalancer | None = None
    """The next MoE layer."""
    inputs_TH: torch.Tensor | None = None
    """Of this layer's router, until `before_experts` is called behind a gather."""
    look_ahead_ns: int = 0
    """Time for guesses, without that for their copies, which the next layer counts as waiting."""

    def _route(
        self,
        topk_ids_TK: torch.Tensor,
        num_valid_tokens: torch.Tensor | None,
        rows_F: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Schedules the batch, starts this rank's fetches, maps and counts its pairs."""
        offset_E = None
        if self.way == "all_reduce":
            counts_FE = self._on_host(self._exchanged_counts(topk_ids_TK))
            offset_E = counts_FE[: self.rank].sum(0, dtype=torch.int32)
        else:
            valid = None if num_valid_tokens is None else self._on_host(num_valid_tokens)
            num_experts = self.dynamic.state.num_logical
            counts_FE = _count(self._on_host(topk_ids_TK), num_experts, valid, rows_F)
        schedule = self._schedule(counts_FE)
        # Before the copies of experts, behind which these small ones would wait on a GPU.
        physical_TK = self._map(topk_ids_TK, schedule, self.tables, offset_E, num_valid_tokens)
        before_ns = self.dynamic.waiting_ns
        self.dynamic.follow(schedule)
        self.decide_ns -= self.dynamic.waiting_ns - before_ns
        if not self.experts_wait and self.dynamic.pending():
            self.dynamic.wait()
        return physical_TK

    def _on_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same on the host; waiting for a device that still computes it is no deciding."""
        start = time.perf_counter_ns()
        found = tensor.cpu()
        self.decide_ns -= time.perf_counter_ns() - start
        return found

    def _schedule(self, counts_FE: torch.Tensor) -> Schedule:
        """What to do with a batch that has these pairs by source rank, int32 [F, E]."""
        demand = Demand(tokens_E=counts_FE.sum(0, dtype=torch.int32), tokens_SE=counts_FE)
        return self.policy.schedule(demand, self.dynamic.state)

    def before_experts(
        self, hidden_states_TH: torch.Tensor, rows_S: Sequence[int] | None = None
    ) -> None:
        """Lets the next layer fetch what it will probably need, while this one computes.

        A collective if the batch is large enough. Arguments are those of :meth:`LookAhead.guess`.
        """
        if self.look_ahead is None or self.following is None:
            return
        start, next_slots = time.perf_counter_ns(), self.following.dynamic
        before_ns = next_slots.waiting_ns
        counts_FE = self.look_ahead.guess(hidden_states_TH, rows_S)
        if counts_FE is not None:
            next_slots.follow(self.following._schedule(counts_FE), is_guess=True)
        self.look_ahead_ns += time.perf_counter_ns() - start - (next_slots.waiting_ns - before_ns)

    def _map(
        self,
        topk_ids_TK: torch.Tensor,
        schedule: Schedule,
        tables: LayerTables,
        offset_E: torch.Tensor | None = None,
        num_valid_tokens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Slots of the pairs, counted in the tables."""
        device, placement = topk_ids_TK.device, schedule.placement
        physical_TK = assign(
            topk_ids_TK,
            schedule.plan.split_ER.to(device),
            placement.logical_to_physical_ER.to(device),
            offset_E=None if offset_E is None else offset_E.to(device),
            num_valid_tokens=num_valid_tokens,
        )
        if self.way == "all_reduce":
            add_plan(tables.counters, schedule.plan, placement, _regime(schedule))
        else:
            arguments = tables.kernel_arguments(num_valid_tokens)
            record(physical_TK, regime=_regime(schedule), **arguments)
        return physical_TK

    def trial(self, ids_TK: torch.Tensor, tables: LayerTables) -> torch.Tensor:
        counts_FE = _count(ids_TK.cpu(), self.dynamic.state.num_logical)
        return self._map(ids_TK, self._schedule(counts_FE), tables)

    def reset(self) -> None:
        LayerBalancer.reset(self)
        self.look_ahead_ns = 0
        self.dynamic.reset()

    def content_P(self) -> torch.Tensor:
        state = self.dynamic.state
        home_SE = torch.arange(state.num_logical, dtype=torch.int32).view(state.num_ranks, -1)
        return torch.cat([home_SE, state.content_SD], dim=1).flatten()

    def status(self) -> dict[str, Any]:
        return {
            **LayerBalancer.status(self),
            **self.dynamic.status(),
            "look_ahead_us": self.look_ahead_ns / 1e3,
        }

    def stepped_aside(self, summed: dict[str, Any]) -> dict[str, int]:
        return {
            "even_enough": summed["balanced_schedules"],
            "no_move_pays": summed["unpaid_schedules"],
            "memory_bound": summed["memory_bound_schedules"],
            "no_tokens": summed["empty_schedules"],
        }


def _count(
    topk_ids_TK: torch.Tensor,
    num_experts: int,
    num_valid_tokens: torch.Tensor | None = None,
    rows_F: Sequence[int] | None = None,
) -> torch.Tensor:
    """Pairs of each expert from each source, int32 [F, E]; all on the host.

    Args:
        rows_F: rows of each source, not with `num_valid_tokens`; None: all rows are of one.
    """
    if rows_F is None:
        return count(topk_ids_TK, num_experts, num_valid_tokens)[None]
    parts = torch.split(topk_ids_TK, list(rows_F))
    return torch.stack([count(part, num_experts) for part in parts])


def _regime(schedule: Schedule) -> Regime:
    """How a batch with tokens was routed, whether or not anything moved."""
    is_few = schedule.outcome is Outcome.MEMORY_BOUND
    return Regime.MEMORY_BOUND if is_few else Regime.COMPUTE_BOUND
