"""Where logical ids become physical ones: vLLM's router, and its dispatch for data parallelism."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vllm_balance.errors import BalancerError
from vllm_balance.seams import Seam

BALANCER = "moe_balancer"
"""Attribute of a router and of a dispatch object that holds its layer's balancer."""


def _apply_eplb_mapping(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply_eplb_mapping(self: Any, topk_ids: torch.Tensor) -> torch.Tensor:
        balancer = getattr(self, BALANCER, None)
        if balancer is None:
            return original(self, topk_ids)
        if balancer.way == "replicated":
            return balancer.in_router(topk_ids, _num_unpadded(self))
        return balancer.in_router(_without_padding(topk_ids), None)

    return apply_eplb_mapping


def _num_unpadded(router: Any) -> torch.Tensor | None:
    """vLLM's count of real rows, where CUDA graphs pad a batch; CPU batches are not padded."""
    state = router.eplb_state
    if state is None or state.num_unpadded_tokens_tensors is None:
        return None
    count = state.num_unpadded_tokens_tensors[0]
    return None if count.is_cpu else count


def _without_padding(topk_ids: torch.Tensor) -> torch.Tensor:
    """The ids with padding rows set to -1: rows behind the batch, and batches of idle ranks."""
    from vllm.forward_context import get_forward_context

    is_padding = get_forward_context().is_padding
    if is_padding is None:
        return topk_ids
    return topk_ids.masked_fill(is_padding[: topk_ids.shape[0], None], -1)


def _prepare(original: Callable[..., Any]) -> Callable[..., Any]:
    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        gathered = original(self, *args, **kwargs)
        balancer = getattr(self, BALANCER, None)
        if balancer is None:
            return gathered
        hidden_states, scales, meta, topk_ids, topk_weights = gathered
        topk_ids = balancer.after_gather(topk_ids)
        if not topk_ids.is_cpu:
            # GPU kernels take no -1; the weights of padding rows are never read.
            topk_ids = topk_ids.clamp(min=0)
        return hidden_states, scales, meta, topk_ids, topk_weights

    return prepare


def _select_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    def select_forward(self: Any) -> Callable[..., Any]:
        require_balanceable(self)
        forward = original(self)
        if not current_platform.is_cpu():
            return forward
        if self._shared_experts is None:
            return torch.ops.vllm.moe_forward
        return torch.ops.vllm.moe_forward_shared

    from vllm.platforms import current_platform

    return select_forward


def require_balanceable(runner: Any) -> None:
    """Returns if a layer that is being built can be balanced; runs before weights are loaded.

    Raises:
        BalancerError: its kernel does its own routing, or cannot run expert-parallel here.
    """
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.platforms import current_platform

    method = runner.routed_experts.quant_method
    if method.is_monolithic:
        raise BalancerError(
            f"{runner.layer_name} runs on monolithic experts ({type(method).__name__}), which "
            f"choose experts inside their kernel, so --moe-balancer would do nothing. Choose a "
            f"modular backend with --moe-backend (e.g. triton), or leave --moe-balancer away."
        )
    experts = getattr(method, "experts_cls", None)
    if current_platform.is_cpu() and not (
        isinstance(experts, type) and issubclass(experts, CPUUnquantizedExperts)
    ):
        raise BalancerError(
            f"{runner.layer_name} runs on {type(method).__name__}; on CPU --moe-balancer supports "
            f"unquantised experts (bfloat16, float16, float32). Serve an unquantised checkpoint, "
            f"or leave --moe-balancer and --enable-expert-parallel away."
        )


ROUTER_SEAMS = (
    Seam(
        target="vllm.model_executor.layers.fused_moe.runner.moe_runner:MoERunner._select_forward",
        parameters=("self",),
        wrap=_select_forward,
        why="refuses layers that cannot be balanced while the model is built; on CPU returns the "
        "opaque op that GPUs use, because torch.compile must not trace into the balancer",
        delete_when="vLLM tells plugins which experts a layer will use",
    ),
    Seam(
        target="vllm.model_executor.layers.fused_moe.router.base_router:"
        "BaseRouter._apply_eplb_mapping",
        parameters=("topk_ids",),
        wrap=_apply_eplb_mapping,
        why="the replica of each token is chosen here; every router passes it",
        delete_when="vLLM takes a replica-selection policy as an argument",
    ),
    Seam(
        target="vllm.model_executor.layers.fused_moe.prepare_finalize.naive_dp_ep:"
        "MoEPrepareAndFinalizeNaiveDPEPModular.prepare",
        parameters=("topk_ids", "topk_weights"),
        wrap=_prepare,
        why="after the all-gather every rank sees the global batch, so the counts are free",
        delete_when="vLLM maps replicas behind the dispatch",
    ),
)
