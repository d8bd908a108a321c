"""What a balancer is refused together with, by a finished ``VllmConfig``."""

from __future__ import annotations

from typing import Any

from vllm_balance.config import BalancerConfig
from vllm_balance.deployment import Deployment
from vllm_balance.errors import BalancerError
from vllm_balance.exchange import Way, way_of_exchange
from vllm_balance.online import require_whole_batch
from vllm_balance.replay_rows import draw
from vllm_balance.routing import ROUTING

WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "vllm_balance.seams.worker_cpu.BalancedCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": "vllm_balance.seams.worker_gpu.BalancedGPUWorker",
}
"""vLLM's worker class -> ours, a subclass of it."""


def check_combination(config: BalancerConfig, vllm_config: Any) -> None:
    """Returns if the balancer works with what else vLLM was asked for.

    Raises:
        BalancerError: it does not; names all that stands in the way.
    """
    from vllm.platforms import current_platform

    parallel = vllm_config.parallel_config
    if parallel.worker_cls not in WORKERS:
        raise BalancerError(
            f"--moe-balancer {config.name} replaces vLLM's worker class, and --worker-cls asks for "
            f"{parallel.worker_cls}. Supported are {', '.join(WORKERS)}; remove --worker-cls."
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
    # The host store is filled once, moved experts are not where new weights would be written, and
    # vLLM writes them unpacked where its CPU kernels take them packed.
    if config.fetches or config.moves or current_platform.is_cpu():
        refused["weight transfer"] = vllm_config.weight_transfer_config is not None
    # vLLM gives adapters to experts by the linear placement.
    if config.fetches or config.uses_eplb or config.map is not None:
        refused["LoRA"] = vllm_config.lora_config is not None
    # Layers share its buffers, and these are the weights that a rank shows once it has loaded.
    if config.fetches or config.uses_eplb:
        refused["weight offloading by prefetch (--offload-group-size)"] = _prefetches(vllm_config)
    if config.record is not None and config.record.what == "ids":
        refused["recording ids of a pooling model"] = is_pooling(vllm_config.model_config)
    if config.fetches:
        refused["sleep mode"] = vllm_config.model_config.enable_sleep_mode
        # Slots would be host memory themselves, or copied to the device before a fetch into them.
        refused["--cpu-offload-gb"] = vllm_config.offload_config.uva.cpu_offload_gb > 0
    # A step that is tried again would be counted, fetched for or recorded twice on some ranks, and
    # an exchange of counts would wait for a rank that is gone.
    has_memory = config.fetches or config.online is not None or config.record is not None
    if has_memory or ROUTING[config.name].counts_decide:
        refused["--enable-fault-tolerance"] = getattr(parallel, "enable_fault_tolerance", False)
    found = [name for name, present in refused.items() if present]
    if found:
        raise BalancerError(
            f"--moe-balancer {config.name} is not supported together with {', '.join(found)}. "
            f"Supported: tensor or data parallelism with --enable-expert-parallel. Turn off what "
            f"is named here, or remove --moe-balancer."
        )
    way = way_of(config, parallel)
    if config.online is not None:
        require_whole_batch(way)
    if parallel.enable_eplb and config.stays:
        raise BalancerError(
            f"--moe-balancer {config.name} leaves every expert where it was loaded, and "
            f"--enable-eplb asks to move them. Use --moe-balancer eplb, or remove --enable-eplb."
        )


def is_pooling(model_config: Any) -> bool:
    """Whether a model's runner forgets the order of a step's requests before the step has ended."""
    return bool(model_config.runner_type == "pooling")


def _prefetches(vllm_config: Any) -> bool:
    """Whether vLLM keeps weights in host memory and brings a layer's when they are needed."""
    offload = vllm_config.offload_config
    by_size = offload.offload_backend == "auto" and offload.prefetch.offload_group_size > 0
    return bool(by_size or offload.offload_backend == "prefetch")


def way_of(config: BalancerConfig, parallel: Any) -> Way:
    """How ranks of this layout learn the global counts; raises as ``way_of_exchange`` does."""
    return way_of_exchange(
        data_parallel_size=parallel.data_parallel_size,
        gathers_tokens=parallel.all2all_backend == "allgather_reducescatter",
        asked_for=config.exchange,
    )


def check_device(config: BalancerConfig) -> None:
    """Returns if the settings are for this kind of device. Raises BalancerError if not."""
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


def check_replay(config: BalancerConfig, model_config: Any, deployment: Deployment) -> None:
    """Returns if a replay can drive the model, of which one layer is drawn.

    Raises:
        BalancerError: a skew or trace does not fit it, or CUDA graphs would be captured.
    """
    assert config.replay is not None
    if not deployment.on_cpu and not deployment.is_eager:
        raise BalancerError(
            "`replay` chooses on the host which rows come next, and a captured CUDA graph would "
            "repeat those of its capture for ever. Add --enforce-eager."
        )
    experts, top_k = model_config.get_num_experts(), model_config.get_num_experts_per_tok()
    try:
        for phase in config.replay.phases:
            draw(phase, num_layers=1, num_experts=experts, top_k=top_k, rank=0)
    except ValueError as error:
        raise BalancerError(f"`replay` cannot drive {model_config.model}: {error}.") from error
