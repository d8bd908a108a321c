"""How fast this device copies an expert and computes a token: what the threshold follows from."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

TOKENS = 256
"""Tokens of one measured call on a core: enough for it to be bound by arithmetic."""
GPU_TOKENS = 8192
"""Of one on a GPU, which fewer would not fill."""
REPEATS = 3
GPU_REPEATS = 20


def copy_bytes_per_s(copy: Callable[[int], None], expert_bytes: int, num_experts: int) -> float:
    """Bandwidth of a fetch: ``copy(expert)`` brings one expert into a slot.

    Takes experts far apart in the store, whose weights no cache holds.
    """
    step = max(1, num_experts // (2 * REPEATS))
    taken_us = _median_us([partial(copy, expert) for expert in range(0, num_experts, step)])
    return expert_bytes / taken_us * 1e6


def token_us(routed_experts: Any) -> float:
    """Time of one (token, choice) pair in a layer's experts, loaded and ready to run."""
    if routed_experts.w13_weight.is_cpu:
        return _median_us([_kernel_call(routed_experts)] * REPEATS) / TOKENS
    return _products_us(routed_experts) / GPU_TOKENS


def _kernel_call(routed_experts: Any) -> Callable[[], None]:
    """vLLM's CPU experts on tokens of one expert."""
    config = routed_experts.moe_config
    hidden_NH = torch.randn(TOKENS, config.hidden_dim).to(config.in_dtype)
    call = {
        "output": torch.empty_like(hidden_NH),
        "hidden_states": hidden_NH,
        "w1": routed_experts.w13_weight,
        "w2": routed_experts.w2_weight,
        "topk_weights": torch.ones(TOKENS, 1),
        "topk_ids": torch.zeros(TOKENS, 1, dtype=torch.int32),
        "activation": routed_experts.activation,
        "global_num_experts": routed_experts.local_num_experts,
        "expert_map": None,
        "a1q_scale": None,
        "a2_scale": None,
        "workspace13": torch.empty(0),
        "workspace2": torch.empty(0),
        "expert_tokens_meta": None,
        "apply_router_weight_on_input": False,
    }
    experts = routed_experts.quant_method.moe_kernel.fused_experts
    return lambda: experts.apply(**call)


def _products_us(routed_experts: Any) -> float:
    """Time of the arithmetic of one expert as plain products, on a device whose kernels we cannot
    call: by the device's own clock, so that the time to launch them does not count."""
    config, device = routed_experts.moe_config, routed_experts.w13_weight.device
    inner = config.intermediate_size_per_partition
    shapes = ((GPU_TOKENS, config.hidden_dim), (config.hidden_dim, 2 * inner), (inner, GPU_TOKENS))
    hidden_NH, up_HI, inner_IN = (
        torch.randn(shape, device=device, dtype=config.in_dtype) for shape in shapes
    )
    start, end = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    for repeat in range(1 + GPU_REPEATS):
        if repeat == 1:  # The first warms up.
            start.record()
        torch.mm(hidden_NH, up_HI)
        torch.mm(up_HI[:, :inner], inner_IN)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / GPU_REPEATS


def _median_us(calls: list[Callable[[], None]]) -> float:
    """Median time of the calls behind the first, which only warms up."""
    times_us = []
    for call in [calls[0], *calls]:
        start = time.perf_counter_ns()
        call()
        times_us.append((time.perf_counter_ns() - start) / 1e3)
    return statistics.median(times_us[1:])
