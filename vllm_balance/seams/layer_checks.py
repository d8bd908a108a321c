"""Whether a layer that is being built can be balanced: asked before weights are loaded."""

from __future__ import annotations

from typing import Any

from vllm_balance.errors import BalancerError
from vllm_balance.seams.deployment import settings_of
from vllm_balance.seams.without_eplb import without_eplb


def require_balanceable(runner: Any) -> None:
    """Returns if a layer that is being built can be balanced; runs before weights are loaded.

    Raises:
        BalancerError: its kernel does its own routing, cannot run expert-parallel here, or needs
            what empty slots do not have.
    """
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.platforms import current_platform

    method = runner.routed_experts.quant_method
    if method.is_monolithic:
        raise BalancerError(
            f"{runner.layer_name} runs on monolithic experts ({type(method).__name__}), which "
            f"choose experts inside their kernel, so --moe-balancer would do nothing. Choose a "
            f"modular backend with --moe-backend (e.g. triton), or remove --moe-balancer."
        )
    _require_no_shared_scales(runner)
    experts = getattr(method, "experts_cls", None)
    if current_platform.is_cpu() and not (
        isinstance(experts, type) and issubclass(experts, CPUUnquantizedExperts)
    ):
        raise BalancerError(
            f"{runner.layer_name} runs on {type(method).__name__}; on CPU --moe-balancer supports "
            f"unquantised experts (bfloat16, float16, float32). Serve an unquantised checkpoint, "
            f"or remove --moe-balancer and --enable-expert-parallel."
        )


def require_predictable(runner: Any) -> None:
    """Returns if the layer before can guess what this one's router will choose.

    Raises:
        BalancerError: the router is not known, or does not take the largest logits.
    """
    if runner.gate is None:
        raise BalancerError(
            f"`look_ahead` = 'router' asks the next layer's router early, and {runner.layer_name} "
            f"does not tell vLLM where its router is. Use 'off' for this model."
        )
    if found := _unlike_top_k(runner.router):
        raise BalancerError(
            f"`look_ahead` = 'router' guesses that the next layer takes the experts with the "
            f"largest logits, and the router of {runner.layer_name} chooses otherwise "
            f"({', '.join(found)}), so its guesses would be wrong. Use 'off' for this model."
        )


def _unlike_top_k(router: Any) -> list[str]:
    """What lets a router choose other experts than those with the largest logits; [] if nothing.

    vLLM's ``CPURouter`` does it all in one class; for GPUs every other way has one of its own.
    """
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
    from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter

    if type(router) not in (CPURouter, FusedTopKRouter):
        return [type(router).__name__]
    scores = getattr(router, "scoring_func", "unknown")
    found = {
        "grouped top-k": getattr(router, "use_grouped_topk", False),
        "a routing function of its own": getattr(router, "custom_routing_function", None),
        "a correction bias": getattr(router, "e_score_correction_bias", None) is not None,
        f"{scores} scores": scores != "softmax",
    }
    return [name for name, present in found.items() if present]


def _require_no_shared_scales(runner: Any) -> None:
    """Raises BalancerError if slots are empty at first and all slots of a rank share a scale.

    vLLM makes one scale of the activations out of those of all slots when it has loaded the
    weights; what stands in an empty slot would decide it.
    """
    from vllm.config import get_current_vllm_config

    config = settings_of(get_current_vllm_config())
    if config is None or not config.fetches:
        return
    names = [name for name, _ in runner.routed_experts.named_parameters()]
    found = [name for name in names if "_input_" in name and "scale" in name]
    if found:
        raise BalancerError(
            f"{runner.layer_name} has static scales of activations ({', '.join(found)}), which "
            f"vLLM joins over all slots of a rank while the dynamic slots of --moe-balancer "
            f"{config.name} are empty, so the model would answer wrongly. Serve a checkpoint with "
            f"dynamic scales of activations, or use a balancer that fetches nothing, e.g. metro."
        )


def require_known_slots(runner: Any, eplb_for: str | None) -> None:
    """Returns if the experts of a layer that is being built are those that are balanced.

    Args:
        eplb_for: the balancer that vLLM's EPLB was turned on for, if it was.

    Raises:
        BalancerError: the model does not give its layers vLLM's EPLB, which was turned on, or the
            layer computes shared experts as further slots.
    """
    if eplb_for is not None and runner.router.eplb_state is None:
        raise without_eplb(eplb_for, f"vLLM built {runner.layer_name} of this model without it")
    fused = runner.routed_experts.expert_map_manager.num_fused_shared_experts
    if fused:
        raise BalancerError(
            f"{runner.layer_name} computes {fused} shared experts as slots behind those of the "
            f"routed experts (ROCm AITER), which --moe-balancer does not know. Leave "
            f"VLLM_ROCM_USE_AITER_FUSION_SHARED_EXPERTS and "
            f"VLLM_ROCM_AITER_MEGA_MOE_FUSE_SHARED_EXPERTS unset, or remove --moe-balancer."
        )
