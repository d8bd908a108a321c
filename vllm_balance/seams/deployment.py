"""From a finished ``VllmConfig`` to a checked and balanced one."""

from __future__ import annotations

import copy
import dataclasses
import multiprocessing
import os
import re
import sys
import uuid
from pathlib import Path
from typing import Any

from vllm_balance.config import KEY, LOADED_BY_MAP, BalancerConfig, parse, route_by_replay
from vllm_balance.cost import free_of, knee_of
from vllm_balance.deployment import (
    Deployment,
    check_eplb_limit,
    check_gpu_limits,
    num_redundant_experts,
)
from vllm_balance.errors import BalancerError
from vllm_balance.exchange import Way, way_of_exchange
from vllm_balance.maps import PlacementMap
from vllm_balance.model_shape import NAMES
from vllm_balance.online import require_whole_batch
from vllm_balance.recording import RecordSettings, require_new
from vllm_balance.replay_rows import draw
from vllm_balance.seams.host_memory import available_bytes
from vllm_balance.seams.server import install_in_api_server
from vllm_balance.seams.settings_files import (
    absolute,
    measured_costs,
    moe_layers,
    num_ranks,
    placement_of,
    read_map,
    read_shape,
)
from vllm_balance.seams.versions import unsupported_version
from vllm_balance.slot_deployment import num_dynamic_slots

_WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "vllm_balance.seams.worker_cpu.BalancedCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": "vllm_balance.seams.worker_gpu.BalancedGPUWorker",
}
"""vLLM's worker class -> ours, a subclass of it."""
CHOOSING = ("metro", "first_copy")
"""Balancers whose only means are copies of experts."""
_UNDER_EIGHT_BITS = re.compile(r"fp[46]|int4|awq|deepseek_v4|bits?\W+[2-6]\b")
"""How quantisation methods and checkpoints say that weights have fewer than eight bits."""


_SET_UP = "VLLM_BALANCE_SET_UP"
"""Set where a deployment was set up, and so in all processes that it starts."""


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
    found = read_map(config)
    eplb = vllm_config.parallel_config.eplb_config
    config = _with_redundancy(config, eplb.num_redundant_experts, found)
    config = _with_intervals(config, eplb)
    _check_combination(config, vllm_config)
    _check_device(config)
    deployment = read_deployment(vllm_config)
    redundant = _redundant_experts(config, deployment, vllm_config)
    if found is not None:
        placement_of(found, vllm_config, redundant)
        if _is_first_process():
            _warn_of_another_name(found, vllm_config)
    if config.replay is not None:
        _check_replay(config, vllm_config.model_config)
    settled = _settled(config, vllm_config, redundant)
    _set_up(vllm_config, config, settled)
    if _is_first_process():
        _announce(config, redundant, deployment)
    os.environ[_SET_UP] = "1"


def _warn_of_another_name(found: PlacementMap, vllm_config: Any) -> None:
    """Models of one shape use their experts differently; a name may be that of a folder only."""
    from vllm.logger import init_logger

    served = read_shape(vllm_config.model_config).name
    if found.shape.name != served:
        init_logger(f"vllm.{__name__}").warning(
            "The placement map was made for %s, and %s of the same shape is served. Another "
            "model uses its experts differently: make a map from a trace of this one.",
            found.shape.name,
            served,
        )


def _redundant_experts(config: BalancerConfig, deployment: Deployment, vllm_config: Any) -> int:
    """Slots of a layer beyond the logical experts, over all ranks, checked against memory."""
    if config.fetches:
        redundant = num_dynamic_slots(config, deployment) * deployment.num_ranks
    else:
        redundant = num_redundant_experts(config, deployment)
    check_eplb_limit(config, redundant)
    if not deployment.on_cpu:
        pairs = _mapped_pairs(vllm_config, _way(config, vllm_config.parallel_config))
        check_gpu_limits(config, deployment, num_redundant=redundant, mapped_pairs=pairs)
    return redundant


def _settled(config: BalancerConfig, vllm_config: Any, redundant: int) -> dict[str, Any]:
    """The settings as every process reads them: numbers for ratios and defaults, absolute paths."""
    parallel = vllm_config.parallel_config
    settled = {**config.model_dump(mode="json"), "num_redundant_experts": redundant}
    settled.pop("redundancy")
    if config.fetches:
        settled["dynamic_slots"] = redundant // num_ranks(vllm_config)
    settled |= absolute(config)
    costs = measured_costs(config, vllm_config)
    if costs is not None and config.knee_tokens is None:
        settled["knee_tokens"], settled["free_tokens"] = knee_of(costs), free_of(costs)
    if config.record is not None:
        settled["record"]["file"] = str(_checked_recording(config.record, parallel))
        settled["record"]["run"] = config.record.run or uuid.uuid4().hex
    return settled


