"""What the threshold is measured with: vLLM's own kernel call, and copies that no cache holds."""

import inspect
import time
from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

from vllm_balance.seams.fetch_speed import TOKENS, copy_bytes_per_s, token_us


def test_the_bandwidth_is_that_of_the_median_copy():
    copied = []

    def copy(expert: int) -> None:
        copied.append(expert)
        time.sleep(0.2 if len(copied) == 3 else 0.01)

    speed = copy_bytes_per_s(copy, 1_000_000, 64)
    assert len(set(copied)) >= 3 and max(copied) < 64
    assert 2e7 < speed <= 1e8, "one slow copy among several changes nothing"


@pytest.mark.parametrize("num_experts", [1, 2, 5])
def test_few_experts_suffice(num_experts):
    assert copy_bytes_per_s(lambda expert: time.sleep(1e-3), 100, num_experts) > 0


def test_the_kernel_is_called_as_vllm_defines_it():
    calls = []

    def apply(**call):
        inspect.signature(CPUUnquantizedExperts.apply).bind(None, **call)
        calls.append(call)
        time.sleep(0.01)

    experts = SimpleNamespace(
        w13_weight=torch.zeros(3, 8, 4),
        w2_weight=torch.zeros(3, 4, 4),
        activation="silu",
        local_num_experts=3,
        moe_config=SimpleNamespace(hidden_dim=4, in_dtype=torch.bfloat16),
        quant_method=SimpleNamespace(
            moe_kernel=SimpleNamespace(fused_experts=SimpleNamespace(apply=apply))
        ),
    )
    assert token_us(experts) >= 0.01e6 / TOKENS
    assert all(call["hidden_states"].shape == (TOKENS, 4) for call in calls)
    assert all(call["hidden_states"].dtype is torch.bfloat16 for call in calls)
    assert all(call["topk_ids"].shape == (TOKENS, 1) for call in calls)
