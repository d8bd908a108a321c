"""From a finished ``VllmConfig`` to a checked and balanced one."""

from __future__ import annotations

import copy
import multiprocessing
import sys
from pathlib import Path
from typing import Any

from vllm_balance import documents
from vllm_balance.config import (
    KEY,
    BalancerConfig,
    note_set_up,
    parse,
    route_by_own_routers,
    route_by_replay,
    was_set_up_elsewhere,
)
from vllm_balance.cost import free_of, knee_of
from vllm_balance.deployment import (
    Deployment,
    check_eplb_limit,
    check_gpu_limits,
    num_redundant_experts,
)
from vllm_balance.errors import BalancerError
from vllm_balance.maps import PlacementMap
from vllm_balance.recording import RecordSettings, require_recordable
from vllm_balance.seams.announcements import announce, warn_of_another_name
from vllm_balance.seams.combinations import (
    WORKERS,
    check_combination,
    check_device,
    check_replay,
)
from vllm_balance.seams.model_config import num_ranks
from vllm_balance.seams.read_deployment import read_deployment
from vllm_balance.seams.server import install_in_api_server
from vllm_balance.seams.settings_files import (
    absolute,
    measured_costs,
    placement_of,
    read_map,
)
from vllm_balance.seams.versions import unsupported_version
from vllm_balance.slot_deployment import num_dynamic_slots


def settings_of(vllm_config: Any) -> BalancerConfig | None:
    """The balancer's settings in a ``VllmConfig``, or None without a balancer."""
    additional = vllm_config.additional_config
    if not isinstance(additional, dict) or KEY not in additional:
        return None
    return parse(additional[KEY])


def configure(vllm_config: Any) -> None:
    """Checks a ``VllmConfig`` that asks for a balancer and sets it up; leaves others alone.

    Raises:
        BalancerError: the balancer cannot run in this deployment.
    """
    config = settings_of(vllm_config)
    is_first = _is_first_process()
    if vllm_config.model_config is not None and is_first:
        route_by_own_routers()
    if config is None:
        return
    if (problem := unsupported_version()) is not None:
        raise BalancerError(problem)
    found = read_map(config)
    eplb = vllm_config.parallel_config.eplb_config
    config = _with_redundancy(config, eplb.num_redundant_experts, found)
    config = _with_intervals(config, eplb)
    check_combination(config, vllm_config)
    check_device(config)
    deployment = read_deployment(vllm_config, ranks_hold_memory=not is_first)
    redundant = _redundant_experts(config, deployment)
    if found is not None:
        placement_of(found, vllm_config, redundant)
        if is_first:
            warn_of_another_name(found, vllm_config)
    if config.replay is not None:
        check_replay(config, vllm_config.model_config, deployment)
    settled = _settled(config, vllm_config, redundant)
    _set_up(vllm_config, config, settled)
    if is_first:
        announce(config, redundant, deployment)
        note_set_up()


def _redundant_experts(config: BalancerConfig, deployment: Deployment) -> int:
    """Slots of a layer beyond the logical experts, over all ranks, checked against memory."""
    if config.fetches:
        redundant = num_dynamic_slots(config, deployment) * deployment.num_ranks
    else:
        redundant = num_redundant_experts(config, deployment)
    check_eplb_limit(config, redundant)
    if not deployment.on_cpu:
        check_gpu_limits(config, deployment, redundant)
    return redundant


def _settled(config: BalancerConfig, vllm_config: Any, redundant: int) -> dict[str, Any]:
    """The settings as every process reads them: numbers for ratios and defaults, absolute paths."""
    parallel = vllm_config.parallel_config
    settled = {**config.model_dump(mode="json"), "num_redundant_experts": redundant}
    settled.pop("redundancy")
    if config.fetches:
        settled["dynamic_slots"] = redundant // num_ranks(vllm_config)
    settled |= absolute(config)
    if config.replay is not None and config.replay.trace is not None:
        settled["replay"]["trace"] = str(documents.expanded(config.replay.trace).resolve())
    costs = None if "profile" in config.without_effect else measured_costs(config, vllm_config)
    if costs is not None and config.knee_tokens is None:
        settled["knee_tokens"] = knee_of(costs)
        settled["free_tokens"] = None if config.fetches else free_of(costs)
    if config.record is not None:
        settled["record"]["file"] = str(_checked_recording(config.record, parallel))
    return settled