def _set_up(vllm_config: Any, config: BalancerConfig, settled: dict[str, Any]) -> None:
    """Our worker, vLLM's EPLB where it is used, and the settings for the other processes."""
    parallel = vllm_config.parallel_config
    # EngineArgs shares one additional_config and one EPLBConfig between the configs it makes.
    vllm_config.additional_config = {**vllm_config.additional_config, KEY: settled}
    parallel.worker_cls = _WORKERS[parallel.worker_cls]
    if config.uses_eplb:
        _enable_eplb(vllm_config, config, settled["num_redundant_experts"])
    if config.replay is not None:
        route_by_replay()
    install_in_api_server()


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
            raise BalancerError(
                f"`{name}` is {ours} in the settings of --moe-balancer {config.name} and {vllms} "
                f"in --eplb-config, and one value is used. Give it in one of the two."
            )
    return config.model_copy(update=taken)


def _check_combination(config: BalancerConfig, vllm_config: Any) -> None:
    parallel = vllm_config.parallel_config
    if parallel.worker_cls not in _WORKERS:
        raise BalancerError(
            f"--moe-balancer {config.name} replaces vLLM's worker class, and --worker-cls asks for "
            f"{parallel.worker_cls}. Supported are {', '.join(_WORKERS)}; remove --worker-cls."
        )
    refused = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "elastic expert parallelism": parallel.enable_elastic_ep,
        "dual-batch overlap (--enable-dbo, --ubatch-size)": parallel.use_ubatching,
        "speculative decoding": vllm_config.speculative_config is not None,
        "tensor parallelism inside data parallelism": parallel.tensor_parallel_size > 1
        and parallel.data_parallel_size > 1,
        "round-robin expert placement": parallel.expert_placement_strategy != "linear",
        # vLLM's own check has run by now, with EPLB off.
        "--all2all-backend moonep, whose weights EPLB does not know": config.uses_eplb
        and parallel.all2all_backend == "moonep",
        # vLLM's filter reads the experts of the linear placement only, where EPLB is off.
        "a map and --enable-ep-weight-filter": parallel.enable_ep_weight_filter
        and config.map is not None
        and not config.uses_eplb,
    }
    # The host store is filled once, and moved experts are not where new weights would be written.
    if config.fetches or config.moves:
        refused["weight transfer"] = vllm_config.weight_transfer_config is not None
    # vLLM gives adapters to experts by the linear placement.
    if config.fetches or config.uses_eplb or config.map is not None:
        refused["LoRA"] = vllm_config.lora_config is not None
    if config.fetches:
        refused["sleep mode"] = vllm_config.model_config.enable_sleep_mode
    # A step that is tried again would be counted, fetched for or recorded twice on some ranks.
    if config.fetches or config.online is not None or config.record is not None:
        refused["--enable-fault-tolerance"] = getattr(parallel, "enable_fault_tolerance", False)
    found = [name for name, present in refused.items() if present]
    if found:
        raise BalancerError(
            f"--moe-balancer {config.name} is not supported together with {', '.join(found)}. "
            f"Supported: tensor or data parallelism with --enable-expert-parallel. Turn off what "
            f"is named here, or remove --moe-balancer."
        )
    way = _way(config, parallel)
    if config.online is not None:
        require_whole_batch(way)
    stays = config.fetches or config.name in LOADED_BY_MAP or not config.replicates
    if parallel.enable_eplb and stays:
        raise BalancerError(
            f"--moe-balancer {config.name} leaves every expert where it was loaded, and "
            f"--enable-eplb asks to move them. Use --moe-balancer eplb, or remove --enable-eplb."
        )


def _way(config: BalancerConfig, parallel: Any) -> Way:
    """How ranks of this layout learn the global counts; raises as ``way_of_exchange`` does."""
    return way_of_exchange(
        data_parallel_size=parallel.data_parallel_size,
        gathers_tokens=parallel.all2all_backend == "allgather_reducescatter",
        asked_for=config.exchange,
    )


def _mapped_pairs(vllm_config: Any, way: Way) -> int:
    """Most (token, choice) pairs of a batch that a rank maps without counts of other ranks."""
    if way == "all_reduce":
        return 0
    tokens = vllm_config.scheduler_config.max_num_batched_tokens
    ranks = vllm_config.parallel_config.data_parallel_size
    return int(ranks * tokens * vllm_config.model_config.get_num_experts_per_tok())


