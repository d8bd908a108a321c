"""What is being deployed, and the checks that need to know it. Pure: no vLLM, no device."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vllm_balance.config import (
    DEFAULT_REDUNDANCY,
    FETCHES,
    LOADED_BY_MAP,
    BalancerConfig,
)
from vllm_balance.errors import BalancerError
from vllm_balance.kernels.limits import sizes_and_limits

MAX_REDUNDANT = 1023
"""Redundant experts of a layer that vLLM's EPLB makes maps for (``EplbState.add_model``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """The facts about model, ranks and memory that decide whether a balancer can run."""

    model: str
    num_experts: int
    """Logical experts per layer; 0 for a dense model."""
    num_moe_layers: int
    expert_bytes: int
    """Bytes of one expert of one layer as the configuration implies; scales of quantised weights do
    not count."""
    num_ranks: int
    """Expert-parallel ranks: tensor times data parallel."""
    enable_expert_parallel: bool
    free_bytes: int
    """Memory that the experts may take: of the machine on CPU, of one device otherwise."""
    ranks_sharing_memory: int
    """Ranks that share ``free_bytes``."""
    free_host_bytes: int
    """Memory of the machine that a host store may take; the same as ``free_bytes`` on CPU."""
    on_cpu: bool
    is_eager: bool
    """Whether the model runs without CUDA graphs."""
    one_machine: bool
    """Whether all ranks run on this machine."""
    ranks_hold_memory: bool = False
    """Whether the ranks may have taken their memory, so that what is free now says nothing."""

    @property
    def store_bytes(self) -> int:
        """A host store of all experts: one copy."""
        return self.num_experts * self.num_moe_layers * self.expert_bytes


def num_redundant_experts(config: BalancerConfig, deployment: Deployment) -> int:
    """Redundant experts per layer after all checks of the deployment.

    Raises:
        BalancerError: dense model, no expert parallelism, a single rank, redundancy that the
            balancer cannot use, that does not divide over the ranks or does not fit in memory.
    """
    check_layout(config, deployment)
    _check_sources(config)
    _check_no_slots(config)
    redundant = _asked_for(config, deployment)
    if redundant and not config.replicates:
        raise BalancerError(
            f"--moe-balancer {config.name} keeps one copy of every expert, but {redundant} "
            f"redundant experts were asked for. Leave `num_redundant_experts` and `redundancy` "
            f"out, or use eplb, first_copy or metro, or gem with a map that has them."
        )
    _check_divides(redundant, deployment, replicates=config.replicates)
    _check_memory(config, redundant, deployment)
    return redundant


def _check_no_slots(config: BalancerConfig) -> None:
    names = ("dynamic_slots", "threshold_tokens", "prefetch", "look_ahead")
    found = [f"`{name}`" for name in names if getattr(config, name) is not None]
    if found:
        raise BalancerError(
            f"--moe-balancer {config.name} fetches no experts, and {' and '.join(found)} say how. "
            f"Leave them out, or use {', '.join(FETCHES)}."
        )


def check_layout(config: BalancerConfig, deployment: Deployment) -> None:
    """Returns if there are experts to balance and ranks to balance them over.

    Raises:
        BalancerError: dense model, no expert parallelism, a single rank.
    """
    if deployment.num_experts == 0:
        raise BalancerError(
            f"--moe-balancer {config.name} was asked for, but {deployment.model} is a dense model: "
            f"it has no experts to balance. Remove the flag for this model."
        )
    if not deployment.enable_expert_parallel:
        raise BalancerError(
            f"--moe-balancer {config.name} balances experts over expert-parallel ranks, but expert "
            f"parallelism is off. Add --enable-expert-parallel."
        )
    if deployment.num_ranks < 2:
        raise BalancerError(
            f"--moe-balancer {config.name} needs at least two expert-parallel ranks, and there is "
            f"one. Add --tensor-parallel-size 2 or --data-parallel-size 2, or remove the flag."
        )


def check_eplb_limit(config: BalancerConfig, num_redundant: int) -> None:
    """Returns if vLLM's EPLB takes so many slots beyond the logical experts.

    Raises:
        BalancerError: it does not.
    """
    if config.uses_eplb and num_redundant > MAX_REDUNDANT:
        raise BalancerError(
            f"--moe-balancer {config.name} asks for {num_redundant:,} slots per layer beyond the "
            f"experts, over all ranks, and vLLM's EPLB takes at most {MAX_REDUNDANT:,}. Lower "
            f"`num_redundant_experts`, `redundancy` or `dynamic_slots`."
        )


def check_gpu_limits(config: BalancerConfig, deployment: Deployment, num_redundant: int) -> None:
    """Returns if the GPU kernels take a layer of this size.

    Args:
        num_redundant: physical experts of a layer beyond the logical ones.

    Raises:
        BalancerError: they do not.
    """
    sizes = sizes_and_limits(
        config.name,
        num_ranks=deployment.num_ranks,
        num_experts=deployment.num_experts,
        num_redundant=num_redundant,
    )
    found = [f"{size:,} {what}" for what, (size, most) in sizes.items() if size > most]
    if found:
        limits = ", ".join(f"{most:,} {what}" for what, (_, most) in sizes.items())
        raise BalancerError(
            f"--moe-balancer {config.name} would route {deployment.model} with "
            f"{' and '.join(found)}, and its GPU kernels take at most {limits}. Use fewer ranks or "
            f"redundant experts, or remove --moe-balancer."
        )


