"""`vllm-balance profile` on GPUs, which are not here: a platform that says it has some."""

import json
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import triton.testing
from tiny_model import CONFIG
from typer.testing import CliRunner
from vllm.model_executor.layers import fused_moe
from vllm.platforms import current_platform

from vllm_balance import commands, profiles
from vllm_balance.commands import gpu_kernel
from vllm_balance.commands.expert_probe import Timing
from vllm_balance.commands.gpu_kernel import GpuKernel
from vllm_balance.commands.profile import sample
from vllm_balance.commands.profile_check import check_profile
from vllm_balance.cost import CostModel
from vllm_balance.errors import BalancerError
from vllm_balance.model_shape import ModelShape

SHAPE = ModelShape(
    name="m",
    architecture="M",
    num_layers=2,
    num_experts=8,
    top_k=2,
    hidden=16,
    inner=8,
    dtype="bfloat16",
)
GPU = CostModel(a_us=20, b_us=15, c_us=30, beta_us=0.1)
"""An expert of 15 us, and a knee of 150 tokens."""


class Instrument:
    """Answers as ranks with these curves do."""

    def __init__(self, curves):
        self.curves = curves

    def measure(self, tokens_E, repeats=None):
        times_us = [curve.of_experts(np.array(tokens_E)) for curve in self.curves]
        return [Timing(time_us=time_us, repeats=3) for time_us in times_us]


@pytest.fixture
def gpus(monkeypatch):
    """vLLM's platform has three GPUs of one kind."""
    kind = type(current_platform)
    monkeypatch.setattr(kind, "is_cuda_alike", lambda self: True)
    monkeypatch.setattr(kind, "device_count", classmethod(lambda cls: 3), raising=False)
    monkeypatch.setattr(kind, "get_device_name", classmethod(lambda cls, device_id=0: "H100"))


@pytest.fixture
def probed(monkeypatch):
    """What each rank's process was to make; they answer as GPUs, the last of them slower."""
    made = []

    @contextmanager
    def probing(kernels_S):
        made.append(kernels_S)
        slower = [GPU] * (len(kernels_S) - 1) + [GPU.slowed(1.16)]
        yield Instrument(slower)

    for function in (sample, check_profile):
        monkeypatch.setattr(sys.modules[function.__module__], "probing_kernels", probing)
    return made


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(commands.app, [str(argument) for argument in arguments])


def refused(*arguments):
    error = run(*arguments).exception
    assert isinstance(error, BalancerError)
    return str(error)


def test_all_gpus_are_profiled_and_one_that_is_slower_is_found(gpus, probed, model):
    done = run("profile", model, "-o", model / "p.json")
    assert done.exit_code == 0, done.output
    found = profiles.load(model / "p.json")
    assert (found.device, found.alone) == ("H100, triton", [])
    assert [rank.place for rank in found.ranks] == [f"cuda:{i}, H100" for i in range(3)]
    assert [kernel.args[1] for kernel in probed[0]] == ["cuda:0", "cuda:1", "cuda:2"]
    first, _, last = found.costs
    assert first.knee_tokens == pytest.approx(150, rel=0.05) and not first.in_turn
    assert last.b_us / first.b_us == pytest.approx(1.16, rel=0.02)
    most = max(sum(point.tokens_E) for point in found.ranks[0].points)
    local = max(len(point.tokens_E) for point in found.ranks[0].points)
    assert most > 300 * local, "beyond the knee"
    assert run("profile", model, "--check", model / "p.json").exit_code == 0
    assert len(probed) == 2 and len(probed[1]) == 3


def test_what_gpus_do_not_have_is_refused(gpus, probed, model):
    to = ("-o", model / "p.json")
    assert "3 GPUs are visible" in refused("profile", model, "--ranks", 4, *to)
    assert "Leave it out" in refused("profile", model, "--cores-per-rank", 1, *to)
    assert "Allowed are up to 4096" in refused("profile", model, "--experts", 5000, *to)
    assert not probed and not (model / "p.json").exists()


def test_gpus_of_several_kinds_are_refused(gpus, probed, model, monkeypatch):
    names = classmethod(lambda cls, device_id=0: ("H100", "H100", "A100")[device_id])
    monkeypatch.setattr(type(current_platform), "get_device_name", names)
    assert "(A100, H100), and a profile is of one" in refused("profile", model, "-o", model / "p")
    assert run("profile", model, "--ranks", 2, "-o", model / "p").exit_code == 0


@pytest.mark.parametrize("where", ["on a GPU", "on a CPU"])
def test_quantised_experts_are_refused(where, model, probed, request):
    if where == "on a GPU":
        request.getfixturevalue("gpus")
    quantised = CONFIG | {"quantization_config": {"quant_method": "fp8"}}
    (model / "config.json").write_text(json.dumps(quantised))
    said = refused("profile", model, "-o", model / "p.json")
    assert "are quantised (fp8)" in said and "--speeds" in said and not probed


@pytest.fixture
def kernel(monkeypatch):
    """A kernel on the CPU in a GPU's place, and what vLLM's function was called with."""
    called = []

    def fused_experts(hidden_NH, w13, w2, weight_NK, ids_NK):
        assert ids_NK.dtype == torch.int32 and weight_NK.dtype == torch.float32
        assert len(hidden_NH) == len(weight_NK) == len(ids_NK)
        called.append(ids_NK.flatten())
        return hidden_NH

    def do_bench(call, rep, return_mode):
        assert return_mode == "all"
        for _ in range(3 if rep else 1):
            call()
        return [0.2, 5.0, 0.3] if rep else [0.4]

    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda device: None)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: (2**40, 2**40))
    monkeypatch.setattr(fused_moe, "fused_experts", fused_experts)
    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    return GpuKernel(SHAPE, "cpu", 6), called


def test_a_batch_is_of_so_many_experts_with_so_many_tokens_each(kernel):
    made, called = kernel
    assert made._w13.shape == (6, 16, 16) and made._w2.shape == (6, 16, 8)
    timing = made.time([5, 1, 2], None)
    assert (timing.time_us, timing.repeats) == (pytest.approx(300), 3)
    ids_N = called[-1]
    assert sorted(torch.bincount(ids_N, minlength=6).tolist()) == [0, 0, 0, 1, 2, 5]
    others = {tuple(torch.bincount(called[-1]).tolist()) for _ in range(8) if made.time([1], None)}
    assert len(others) > 1, "experts differ from sample to sample"
    assert made.time([1], 1).repeats == 1


def test_experts_that_do_not_fit_on_a_gpu_are_refused(monkeypatch):
    of_one = 3 * SHAPE.hidden * SHAPE.inner * 2
    free = gpu_kernel.LEFT_FREE + 5 * of_one
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: (free, 2**40))
    gpu_kernel.require_memory(SHAPE, "cuda:1", 5, 2)
    with pytest.raises(BalancerError, match=r"of cuda:1 are free, enough for 5\. Ask for fewer"):
        gpu_kernel.require_memory(SHAPE, "cuda:1", 6, 2)


def test_the_call_is_vllms_own():
    """The names and the order of what is passed, on the function that GPUs have."""
    import inspect

    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    names = [*inspect.signature(fused_experts).parameters][:5]
    assert names == ["hidden_states", "w1", "w2", "topk_weights", "topk_ids"]
