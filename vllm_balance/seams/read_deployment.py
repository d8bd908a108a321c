"""The facts that a balancer is checked against: model, ranks, and memory."""

from __future__ import annotations

import re
from typing import Any

from vllm_balance.deployment import Deployment
from vllm_balance.experts.host_memory import available_bytes
from vllm_balance.model_shape import NAMES, moe_layers
from vllm_balance.seams.model_config import num_ranks

_UNDER_EIGHT_BITS = re.compile(r"fp[46]|int4|awq|deepseek_v4|bits?\W+[2-6]\b")
"""How quantisation methods and checkpoints say that weights have fewer than eight bits."""


def read_deployment(vllm_config: Any, *, ranks_hold_memory: bool) -> Deployment:
    """The facts about model, ranks and memory in a ``VllmConfig``.

    Args:
        ranks_hold_memory: they may have taken theirs, so that what is free says nothing.
    """
    from vllm.config import CUDAGraphMode
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
        is_eager=vllm_config.compilation_config.cudagraph_mode == CUDAGraphMode.NONE,
        one_machine=parallel.nnodes == 1
        and parallel.data_parallel_size == (parallel.data_parallel_size_local or 1),
        ranks_hold_memory=ranks_hold_memory,
    )


def _expert_weights(text: Any) -> int:
    """Weights of one expert: gate, up and down projection; Nemotron-H has no gate, and experts of
    another width than the model's where it says so. 0 if a configuration does not say."""
    hidden = _first(text, "moe_latent_size", *NAMES["hidden"])
    inner = _first(text, *NAMES["inner"])
    matrices = 2 if getattr(text, "mlp_hidden_act", None) == "relu2" else 3
    return int(matrices * hidden * inner)


def _first(text: Any, *keys: str) -> int:
    """The first of these numbers that a configuration has, of a list the largest (Ernie 4.5 VL has
    experts of two sizes); 0 if it has none."""
    for key in keys:
        found = getattr(text, key, None)
        largest = max(found, default=0) if isinstance(found, list | tuple) else found
        if isinstance(largest, int | float) and largest:
            return int(largest)
    return 0


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
