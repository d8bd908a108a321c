"""Fetched experts on a GPU: computed when they have arrived, behind the others. Not run yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vllm_balance.experts.mapped_experts import as_they_arrive
from vllm_balance.seams import Seam

ARRIVALS = "moe_balancer_arrivals"
"""Attribute of vLLM's experts that tells which of the layer's slots still wait for theirs."""

_KERNEL = "vllm.model_executor.layers.fused_moe.modular_kernel:FusedMoEKernelModularImpl"


def experts_of(runner: Any) -> str:
    """What computes a layer's experts, by its class."""
    method = runner.routed_experts.quant_method
    kernel = method.moe_kernel
    return type(method if kernel is None else kernel.fused_experts).__name__


def computes_as_they_arrive(runner: Any) -> bool:
    """Whether a layer's experts may be computed in two calls with an expert map each.

    vLLM's Triton experts may, unless their scales depend on all rows: they skip what the map does
    not have. Others choose experts by their rank, take what a dispatch has counted, or leave an
    output that somebody else sums up.
    """
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
    from vllm.model_executor.layers.fused_moe.prepare_finalize.naive_dp_ep import (
        MoEPrepareAndFinalizeNaiveDPEPModular,
    )
    from vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep import (
        MoEPrepareAndFinalizeNoDPEPModular,
    )

    kernel = runner.routed_experts.quant_method.moe_kernel
    if kernel is None or runner.routed_experts.expert_map is None:
        return False
    all_tokens = (MoEPrepareAndFinalizeNoDPEPModular, MoEPrepareAndFinalizeNaiveDPEPModular)
    return (
        type(kernel.fused_experts) is TritonExperts
        and isinstance(kernel.prepare_finalize, all_tokens)
        and not _scales_by_all_rows(kernel.fused_experts)
    )


def _scales_by_all_rows(experts: Any) -> bool:
    """Whether the inputs of the second product are quantised by one scale for all rows of a call:
    a call with some of the experts would take another. As TritonExperts.apply decides."""
    return (
        experts.quant_dtype is not None
        and experts.a2_scale is None
        and experts.block_shape is None
        and (not experts.per_act_token_quant or experts.quantization_emulation)
    )


def _fused_experts(original: Callable[..., Any]) -> Callable[..., Any]:
    """Computes in two calls while copies are under way. vLLM calls it with keywords only."""

    def fused_experts(self: Any, **call: Any) -> Any:
        arrivals = getattr(self.fused_experts, ARRIVALS, None)
        if arrivals is None:
            return original(self, **call)

        def kernel(expert_map_P: torch.Tensor) -> Any:
            return original(self, **{**call, "expert_map": expert_map_P})

        return as_they_arrive(arrivals, call["expert_map"], kernel)

    return fused_experts


GPU_SEAMS = (
    Seam(
        target=f"{_KERNEL}._fused_experts",
        parameters=("topk_ids", "expert_map"),
        wrap=_fused_experts,
        why="experts that are fetched from host memory are computed behind those that are there",
        delete_when="vLLM can compute a part of a rank's experts",
    ),
)
