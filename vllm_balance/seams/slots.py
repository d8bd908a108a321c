"""Dynamic slots of a loaded model: the host store, the copies and the schedule of its layers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from vllm_balance.config import BalancerConfig
from vllm_balance.cost import CostModel
from vllm_balance.errors import BalancerError
from vllm_balance.experts.dynamic_slots import LayerSlots
from vllm_balance.experts.host_store import ExpertLayout, HostStore, Machine
from vllm_balance.experts.look_ahead import LookAhead
from vllm_balance.experts.prefetch import (
    Copy,
    Prefetch,
    StreamPrefetch,
    SyncPrefetch,
    ThreadPrefetch,
)
from vllm_balance.fetch_cost import FetchCost
from vllm_balance.kernels.rebalance import Rules
from vllm_balance.seams.collective import from_all_ranks
from vllm_balance.seams.fetch_speed import copy_bytes_per_s, token_us
from vllm_balance.seams.gpu import ARRIVALS, computes_as_they_arrive, experts_of
from vllm_balance.slot_balancer import SlotBalancer
from vllm_balance.types import DynamicSlots


class ModelSlots:
    """What the layers of one rank share: all experts in host memory, and what brings them in.

    Raises:
        BalancerError: layers differ in their experts, or memory cannot be shared.
    """

    def __init__(self, runners: list[Any], config: BalancerConfig, group: Any) -> None:
        self._runners, self._config, self._group = runners, config, group
        self._tensors_L = [list(runner.get_expert_weights()) for runner in runners]
        self._on_cpu = self._tensors_L[0][0].is_cpu
        self.store = self._fill_store()
        self.prefetch = self._make_prefetch()

    def maker(self, layer: int) -> Callable[..., SlotBalancer]:
        """What makes the balancer of a layer from the arguments that every balancer takes."""
        num_experts = self._runners[layer].moe_config.num_logical_experts
        assert self._config.dynamic_slots is not None
        dynamic = LayerSlots(
            layer=layer,
            rank=self._group.rank_in_group,
            state=DynamicSlots.empty(
                num_logical=num_experts,
                num_ranks=self._group.world_size,
                num_dynamic=self._config.dynamic_slots,
            ),
            prefetch=self.prefetch,
            expert_bytes=self.store.layout.expert_bytes,
        )
        return partial(SlotBalancer, dynamic=dynamic)

    def rules(self, knee_tokens: float, costs: Sequence[CostModel] | None = None) -> Rules:
        """What the schedules decide by, the same on every rank; a collective, and logged.

        `threshold_tokens` stands for the measured q in both its meanings: the fewest tokens that
        an expert is fetched for, and the time of a fetch. So a small one forces fetches that do
        not pay.

        Args:
            costs: curve of each rank from a profile, whose time of a token is taken instead of
                measuring it.

        Raises:
            BalancerError: nothing could be measured.
        """
        threshold = self._config.threshold_tokens
        if threshold is None:
            threshold = self._derived_threshold(costs)
        else:
            _say(f"MoE balancer {self._config.name}: threshold q = {threshold} tokens, as set.")
        return Rules(
            threshold_tokens=threshold,
            fetch_tokens=0 if self._hides_copies() else threshold,
            knee_tokens=knee_tokens,
        )

    def _hides_copies(self) -> bool:
        """Whether copies run beside the experts of every layer; logged if experts must wait.

        Never on CPU, where a copy takes the core that computes.
        """
        if self._on_cpu or self._config.prefetch == "sync":
            return False
        waiting = [runner for runner in self._runners if not computes_as_they_arrive(runner)]
        if waiting:
            _say(
                f"MoE balancer {self._config.name}: experts of {len(waiting)} layers "
                f"({experts_of(waiting[0])}) take all of a batch in one call, so they wait for "
                f"fetched ones, and every fetch counts as time of its rank. vLLM's Triton experts "
                f"do not wait: --moe-backend triton, if the checkpoint's format allows it."
            )
        return not waiting

    def _derived_threshold(self, costs: Sequence[CostModel] | None) -> int:
        """q from the speeds of this device, means over the ranks."""
        first, layout = self._runners[0].moe_config, self.store.layout
        slot = first.num_logical_experts // self._group.world_size

        def copy(expert: int) -> None:
            self._copy(Copy(layer=0, expert=expert, slot=slot))
            if not self._on_cpu:
                torch.cuda.synchronize()

        own = (
            copy_bytes_per_s(copy, layout.expert_bytes, first.num_logical_experts),
            costs[self._group.rank_in_group].token_us
            if costs is not None
            else token_us(self._runners[0].routed_experts),
        )
        of_ranks = from_all_ranks(self._group, own)
        speed, time_us = (statistics.mean(values) for values in zip(*of_ranks, strict=True))
        cost = FetchCost(expert_bytes=layout.expert_bytes, copy_bytes_per_s=speed, token_us=time_us)
        matrices = 3 if first.is_act_and_mul else 2
        weights = matrices * first.hidden_dim * first.intermediate_size_per_partition
        how = "measured" if costs is None else "from the profile"
        _say(
            f"MoE balancer {self._config.name}: {cost} ({cost.flop_per_s(weights) / 1e9:,.0f} "
            f"GFLOP/s, {how}; means over the ranks)."
        )
        return cost.threshold_tokens

    def connect(self, layers: list[SlotBalancer], knee_tokens: float) -> None:
        """Tells the experts of each layer what to wait for, and each layer which one is next."""
        for runner, layer in zip(self._runners, layers, strict=True):
            if layer.experts is not None:
                layer.experts.arrivals = layer.dynamic
                layer.experts_wait = True
            elif computes_as_they_arrive(runner):
                experts = runner.routed_experts.quant_method.moe_kernel.fused_experts
                setattr(experts, ARRIVALS, layer.dynamic)
                layer.experts_wait = True
        if self._config.look_ahead != "router":
            return
        for index, layer in enumerate(layers[:-1]):
            layer.following = layers[index + 1]
            layer.look_ahead = self._look_ahead(index + 1, layer, knee_tokens)

    def _fill_store(self) -> HostStore:
        layouts = {ExpertLayout.of(tensors) for tensors in self._tensors_L}
        if len(layouts) > 1:
            raise BalancerError(
                f"The MoE layers of this model have experts of different sizes "
                f"({sorted(layout.expert_bytes for layout in layouts)} bytes), and the host store "
                f"needs one size. Use another --moe-balancer for this model."
            )
        num_experts = self._runners[0].moe_config.num_logical_experts
        machine = Machine(
            rank=self._group.rank_in_group, share=partial(from_all_ranks, self._group)
        )
        store = HostStore.shared(
            layouts.pop(),
            num_layers=len(self._runners),
            num_experts=num_experts,
            machine=machine,
        )
        num_home = num_experts // self._group.world_size
        first = machine.rank * num_home
        for layer, tensors in enumerate(self._tensors_L):
            for slot in range(num_home):
                store.write(layer, first + slot, slot, tensors)
        machine.share(None)  # From here on every expert is there.
        if machine.rank == 0:
            _say(
                f"MoE balancer {self._config.name}: the host store of {len(self._runners)} layers "
                f"with {num_experts} experts takes {store.size_bytes:,} bytes "
                f"({store.size_bytes / 2**30:.2f} GiB)."
            )
        return store

    def _make_prefetch(self) -> Prefetch:
        run = self._copy
        if not self._on_cpu:
            self.store.pin()  # From pageable memory a copy would wait in the driver's own buffer.
        if self._config.prefetch == "sync":
            return SyncPrefetch(run)
        return ThreadPrefetch(run) if self._on_cpu else StreamPrefetch(run)

    def _copy(self, copy: Copy) -> None:
        self.store.read(copy.layer, copy.expert, copy.slot, self._tensors_L[copy.layer])

    def _look_ahead(self, index: int, layer: SlotBalancer, knee_tokens: float) -> LookAhead:
        runner = self._runners[index]
        return LookAhead(
            gate=partial(_logits, runner.gate),
            top_k=runner.moe_config.experts_per_token,
            num_experts=runner.moe_config.num_logical_experts,
            rank=layer.rank,
            num_ranks=layer.tables.num_ranks,
            all_reduce=layer.summed,
            knee_tokens=knee_tokens,
        )


def _say(text: str) -> None:
    from vllm.logger import init_logger

    init_logger(f"vllm.{__name__}").info("%s", text)


def _logits(gate: Any, hidden_states_TH: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = gate(hidden_states_TH)[0]
    return logits
