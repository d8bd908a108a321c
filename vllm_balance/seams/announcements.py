"""What a server says of its balancer once, before it starts its workers."""

from __future__ import annotations

from typing import Any

from vllm_balance.config import BalancerConfig
from vllm_balance.deployment import Deployment, exchange_bytes
from vllm_balance.maps import PlacementMap
from vllm_balance.seams.model_config import read_shape

CHOOSING = ("metro", "first_copy")
"""Balancers whose only means are copies of experts."""


def warn_of_another_name(found: PlacementMap, vllm_config: Any) -> None:
    """Models of one shape use their experts differently; a name may be that of a folder only."""
    from vllm.logger import init_logger

    if (doubt := found.doubt(read_shape(vllm_config.model_config).name)) is not None:
        init_logger(f"vllm.{__name__}").warning("%s", doubt)


def announce(config: BalancerConfig, redundant: int, deployment: Deployment) -> None:
    """Logs what the balancer's experts take, and warns of what it cannot do or could not check.

    Args:
        redundant: slots of a layer beyond the logical experts, over all ranks.
    """
    from vllm.logger import init_logger

    if deployment.expert_bytes == 0 and redundant:
        init_logger(f"vllm.{__name__}").warning(
            "The configuration of %s does not say how large an expert is, so it was not checked "
            "whether the balancer's experts fit in memory.",
            deployment.model,
        )
    if config.without_effect:
        init_logger(f"vllm.{__name__}").warning(
            "MoE balancer %s has no use for %s, given in its settings or in --eplb-config.",
            config.name,
            ", ".join(f"`{key}`" for key in config.without_effect),
        )
    if config.name in CHOOSING and not redundant:
        init_logger(f"vllm.{__name__}").warning(
            "MoE balancer %s chooses among the copies of an expert, and there is one of each, so "
            "it will serve as eplb without redundant experts does, which moves them. Set "
            "`redundancy` or `num_redundant_experts`%s, or use static.",
            config.name,
            "" if config.map is None else " and give a map that has them",
        )
    if config.fetches:
        _announce_slots(config, redundant // deployment.num_ranks, deployment)
        return
    extra = redundant * deployment.num_moe_layers * deployment.expert_bytes
    init_logger(f"vllm.{__name__}").info(
        "MoE balancer %s: %d experts + %d redundant per layer on %d ranks; the redundant experts "
        "take %.2f GiB in all, %.2f GiB per rank%s.",
        config.name,
        deployment.num_experts,
        redundant,
        deployment.num_ranks,
        extra / 2**30,
        extra / deployment.num_ranks / 2**30,
        _buffer(config, redundant, deployment),
    )


def _buffer(config: BalancerConfig, redundant: int, deployment: Deployment) -> str:
    """What vLLM's EPLB takes besides, if it is on."""
    taken = exchange_bytes(config, deployment, redundant)
    return f", and vLLM's buffer for exchanges {taken / 2**30:.2f} GiB per rank" if taken else ""


def _announce_slots(config: BalancerConfig, slots: int, deployment: Deployment) -> None:
    from vllm.logger import init_logger

    per_rank = slots * deployment.num_moe_layers * deployment.expert_bytes
    init_logger(f"vllm.{__name__}").info(
        "MoE balancer %s: %d experts on %d ranks, %d dynamic slots per rank and layer (%.2f GiB "
        "per rank%s); the host store of all experts takes about %.2f GiB, %.2f GiB are free.",
        config.name,
        deployment.num_experts,
        deployment.num_ranks,
        slots,
        per_rank / 2**30,
        _buffer(config, slots * deployment.num_ranks, deployment),
        deployment.store_bytes / 2**30,
        deployment.free_host_bytes / 2**30,
    )
