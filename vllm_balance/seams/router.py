"""Where logical ids become physical ones: vLLM's router, and its dispatch for data parallelism."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vllm_balance.seams import Seam
from vllm_balance.seams.deployment import settings_of
from vllm_balance.seams.layer_checks import (
    require_balanceable,
    require_known_slots,
    require_predictable,
)

BALANCER = "moe_balancer"
"""Attribute of a router and of a dispatch object that holds its layer's balancer."""


def _apply_eplb_mapping(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply_eplb_mapping(self: Any, topk_ids: torch.Tensor) -> torch.Tensor:
        balancer = getattr(self, BALANCER, None)
        if balancer is None:
            return original(self, topk_ids)
        if balancer.way == "replicated":
            return balancer.in_router(topk_ids, _num_unpadded(self, topk_ids))
        marked_ids = _mark_padding(topk_ids)
        routed = balancer.in_router(marked_ids, None)
        return routed if balancer.way == "after_gather" else _with_padding(routed, marked_ids)

    return apply_eplb_mapping


def _compute_routing(original: Callable[..., Any]) -> Callable[..., Any]:
    def compute_routing(self: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        topk_weights, topk_ids = original(self, *args, **kwargs)
        balancer = getattr(self, BALANCER, None)
        if balancer is None:
            return topk_weights, topk_ids
        return balancer.of_first_rank(topk_weights, topk_ids)

    return compute_routing


def _num_unpadded(router: Any, topk_ids: torch.Tensor) -> torch.Tensor | None:
    """Real rows, int32, one element, where CUDA graphs pad a batch; CPU batches are not padded."""
    if topk_ids.is_cpu:
        return None
    state = router.eplb_state
    if state is not None and state.num_unpadded_tokens_tensors is not None:
        count: torch.Tensor = state.num_unpadded_tokens_tensors[0]
        return count
    is_padding = _padding(topk_ids)
    return None if is_padding is None else (~is_padding).sum(dtype=torch.int32)


def _padding(topk_ids: torch.Tensor) -> torch.Tensor | None:
    """Rows behind the batch, and all rows of idle ranks, bool [T]; None if vLLM does not say.

    Without VLLM_MOE_SKIP_PADDING (on by default) not every model runner of vLLM fills this mask.
    """
    import vllm.envs as envs
    from vllm.forward_context import get_forward_context

    is_padding = get_forward_context().is_padding if envs.VLLM_MOE_SKIP_PADDING else None
    return None if is_padding is None else is_padding[: topk_ids.shape[0]]


def _mark_padding(topk_ids: torch.Tensor) -> torch.Tensor:
    """The ids, in padding rows -2 - id, which counts nowhere; -1 stays -1, and a CPU gets -1."""
    is_padding = _padding(topk_ids)
    if is_padding is None:
        return topk_ids
    if topk_ids.is_cpu:
        return topk_ids.masked_fill(is_padding[:, None], -1)
    return torch.where(is_padding[:, None], -2 - topk_ids, topk_ids)


def _with_padding(slots: torch.Tensor, marked_ids: torch.Tensor) -> torch.Tensor:
    """The slots, and on a GPU what stock vLLM has in padding rows: the router's choice.

    Routers that skip padding emit -1, which expert kernels take from them. Kernels behind other
    routers may have met real ids only: those are taken for slots as they are, spread as the router
    spread them, and what comes out of these rows is never read.
    """
    return slots if slots.is_cpu else torch.maximum(slots, -2 - marked_ids)


def _prepare(original: Callable[..., Any]) -> Callable[..., Any]:
    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        gathered = original(self, *args, **kwargs)
        balancer = getattr(self, BALANCER, None)
        if balancer is None:
            return gathered
        hidden_states, scales, meta, topk_ids, topk_weights = gathered
        rows_S = _rows_of_sources()
        slots = _with_padding(balancer.after_gather(topk_ids, rows_S), topk_ids)
        if (inputs_TH := getattr(balancer, "inputs_TH", None)) is not None:
            balancer.inputs_TH = None
            balancer.before_experts(inputs_TH, rows_S)
        return hidden_states, scales, meta, slots, topk_weights

    return prepare


def _rows_of_sources() -> list[int] | None:
    """Rows that each rank put into the gather; None if it was not vLLM that did it."""
    from vllm.forward_context import get_forward_context

    metadata = get_forward_context().dp_metadata
    return None if metadata is None else metadata.get_chunk_sizes_across_dp_rank()


def _select_experts(original: Callable[..., Any]) -> Callable[..., Any]:
    """Lets the next layer look at this one's tokens when its own experts are on their way: here, or
    if they are asked for behind a gather, there."""

    def select_experts(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        chosen = original(self, hidden_states, *args, **kwargs)
        balancer = getattr(self, BALANCER, None)
        if balancer is None or getattr(balancer, "look_ahead", None) is None:
            return chosen
        if balancer.way == "after_gather":
            balancer.inputs_TH = hidden_states
        else:
            rows_S = None if balancer.way == "replicated" else _rows_of_sources()
            balancer.before_experts(hidden_states, rows_S)
        return chosen

    return select_experts


def _select_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    def select_forward(self: Any) -> Callable[..., Any]:
        vllm_config = get_current_vllm_config()
        config = settings_of(vllm_config)
        if config is None:  # Another model in the process of one that is balanced.
            return original(self)
        require_balanceable(self)
        if config.look_ahead == "router":
            require_predictable(self)
        enable_eplb = vllm_config.parallel_config.enable_eplb
        require_known_slots(self, config.name if enable_eplb else None)
        forward = original(self)
        if not current_platform.is_cpu():
            return forward
        if self._shared_experts is None:
            return torch.ops.vllm.moe_forward
        return torch.ops.vllm.moe_forward_shared

    from vllm.config import get_current_vllm_config
    from vllm.platforms import current_platform

    return select_forward


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
        target="vllm.model_executor.layers.fused_moe.router.cpu_router:CPURouter._compute_routing",
        parameters=("hidden_states", "router_logits"),
        wrap=_compute_routing,
        why="tensor-parallel ranks whose sums differ in the last bit must use the same experts "
        "and weights; a replayed choice is the same on all ranks anyway",
        delete_when="vLLM's CPU ranks have the same hidden states, or share their router's choice",
    ),
    Seam(
        target="vllm.model_executor.layers.fused_moe.router.base_router:BaseRouter._select_experts",
        parameters=("hidden_states", "router_logits"),
        wrap=_select_experts,
        why="the inputs of a layer say what the next one will need, which is fetched early",
        delete_when="vLLM lets plugins look at a layer's inputs",
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
