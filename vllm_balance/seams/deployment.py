"""From a finished ``VllmConfig`` to a checked and balanced one."""

from __future__ import annotations

import copy
import dataclasses
import multiprocessing
import sys
from pathlib import Path
from typing import Any

from vllm_balance.config import KEY, LOADED_BY_MAP, BalancerConfig, parse, route_by_replay
from vllm_balance.cost import free_of, knee_of
from vllm_balance.deployment import Deployment, num_redundant_experts
from vllm_balance.errors import BalancerError
from vllm_balance.exchange import way_of_exchange
from vllm_balance.maps import PlacementMap
from vllm_balance.online import require_whole_batch
from vllm_balance.recording import RecordSettings, require_new
from vllm_balance.replay_rows import draw
from vllm_balance.seams.server import install_in_api_server
from vllm_balance.seams.settings_files import (
    absolute,
    measured_costs,
    moe_layers,
    num_ranks,
    placement_of,
    read_map,
)
from vllm_balance.seams.versions import unsupported_version
from vllm_balance.slot_deployment import num_dynamic_slots

_WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "vllm_balance.seams.worker_cpu.BalancedCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": "vllm_balance.seams.worker_gpu.BalancedGPUWorker",
}
"""vLLM's worker class -> ours, a subclass of it."""


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
    if config is None:
        return
    if (problem := unsupported_version()) is not None:
        raise BalancerError(problem)
    parallel = vllm_config.parallel_config
    found = read_map(config)
    config = _with_redundancy(config, parallel.eplb_config.num_redundant_experts, found)
    _check_combination(config, vllm_config)
    _check_device(config)
    deployment = read_deployment(vllm_config)
    if config.fetches:
        redundant = num_dynamic_slots(config, deployment) * deployment.num_ranks
    else:
        redundant = num_redundant_experts(config, deployment)
    if found is not None:
        placement_of(found, vllm_config, redundant)
    # EngineArgs shares one additional_config and one EPLBConfig between the configs it makes.
    settled = {**config.model_dump(mode="json"), "num_redundant_experts": redundant}
    settled.pop("redundancy")
    if config.fetches:
        settled["dynamic_slots"] = redundant // deployment.num_ranks
    settled |= absolute(config)
    costs = measured_costs(config, vllm_config)
    if costs is not None and config.knee_tokens is None:
        settled["knee_tokens"], settled["free_tokens"] = knee_of(costs), free_of(costs)
    vllm_config.additional_config = {**vllm_config.additional_config, KEY: settled}
    parallel.worker_cls = _WORKERS[parallel.worker_cls]
    if config.uses_eplb:
        _enable_eplb(vllm_config, config, redundant)
    if config.record is not None:
        settled["record"]["file"] = str(_checked_recording(config.record, parallel))
    if config.replay is not None:
        _check_replay(config, vllm_config.model_config)
        route_by_replay()
    install_in_api_server()
    _announce(config, redundant, deployment)


def _with_redundancy(
    config: BalancerConfig, vllms_own: int, found: PlacementMap | None
) -> BalancerConfig:
    """The settings with vLLM's own number of redundant experts or the map's, if they name none."""
    if config.num_redundant_experts is None and vllms_own:
        return config.model_copy(update={"num_redundant_experts": vllms_own})
    if found is None or config.num_redundant_experts is not None or config.redundancy is not None:
        return config
    count = found.num_physical - found.shape.num_experts
    return config.model_copy(update={"num_redundant_experts": count})


def _check_combination(config: BalancerConfig, vllm_config: Any) -> None:
    parallel = vllm_config.parallel_config
    if parallel.worker_cls not in _WORKERS:
        raise BalancerError(
            f"--moe-balancer {config.name} replaces vLLM's worker class, and --worker-cls asks for "
            f"{parallel.worker_cls}. Supported are {', '.join(_WORKERS)}; leave --worker-cls away."
        )
    refused = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "elastic expert parallelism": parallel.enable_elastic_ep,
        "dual-batch overlap": parallel.enable_dbo,
        "speculative decoding": vllm_config.speculative_config is not None,
        "tensor parallelism inside data parallelism": parallel.tensor_parallel_size > 1
        and parallel.data_parallel_size > 1,
        "round-robin expert placement": parallel.expert_placement_strategy != "linear",
    }
    if config.fetches:
        # The host store is filled once: weights that change later would not reach it.
        refused |= {
            "sleep mode": vllm_config.model_config.enable_sleep_mode,
            "weight transfer": vllm_config.weight_transfer_config is not None,
            "LoRA": vllm_config.lora_config is not None,
        }
    found = [name for name, present in refused.items() if present]
    if found:
        raise BalancerError(
            f"--moe-balancer {config.name} is not supported together with {', '.join(found)}. "
            f"Supported: tensor or data parallelism with --enable-expert-parallel. Turn off what "
            f"is named here, or leave --moe-balancer away."
        )
    way = way_of_exchange(
        data_parallel_size=parallel.data_parallel_size,
        gathers_tokens=parallel.all2all_backend == "allgather_reducescatter",
        asked_for=config.exchange,
    )
    if config.online is not None:
        require_whole_batch(way)
    stays = config.fetches or config.name in LOADED_BY_MAP or not config.replicates
    if parallel.enable_eplb and stays:
        raise BalancerError(
            f"--moe-balancer {config.name} leaves every expert where it was loaded, and "
            f"--enable-eplb asks to move them. Use --moe-balancer eplb, or leave one of both away."
        )


