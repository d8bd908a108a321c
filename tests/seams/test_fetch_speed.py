"""What the threshold is measured with: vLLM's own kernel call, and copies that no cache holds."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

from vllm_balance.seams import fetch_speed
from vllm_balance.seams.fetch_speed import (
    GPU_REPEATS,
    GPU_TOKENS,
    TOKENS,
    copy_bytes_per_s,
    token_us,
)


class Clock:
    """Stands for the module `time`; goes on when it is told to."""

    now_ns = 0

    def perf_counter_ns(self) -> int:
        return self.now_ns

    def sleep(self, seconds: float) -> None:
        self.now_ns += round(1e9 * seconds)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(fetch_speed, "time", found)
    return found


def test_the_bandwidth_is_that_of_the_median_copy(clock):
    copied = []

    def copy(expert: int) -> None:
        copied.append(expert)
        clock.sleep(0.2 if len(copied) in (1, 3) else 0.01)

    speed = copy_bytes_per_s(copy, 1_000_000, 64)
    assert len(set(copied)) >= 3 and max(copied) < 64
    assert speed == pytest.approx(1e8), "the first and one slow copy among several change nothing"


@pytest.mark.parametrize("num_experts", [1, 2, 5])
def test_few_experts_suffice(clock, num_experts):
    found = copy_bytes_per_s(lambda expert: clock.sleep(1e-3), 100, num_experts)
    assert found == pytest.approx(1e5)


def test_the_kernel_is_called_as_vllm_defines_it(clock):
    calls = []

    def apply(**call):
        inspect.signature(CPUUnquantizedExperts.apply).bind(None, **call)
        calls.append(call)
        clock.sleep(0.01)

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
    assert token_us(experts) == pytest.approx(0.01e6 / TOKENS)
    assert all(call["hidden_states"].shape == (TOKENS, 4) for call in calls)
    assert all(call["hidden_states"].dtype is torch.bfloat16 for call in calls)
    assert all(call["topk_ids"].shape == (TOKENS, 1) for call in calls)


def test_a_gpu_is_timed_by_its_own_clock(monkeypatch):
    """On tensors without memory, as there is no GPU: which work lies between the two events."""
    said = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            said.append("event")

        def synchronize(self) -> None:
            said.append("wait")

        def elapsed_time(self, end) -> float:
            return 40.0

    multiply = torch.mm
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "mm", lambda a, b: said.append("product") or multiply(a, b))
    experts = SimpleNamespace(
        w13_weight=torch.zeros(3, 8, 4, device="meta"),
        moe_config=SimpleNamespace(
            hidden_dim=4, intermediate_size_per_partition=6, in_dtype=torch.bfloat16
        ),
    )
    assert token_us(experts) == pytest.approx(40e3 / GPU_REPEATS / GPU_TOKENS)
    expected = ["product"] * 2 + ["event"] + ["product"] * 2 * GPU_REPEATS + ["event", "wait"]
    assert said == expected
