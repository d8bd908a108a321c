"""Gives a loaded MoE layer its balancer: on its router, its dispatch and, on CPU, its experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch

from vllm_balance.balancer import LayerBalancer, new_counters
from vllm_balance.config import BalancerConfig
from vllm_balance.errors import BalancerError
from vllm_balance.exchange import way_of_exchange
from vllm_balance.experts.local_pairs import LocalPairExperts, PairBuffers
from vllm_balance.initial_placement import tables as tables_of_slots
from vllm_balance.routing import LayerTables
from vllm_balance.seams.cpu import EXPERTS
from vllm_balance.seams.loading import PlacedLoading, layer_index
from vllm_balance.seams.router import BALANCER
from vllm_balance.seams.without_eplb import without_eplb

Balancer = TypeVar("Balancer", bound=LayerBalancer)


def bind_layer(
    runner: Any,
    make: Callable[..., Balancer],
    config: BalancerConfig,
    buffers: PairBuffers,
    loading: PlacedLoading | None = None,
    *,
    largest_graph: int = 0,
) -> Balancer:
    """Gives one layer's router and dispatch their balancer.

    Args:
        make: the balancer from the keyword arguments that every one takes.
        buffers: of this rank's pairs, for all its layers; used on CPU.
        loading: what put the layer's weights in place.
        largest_graph: tokens of the largest CUDA graph, which pads smaller batches; 0 without one.

    Raises:
        BalancerError: vLLM's EPLB is on, and its maps do not cover the layer; or data-parallel
            ranks gather their tokens in front of its router.
    """
    from vllm.distributed import get_ep_group
    from vllm.model_executor.layers.fused_moe.prepare_finalize.naive_dp_ep import (
        MoEPrepareAndFinalizeNaiveDPEPModular,
    )

    group = get_ep_group()
    kernel = runner.routed_experts.quant_method.moe_kernel
    dispatch = None if kernel is None else kernel.prepare_finalize
    gathers = isinstance(dispatch, MoEPrepareAndFinalizeNaiveDPEPModular)
    if kernel is None and runner.moe_config.dp_size > 1:
        raise BalancerError(
            f"{runner.layer_name} has no modular kernel, so that vLLM gathers the tokens of all "
            f"data-parallel ranks in front of the router, where --moe-balancer {config.name} takes "
            f"them for this rank's own. Use tensor parallelism, or another checkpoint or "
            f"--moe-backend, or remove --moe-balancer."
        )
    way = way_of_exchange(
        data_parallel_size=runner.moe_config.dp_size,
        gathers_tokens=gathers,
        asked_for=config.exchange,
    )
    tables = _tables(config.name, runner, group.world_size, loading)
    if way == "replicated":
        tables = replace(tables, most_padded=largest_graph)
    balancer = make(
        layer_name=runner.layer_name,
        tables=tables,
        way=way,
        rank=group.rank_in_group,
        all_reduce=group.all_reduce,
        experts=_local_experts(runner, buffers),
    )
    attach(runner, balancer)
    return balancer


def attach(runner: Any, balancer: LayerBalancer) -> None:
    """Puts a layer's balancer where the seams look for it.

    Again behind new weights: vLLM then builds the kernels of some quantised experts anew, and what
    was put on the old ones is lost.
    """
    kernel = runner.routed_experts.quant_method.moe_kernel
    setattr(runner.router, BALANCER, balancer)
    if balancer.way == "after_gather":
        setattr(kernel.prepare_finalize, BALANCER, balancer)
    if balancer.experts is not None:
        setattr(kernel.fused_experts, EXPERTS, balancer.experts)


def _local_experts(runner: Any, buffers: PairBuffers) -> LocalPairExperts | None:
    """On CPU: what hands vLLM's experts the pairs of this rank; otherwise None."""
    expert_map = runner.routed_experts.expert_map
    kernel = runner.routed_experts.quant_method.moe_kernel
    if expert_map is None or not expert_map.is_cpu or kernel is None:
        return None
    return LocalPairExperts(expert_map, buffers)


def _tables(name: str, runner: Any, num_ranks: int, loading: PlacedLoading | None) -> LayerTables:
    state = runner.router.eplb_state
    num_physical = runner.moe_config.num_experts
    if state is not None:
        if state.logical_to_physical_map is None:
            raise without_eplb(name, f"its maps do not cover {runner.layer_name} of this model")
        device = state.logical_to_physical_map.device
        return LayerTables(
            logical_to_physical_ER=state.logical_to_physical_map,
            num_replicas_E=state.logical_replica_count,
            num_ranks=num_ranks,
            num_physical=num_physical,
            load_P=state.expert_load_view,
            record_enabled=state.should_record_tensor,
            counters=new_counters(num_ranks, device),
        )
    device = next(runner.routed_experts.parameters()).device
    table_ER = torch.arange(num_physical, dtype=torch.int64)[:, None]
    if loading is not None:
        index = layer_index(runner.layer_name)
        table_ER = torch.from_numpy(
            tables_of_slots(loading.placement.slots_P(index), num_physical)[0]
        )
    return LayerTables(
        logical_to_physical_ER=table_ER.to(device),
        num_replicas_E=torch.ones(num_physical, dtype=torch.int64, device=device),
        num_ranks=num_ranks,
        num_physical=num_physical,
        load_P=None,
        record_enabled=None,
        counters=new_counters(num_ranks, device),
    )