def _checked_recording(record: RecordSettings, parallel: Any) -> Path:
    """The absolute path to record at, checked where the deployment is set up.

    Later processes (API servers, engines) configure themselves again while the ranks may have made
    their files already.
    """
    path = record.file.expanduser().absolute()
    if multiprocessing.parent_process() is None:
        require_new(path, num_files=parallel.data_parallel_size_local or 1)
    return path


def _check_device(config: BalancerConfig) -> None:
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return
    if config.free_tokens is not None:
        raise BalancerError(
            f"`free_tokens` is {config.free_tokens:g}: it describes ranks that compute their "
            f"experts in turn, as CPU cores do, and a GPU's experts overlap. Leave it out."
        )
    if config.online is not None:
        raise BalancerError(
            "`online` measures the ranks by the time in their experts, which is done on CPU only "
            "so far. Leave `online` out and load a map; make it anew when traffic has changed."
        )


def _check_replay(config: BalancerConfig, model_config: Any) -> None:
    """Draws one layer, so that a skew or trace that does not fit the model is refused here."""
    assert config.replay is not None
    experts, top_k = model_config.get_num_experts(), model_config.get_num_experts_per_tok()
    try:
        for phase in config.replay.phases:
            draw(phase, num_layers=1, num_experts=experts, top_k=top_k, rank=0)
    except ValueError as error:
        raise BalancerError(f"`replay` cannot drive {model_config.model}: {error}.") from error


def read_deployment(vllm_config: Any) -> Deployment:
    """The facts about model, ranks and memory in a ``VllmConfig``."""
    from vllm.platforms import current_platform

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    text = model.hf_text_config
    weight_bytes = 0.5 if model.quantization else model.dtype.itemsize
    inner = getattr(text, "moe_intermediate_size", None) or getattr(text, "intermediate_size", 0)
    local_ranks = parallel.tensor_parallel_size * (parallel.data_parallel_size_local or 1)
    on_cpu = current_platform.is_cpu()
    return Deployment(
        model=model.model,
        num_experts=model.get_num_experts(),
        num_moe_layers=len(moe_layers(text)),
        expert_bytes=int(3 * text.hidden_size * inner * weight_bytes),
        num_ranks=num_ranks(vllm_config),
        enable_expert_parallel=parallel.enable_expert_parallel,
        free_bytes=_usable_bytes(vllm_config, on_cpu, local_ranks),
        ranks_sharing_memory=local_ranks if on_cpu else 1,
        free_host_bytes=_usable_bytes(vllm_config, True, local_ranks),
        on_cpu=on_cpu,
        is_eager=bool(model.enforce_eager),
        one_machine=parallel.nnodes == 1
        and parallel.data_parallel_size == (parallel.data_parallel_size_local or 1),
    )


def _usable_bytes(vllm_config: Any, on_cpu: bool, local_ranks: int) -> int:
    if on_cpu:
        import psutil

        cache = vllm_config.cache_config.kv_cache_memory_bytes or 0
        return max(0, psutil.virtual_memory().available - cache * local_ranks)
    from vllm.platforms import current_platform

    total = current_platform.get_device_total_memory()
    return int(total * vllm_config.cache_config.gpu_memory_utilization)


def _enable_eplb(vllm_config: Any, config: BalancerConfig, redundant: int) -> None:
    """Turns on vLLM's own EPLB: placement, load window, exchange of weights."""
    from vllm.platforms import current_platform

    parallel = vllm_config.parallel_config
    eplb = copy.copy(parallel.eplb_config)
    eplb.num_redundant_experts = redundant
    eplb.window_size, eplb.step_interval = config.window_size, config.step_interval
    if config.fetches or config.name in LOADED_BY_MAP:
        # The placement stays; a step counter never gets here.
        eplb.window_size, eplb.step_interval = 1, sys.maxsize
    if current_platform.is_cpu():
        # ParallelConfig refuses EPLB on CPU while it is validated. torch_nccl is the class that
        # works on the group it is given, which is gloo here; torch_gloo asks for an accelerator.
        eplb.use_async, eplb.communicator = False, "torch_nccl"
        parallel.enable_eplb, parallel.eplb_config = True, eplb
        return
    vllm_config.parallel_config = dataclasses.replace(parallel, enable_eplb=True, eplb_config=eplb)


def _announce(config: BalancerConfig, redundant: int, deployment: Deployment) -> None:
    from vllm.logger import init_logger

    if config.fetches:
        _announce_slots(config, redundant // deployment.num_ranks, deployment)
        return
    extra = redundant * deployment.num_moe_layers * deployment.expert_bytes
    init_logger(f"vllm.{__name__}").info(
        "MoE balancer %s: %d experts + %d redundant per layer on %d ranks; the redundant experts "
        "take %.2f GiB in all, %.2f GiB per rank.",
        config.name,
        deployment.num_experts,
        redundant,
        deployment.num_ranks,
        extra / 2**30,
        extra / deployment.num_ranks / 2**30,
    )


def _announce_slots(config: BalancerConfig, slots: int, deployment: Deployment) -> None:
    from vllm.logger import init_logger

    per_rank = slots * deployment.num_moe_layers * deployment.expert_bytes
    init_logger(f"vllm.{__name__}").info(
        "MoE balancer %s: %d experts on %d ranks, %d dynamic slots per rank and layer (%.2f GiB "
        "per rank); the host store of all experts takes %.2f GiB, %.2f GiB are free.",
        config.name,
        deployment.num_experts,
        deployment.num_ranks,
        slots,
        per_rank / 2**30,
        deployment.store_bytes / 2**30,
        deployment.free_host_bytes / 2**30,
    )