def _checked_recording(record: RecordSettings, parallel: Any) -> Path:
    """The absolute path to record at, checked where the deployment is set up."""
    path = record.file.expanduser().absolute()
    if _is_first_process():
        first = parallel.data_parallel_rank
        require_new(path, range(first, first + (parallel.data_parallel_size_local or 1)))
    return path


def _is_first_process() -> bool:
    """Whether the deployment is set up here: in a program of its own, or in a process of one that
    has set none up.

    Later processes (API servers, engines) configure themselves again, while the ranks may have
    taken their memory and made their files already.
    """
    return multiprocessing.parent_process() is None or _SET_UP not in os.environ


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
    local_ranks = parallel.tensor_parallel_size * (parallel.data_parallel_size_local or 1)
    if parallel.data_parallel_size == 1:
        local_ranks = -(-local_ranks // parallel.nnodes)
    on_cpu = current_platform.is_cpu()
    free_host_bytes = _free_host_bytes(vllm_config, local_ranks)
    return Deployment(
        model=model.model,
        num_experts=model.get_num_experts(),
        num_moe_layers=len(moe_layers(text)),
        expert_bytes=int(_expert_weights(text) * _weight_bytes(model)),
        num_ranks=num_ranks(vllm_config),
        enable_expert_parallel=parallel.enable_expert_parallel,
        free_bytes=free_host_bytes if on_cpu else _device_bytes(vllm_config),
        ranks_sharing_memory=local_ranks if on_cpu else 1,
        free_host_bytes=free_host_bytes,
        on_cpu=on_cpu,
        is_eager=bool(model.enforce_eager),
        one_machine=parallel.nnodes == 1
        and parallel.data_parallel_size == (parallel.data_parallel_size_local or 1),
        ranks_hold_memory=not _is_first_process(),
    )


def _expert_weights(text: Any) -> int:
    """Weights of one expert: gate, up and down projection; Nemotron-H has no gate, and experts of
    another width than the model's where it says so. 0 if a configuration does not say."""
    hidden = _first(text, "moe_latent_size", *NAMES["hidden"])
    inner = _first(text, *NAMES["inner"])
    matrices = 2 if getattr(text, "mlp_hidden_act", None) == "relu2" else 3
    return int(matrices * hidden * inner)


def _first(text: Any, *keys: str) -> int:
    """The first of these numbers that a configuration has; 0 if it has none."""
    return next((int(found) for key in keys if (found := getattr(text, key, None))), 0)


def _weight_bytes(model: Any) -> float:
    """Bytes of one weight of an expert, from a ``ModelConfig``.

    Of a quantised one without its scales: 1, or 0.5 where method or checkpoint say fewer bits.
    """
    if not model.quantization:
        return float(model.dtype.itemsize)
    configs = (model.hf_config, model.hf_text_config)
    said = [getattr(config, "quantization_config", None) for config in configs]
    found = _UNDER_EIGHT_BITS.search(f"{model.quantization} {said}".lower())
    return 1.0 if found is None else 0.5


def _free_host_bytes(vllm_config: Any, local_ranks: int) -> int:
    """Memory of this machine that weights may take: what is free, on CPU without the caches."""
    from vllm.platforms import current_platform

    free = available_bytes()
    if current_platform.is_cpu():
        free -= (vllm_config.cache_config.kv_cache_memory_bytes or 0) * local_ranks
    return max(0, free)


def _device_bytes(vllm_config: Any) -> int:
    """Memory of one device that vLLM may take."""
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
    checked = dataclasses.replace(parallel, enable_eplb=True, eplb_config=eplb)
    parallel.enable_eplb, parallel.eplb_config = True, checked.eplb_config


def _announce(config: BalancerConfig, redundant: int, deployment: Deployment) -> None:
    from vllm.logger import init_logger

    if deployment.expert_bytes == 0:
        init_logger(f"vllm.{__name__}").warning(
            "The configuration of %s does not say how large an expert is, so that memory was not "
            "checked for the balancer's.",
            deployment.model,
        )
    if config.name in CHOOSING and not redundant:
        init_logger(f"vllm.{__name__}").warning(
            "MoE balancer %s chooses among the copies of an expert, and there is one of each, so "
            "it will serve as static does. Set `redundancy` or `num_redundant_experts`.",
            config.name,
        )
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
