"""vLLM's configuration of one MoE layer without ranks, for its kernels outside of a server."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig


def moe_config(
    *,
    slots: int,
    local: int,
    logical: int,
    top_k: int,
    hidden: int,
    inner: int,
    dtype: torch.dtype = torch.float32,
    activation: MoEActivation | None = None,
) -> FusedMoEConfig:
    """Of a layer with so many slots on all ranks, of which this one holds `local`; None: SiLU."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEConfig,
        FusedMoEParallelConfig,
        RoutingMethodType,
    )

    return FusedMoEConfig(
        num_experts=slots,
        experts_per_token=top_k,
        hidden_dim=hidden,
        intermediate_size=inner,
        num_local_experts=local,
        num_logical_experts=logical,
        activation=activation or MoEActivation.SILU,
        device="cpu",
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=dtype,
    )
