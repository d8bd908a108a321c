"""The checks for balancers that fetch experts into dynamic slots. Pure: no vLLM, no device."""

from __future__ import annotations

from vllm_balance.config import DEFAULT_DYNAMIC_SLOTS, BalancerConfig
from vllm_balance.deployment import Deployment, check_layout, check_online, exchange_bytes
from vllm_balance.errors import BalancerError


def num_dynamic_slots(config: BalancerConfig, deployment: Deployment) -> int:
    """Dynamic slots per rank and layer of a balancer that fetches, after all checks.

    Raises:
        BalancerError: experts that do not divide over the ranks, more slots than experts
            elsewhere, a map, redundancy or `online` beside the slots, CUDA graphs, ranks on
            several machines, or too little memory.
    """
    check_layout(config, deployment)
    check_online(config)
    experts, ranks = deployment.num_experts, deployment.num_ranks
    if experts % ranks:
        raise BalancerError(
            f"--moe-balancer {config.name} gives every rank the same number of home experts, and "
            f"{experts} experts do not divide over {ranks} ranks. Use a number of ranks that "
            f"divides {experts}."
        )
    foreign = experts - experts // ranks
    asked = config.dynamic_slots
    slots = min(DEFAULT_DYNAMIC_SLOTS, foreign) if asked is None else asked
    if not 2 <= slots <= foreign:
        raise BalancerError(
            f"`dynamic_slots` = {slots} cannot be used: a rank needs at least 2 slots and has use "
            f"for {foreign}, the experts of the other ranks."
        )
    _check_beside_slots(config, slots * ranks)
    if not deployment.one_machine:
        raise BalancerError(
            f"--moe-balancer {config.name} fetches experts from one host store, which all ranks "
            f"fill; ranks on several machines, or of engines that are started one by one, are not "
            f"supported. Start all ranks with one command on one machine, or use eplb or metro."
        )
    if not deployment.on_cpu and not deployment.is_eager:
        raise BalancerError(
            f"--moe-balancer {config.name} decides on the host and changes where experts are in "
            f"every batch, which a captured CUDA graph cannot do. Add --enforce-eager, or use "
            f"metro."
        )
    if config.look_ahead == "router" and config.replay is not None:
        raise BalancerError(
            "`look_ahead` = 'router' asks the next layer's router on the inputs of this one, which "
            "says nothing about a `replay`. Leave it out, or use 'off'."
        )
    _check_slots_memory(config, slots, deployment)
    return slots


def _check_beside_slots(config: BalancerConfig, redundant: int) -> None:
    beside = {
        "map": config.map is not None,
        "redundancy": config.redundancy is not None,
        "num_redundant_experts": config.num_redundant_experts not in (None, redundant),
    }
    found = [f"`{name}`" for name, present in beside.items() if present]
    if found:
        raise BalancerError(
            f"--moe-balancer {config.name} keeps every expert on its home rank and others in "
            f"dynamic slots, so {' and '.join(found)} cannot be used with it, neither in its "
            f"settings nor in --eplb-config. Give `dynamic_slots`, the number per rank and layer."
        )


def _check_slots_memory(config: BalancerConfig, slots: int, deployment: Deployment) -> None:
    if deployment.ranks_hold_memory:
        return
    home = deployment.num_experts // deployment.num_ranks
    per_rank = (home + slots) * deployment.num_moe_layers * deployment.expert_bytes
    per_rank += exchange_bytes(config, deployment, slots * deployment.num_ranks)
    in_ranks = per_rank * deployment.ranks_sharing_memory
    store = deployment.store_bytes
    on_device = in_ranks + (store if deployment.on_cpu else 0)
    for needed, free, what in (
        (on_device, deployment.free_bytes, "experts"),
        (store, deployment.free_host_bytes, "host store"),
    ):
        if needed > free:
            raise BalancerError(
                f"The {what} of {deployment.model} with {slots} dynamic slots per rank and layer "
                f"need {needed:,} bytes ({needed / 2**30:.1f} GiB), and {free:,} bytes "
                f"({free / 2**30:.1f} GiB) can be used. The host store of all experts takes "
                f"{store:,} bytes of memory beside what the ranks hold. Lower `dynamic_slots`, "
                f"free memory, or use another balancer."
            )
