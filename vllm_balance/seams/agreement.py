"""What all ranks must agree on before they serve; all but `knee_and_free` are collectives."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import torch

from vllm_balance.config import BalancerConfig
from vllm_balance.cost import AMX_KNEE, CPU_KNEE, GPU_KNEE_TOKENS
from vllm_balance.errors import BalancerError
from vllm_balance.initial_placement import VLLMS_OWN
from vllm_balance.recording import RecordSettings
from vllm_balance.routing.metro import MetroRouting
from vllm_balance.seams.collective import from_all_ranks
from vllm_balance.seams.device import has_amx_kernel, processor
from vllm_balance.seams.loading import PlacedLoading

KneeAndFree = tuple[float, float | None]
"""`knee_tokens` and `free_tokens` of :class:`MetroRouting`."""


def agreed_knee(config: BalancerConfig, dtype: torch.dtype) -> KneeAndFree:
    """`knee_and_free` on this rank, which must be that of all where it decides.

    Raises:
        BalancerError: on every rank, if their processors differ and the settings do not decide.
    """
    from vllm.distributed import get_ep_group

    own, group = knee_and_free(config, dtype), get_ep_group()
    if config.name != MetroRouting.name and not config.fetches:
        return own
    found = from_all_ranks(group, own)
    if len(set(found)) > 1:
        names = "`knee_tokens`" if config.fetches else "`knee_tokens` and `free_tokens`"
        raise BalancerError(
            f"Ranks must route a batch alike, and their processors suggest different {names}: "
            f"{', '.join(f'rank {rank}: {pair}' for rank, pair in enumerate(found))}. "
            f"Set {names} in --moe-balancer-config."
        )
    return own


def knee_and_free(config: BalancerConfig, dtype: torch.dtype) -> KneeAndFree:
    """`knee_tokens` and `free_tokens` of the settings, or of this kind of device; balancers that
    fetch take the knee alone."""
    from vllm.platforms import current_platform

    if config.knee_tokens is not None:
        return config.knee_tokens, config.free_tokens
    if not current_platform.is_cpu():
        return GPU_KNEE_TOKENS, None
    knee, free = AMX_KNEE if has_amx_kernel(str(dtype).removeprefix("torch.")) else CPU_KNEE
    return knee, None if config.fetches else free


def ranks_are_alike() -> bool:
    """Whether all ranks are known to have this one's processor and number of threads."""
    from vllm.distributed import get_ep_group

    found = from_all_ranks(get_ep_group(), (processor(), torch.get_num_threads()))
    return len(set(found)) == 1 and found[0][0] is not None


def recording_of_all_ranks(record: RecordSettings | None) -> RecordSettings | None:
    """What to record from the start, the same on all ranks.

    What tells its files from those of another recording is agreed on here: in the settings it
    would be part of vLLM's config hash, and every start would compile the model anew.
    """
    from vllm.distributed import get_ep_group

    if record is None:
        return None
    run = from_all_ranks(get_ep_group(), uuid.uuid4().hex)[0]
    return record.model_copy(update={"run": run})


def verified_placement(
    loading: PlacedLoading | None, load_format: str, runners: Sequence[Any]
) -> str:
    """What the status says of the initial placement; every rank takes part or none.

    Args:
        runners: vLLM's MoE layers.

    Raises:
        BalancerError: on every rank, if a weight did not arrive on any or the ranks loaded
            different placements.
    """
    from vllm.distributed import get_ep_group

    if loading is None:
        return VLLMS_OWN
    layers = [runner.routed_experts for runner in runners]
    placement, group = loading.placement, get_ep_group()
    own = (placement.checksum, loading.problem(layers, load_format))
    found = from_all_ranks(group, own)
    problems = [f"rank {rank}: {p}" for rank, (_, p) in enumerate(found) if p is not None]
    if len({checksum for checksum, _ in found}) > 1:
        problems.append(f"the ranks loaded different files: {[c[:12] for c, _ in found]}")
    if problems:
        raise BalancerError(
            f"The initial placement ({placement.origin}) did not arrive: "
            f"{'; '.join(problems)}. {placement.remedy} for this model or load format."
        )
    if placement.origin == VLLMS_OWN:
        return VLLMS_OWN
    return f"{placement.origin} {placement.checksum[:12]} verified"