def _check_sources(config: BalancerConfig) -> None:
    """Raises BalancerError if the balancer lacks a file that it needs, or has one it cannot use."""
    check_online(config)
    if config.name in LOADED_BY_MAP and config.map is None and config.online is None:
        finds = ", or let gem find one while serving with `online`" if config.name == "gem" else ""
        raise BalancerError(
            f"--moe-balancer {config.name} loads the weights by a placement map, and `map` is "
            f"missing. Make one with `vllm-balance place --policy {config.name} --trace TRACE "
            f"--profile PROFILE -o FILE` (without a profile: --model MODEL --ranks N) and pass "
            f'--moe-balancer-config \'{{"map": "FILE"}}\'{finds}.'
        )
    if config.name == "static" and config.map is not None:
        raise BalancerError(
            "--moe-balancer static leaves the experts where vLLM puts them, and `map` asks to put "
            "them elsewhere. Use --moe-balancer gem, which keeps to the map, or leave `map` out."
        )


def check_online(config: BalancerConfig) -> None:
    """Returns if `online` is not asked for, or can be. Raises BalancerError if not."""
    if config.online is None:
        return
    if config.name != "gem":
        raise BalancerError(
            f"`online` belongs to --moe-balancer gem, and {config.name} was asked for. Use gem, or "
            f"leave `online` out."
        )
    if config.profile is None:
        raise BalancerError(
            "`online` weighs moves by the measured times of the ranks, and `profile` is missing. "
            "Run `vllm-balance profile MODEL -o FILE` on this machine and name the file there."
        )
    if config.replicates:
        raise BalancerError(
            "`online` moves the only copy of each expert, and redundant experts were asked for. "
            "Leave `num_redundant_experts` and `redundancy` out and use a map without redundant "
            "experts, or leave `online` out."
        )


def _asked_for(config: BalancerConfig, deployment: Deployment) -> int:
    experts, ranks = deployment.num_experts, deployment.num_ranks
    from_count, ratio = config.num_redundant_experts, config.redundancy
    if from_count is None and ratio is None:
        if not config.replicates:
            return 0
        slots = math.ceil(experts * DEFAULT_REDUNDANCY / ranks) * ranks
        return slots - experts
    from_ratio = None if ratio is None else round(experts * (ratio - 1.0))
    if from_count is not None and from_ratio is not None and from_count != from_ratio:
        raise BalancerError(
            f"`num_redundant_experts` = {from_count} and `redundancy` = {ratio} differ: the ratio "
            f"means {from_ratio} redundant experts for {experts} experts. Give one of the two."
        )
    count = from_count if from_count is not None else from_ratio
    assert count is not None
    return count


def _check_divides(redundant: int, deployment: Deployment, *, replicates: bool) -> None:
    experts, ranks = deployment.num_experts, deployment.num_ranks
    physical = experts + redundant
    if physical % ranks == 0:
        return
    if not replicates:
        raise BalancerError(
            f"{experts} experts do not divide over {ranks} ranks, and this balancer keeps one copy "
            f"of each. Use a number of ranks that divides {experts}, or a balancer that can have "
            f"redundant experts (eplb, first_copy, metro)."
        )
    below, above = physical // ranks * ranks, -(-physical // ranks) * ranks
    fitting = [slots - experts for slots in (below, above) if slots >= experts]
    values = " or ".join(f"{n} (redundancy {1 + n / experts:.6g})" for n in fitting)
    raise BalancerError(
        f"{experts} experts and {redundant} redundant ones make {physical} physical experts, which "
        f"do not divide over {ranks} ranks. The nearest numbers of redundant experts that do: "
        f"{values}."
    )


def exchange_bytes(config: BalancerConfig, deployment: Deployment, num_redundant: int) -> int:
    """Bytes of vLLM's EPLB's buffer on each rank: one layer's slots (``EplbState.add_model``).

    On a CPU it is no memory until experts move.

    Args:
        num_redundant: physical experts of a layer beyond the logical ones.
    """
    if not config.uses_eplb or (deployment.on_cpu and not config.moves):
        return 0
    slots = (deployment.num_experts + num_redundant) // deployment.num_ranks
    return slots * deployment.expert_bytes


def _check_memory(config: BalancerConfig, redundant: int, deployment: Deployment) -> None:
    physical = deployment.num_experts + redundant
    per_rank = physical // deployment.num_ranks * deployment.num_moe_layers
    weights = per_rank * deployment.expert_bytes * deployment.ranks_sharing_memory
    buffers = deployment.ranks_sharing_memory * exchange_bytes(config, deployment, redundant)
    needed = weights + buffers
    if deployment.ranks_hold_memory or needed <= deployment.free_bytes:
        return
    extra = weights * redundant // physical
    raise BalancerError(
        f"The experts of {deployment.model} with {redundant} redundant ones per layer need "
        f"{needed:,} bytes ({needed / 2**30:.1f} GiB; {extra / 2**30:.1f} GiB of it for the "
        f"redundant ones, {buffers / 2**30:.1f} GiB for vLLM's exchanges), and "
        f"{deployment.free_bytes:,} bytes "
        f"({deployment.free_bytes / 2**30:.1f} GiB) can be used. Lower `num_redundant_experts` or "
        f"`redundancy`, use more ranks, or free memory."
    )