def _set_up(vllm_config: Any, config: BalancerConfig, settled: dict[str, Any]) -> None:
    """Our worker, vLLM's EPLB where it is used, and the settings for the other processes."""
    parallel = vllm_config.parallel_config
    # EngineArgs shares one additional_config and one EPLBConfig between the configs it makes.
    vllm_config.additional_config = {**vllm_config.additional_config, KEY: settled}
    parallel.worker_cls = WORKERS[parallel.worker_cls]
    if config.uses_eplb:
        _enable_eplb(vllm_config, config, settled["num_redundant_experts"])
    if config.replay is not None:
        route_by_replay()
    install_in_api_server()


def _with_redundancy(
    config: BalancerConfig, vllms_own: int, found: PlacementMap | None
) -> BalancerConfig:
    """The settings with vLLM's own number of redundant experts or the map's, if they name none.

    Raises:
        BalancerError: both name a number, and the numbers differ.
    """
    ours = config.num_redundant_experts
    if ours is None and vllms_own:
        return config.model_copy(update={"num_redundant_experts": vllms_own})
    if vllms_own and ours != vllms_own:
        raise _differ(config, "num_redundant_experts", ours, vllms_own)
    if found is None or ours is not None or config.redundancy is not None:
        return config
    count = found.num_physical - found.shape.num_experts
    return config.model_copy(update={"num_redundant_experts": count})


def _with_intervals(config: BalancerConfig, eplb: Any) -> BalancerConfig:
    """The settings with those of vLLM's own ``EPLBConfig`` that are no defaults, if they name none.

    Raises:
        BalancerError: both name a value, and the values differ.
    """
    defaults = type(eplb)()
    taken: dict[str, int] = {}
    for name in ("window_size", "step_interval"):
        ours, vllms = getattr(config, name), getattr(eplb, name)
        if vllms == getattr(defaults, name):
            continue
        if name not in config.model_fields_set:
            taken[name] = vllms
        elif ours != vllms:
            raise _differ(config, name, ours, vllms)
    return config.model_copy(update=taken)


def _differ(config: BalancerConfig, name: str, ours: int | None, vllms: int) -> BalancerError:
    return BalancerError(
        f"`{name}` is {ours} in the settings of --moe-balancer {config.name} and {vllms} in "
        f"--eplb-config, and one value is used. Give it in one of the two."
    )


def _checked_recording(record: RecordSettings, parallel: Any) -> Path:
    """The absolute path to record at, checked where the deployment is set up."""
    path = documents.expanded(record.file).absolute()
    if _is_first_process():
        first = parallel.data_parallel_rank
        require_recordable(path, range(first, first + (parallel.data_parallel_size_local or 1)))
    return path


def _is_first_process() -> bool:
    """Whether the deployment is set up here: in a program of its own, or in a process of one that
    has set none up.

    Later processes (API servers, engines) configure themselves again, while the ranks may have
    taken their memory and made their files already.
    """
    return multiprocessing.parent_process() is None or not was_set_up_elsewhere()


def _enable_eplb(vllm_config: Any, config: BalancerConfig, redundant: int) -> None:
    """Turns on vLLM's own EPLB: placement, load window, exchange of weights."""
    from vllm.config.utils import replace
    from vllm.platforms import current_platform

    parallel = vllm_config.parallel_config
    eplb = copy.copy(parallel.eplb_config)
    eplb.num_redundant_experts = redundant
    eplb.window_size, eplb.step_interval = config.window_size, config.step_interval
    if config.stays:
        # The placement stays; a step counter never gets here. Balancedness is a collective, which
        # an idle rank would start before, and a busy one behind, those of `online`.
        eplb.window_size, eplb.step_interval = 1, sys.maxsize
        eplb.log_balancedness = False
    if current_platform.is_cpu():
        # ParallelConfig refuses EPLB on CPU while it is validated. torch_nccl is the class that
        # works on the group it is given, which is gloo here; torch_gloo asks for an accelerator.
        eplb.use_async, eplb.communicator = False, "torch_nccl"
        parallel.enable_eplb, parallel.eplb_config = True, eplb
        return
    # Another ParallelConfig checks EPLB and chooses its communicator, and draws ports of its own:
    # the first one stays, whose ports other processes know.
    checked = replace(parallel, enable_eplb=True, eplb_config=eplb)
    parallel.enable_eplb, parallel.eplb_config = True, checked.eplb_config
