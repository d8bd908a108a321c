"""What settings say of files and placement, checked against the deployment: a map, a profile."""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_balance import documents, maps, profiles
from vllm_balance.config import BalancerConfig
from vllm_balance.cost import CostModel
from vllm_balance.errors import BalancerError
from vllm_balance.initial_placement import HOME, InitialPlacement
from vllm_balance.maps import PlacementMap
from vllm_balance.model_shape import moe_layers
from vllm_balance.seams.device import device_name, unprofiled_device
from vllm_balance.seams.model_config import num_ranks, read_shape
from vllm_balance.seams.versions import kernel_versions


def read_map(config: BalancerConfig) -> PlacementMap | None:
    """The map that the settings name, or None. Raises BalancerError as `maps.load` does."""
    return None if config.map is None else maps.load(documents.expanded(config.map))


def absolute(config: BalancerConfig) -> dict[str, str]:
    """The files of the settings by key, as a worker in any folder finds them."""
    named = {"map": config.map, "profile": config.profile}
    return {
        key: str(documents.expanded(path).resolve())
        for key, path in named.items()
        if path is not None
    }


def initial_placement(config: BalancerConfig, vllm_config: Any) -> InitialPlacement | None:
    """Where settled settings want the experts at load time. None: vLLM loads them its own way,
    which fills redundant slots from some checkpoints only.

    Raises:
        BalancerError: the placement cannot be read or does not fit the model and the ranks.
    """
    if config.fetches:
        return home_placement(vllm_config, config.num_redundant_experts or 0)
    found, redundant = read_map(config), config.num_redundant_experts or 0
    if found is not None:
        return placement_of(found, vllm_config, redundant)
    if not redundant:
        return None
    return InitialPlacement.vllms_own(vllm_config.model_config.get_num_experts(), redundant)


def home_placement(vllm_config: Any, num_slots: int) -> InitialPlacement:
    """Every rank holds its home experts in linear order, then its empty dynamic slots."""
    layers = moe_layers(vllm_config.model_config.hf_text_config)
    ranks, num_experts = num_ranks(vllm_config), vllm_config.model_config.get_num_experts()
    home_SE = np.arange(num_experts).reshape(ranks, -1)
    empty_SD = np.full((ranks, num_slots // ranks), -1)
    slots_P = np.concatenate([home_SE, empty_SD], axis=1).ravel()
    return InitialPlacement.of(HOME, layers, np.tile(slots_P, (len(layers), 1)))


def placement_of(found: PlacementMap, vllm_config: Any, redundant: int) -> InitialPlacement:
    """The placement of a map, checked against the deployment.

    Raises:
        BalancerError: another model, number of ranks or redundancy; a layer without entry.
    """
    layers = moe_layers(vllm_config.model_config.hf_text_config)
    shape = read_shape(vllm_config.model_config)
    found.require(shape=shape, num_ranks=num_ranks(vllm_config), layers=layers)
    if found.num_physical != shape.num_experts + redundant:
        raise BalancerError(
            f"The placement map has {found.num_physical} slots per layer, and {shape.num_experts} "
            f"experts with {redundant} redundant ones make {shape.num_experts + redundant}. Leave "
            f"`num_redundant_experts` and `redundancy` out to take the map's, or make another map "
            f"with `vllm-balance place --redundant {redundant}`."
        )
    return InitialPlacement.of_map(found, layers)


def measured_costs(config: BalancerConfig, vllm_config: Any) -> tuple[CostModel, ...] | None:
    """The measured curve of each rank from the profile that the settings name, or None.

    Raises:
        BalancerError: the profile is damaged, or of another model, dtype, device, version of
            vLLM or torch, or number of ranks; or no profile can be of this device or these experts.
    """
    if config.profile is None:
        return None
    model = vllm_config.model_config
    if (device := unprofiled_device()) is not None or model.quantization is not None:
        runs = f"has experts in {model.quantization}" if device is None else f"runs on {device}"
        raise BalancerError(
            f"`profile` names {config.profile}, and profiles describe unquantised experts on x86 "
            f"CPUs and GPUs only; this server {runs}. Leave `profile` out and set `knee_tokens` or "
            f"`threshold_tokens`."
        )
    served = str(model.dtype).removeprefix("torch.")
    found = profiles.load(documents.expanded(config.profile))
    found.require(
        shape=read_shape(model).model_copy(update={"dtype": served}),
        device=device_name(served),
        versions=kernel_versions(),
    )
    return found.costs_of(num_ranks(vllm_config))


def require_profiled_cores(config: BalancerConfig, num_threads: int) -> None:
    """Returns if this rank computes with as many cores as those of the profile in the settings.

    Raises:
        BalancerError: it does not.
    """
    if config.profile is None or "profile" in config.without_effect:
        return
    profiled = profiles.load(documents.expanded(config.profile)).cores_per_rank
    if profiled != num_threads:
        raise BalancerError(
            f"`profile` names {config.profile}, whose ranks computed with {profiled} cores each, "
            f"and this rank has {num_threads} threads. Times do not carry over; run "
            f"`vllm-balance profile --cores-per-rank {num_threads}`, or bind each rank to "
            f"{profiled} cores with VLLM_CPU_OMP_THREADS_BIND."
        )
