"""Settings that only a finished VllmConfig can refuse."""

import os
from types import SimpleNamespace

import deployments
import numpy as np
import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from vllm_balance import config, plugin, traces
from vllm_balance.config import BalancerConfig
from vllm_balance.errors import BalancerError
from vllm_balance.replay import STRATEGY
from vllm_balance.seams import announcements, combinations, deployment, read_deployment
from vllm_balance.traces import Trace

VARIABLE = "VLLM_MOE_ROUTING_SIMULATION_STRATEGY"


@pytest.fixture(autouse=True)
def registered(untouched_vllm, monkeypatch):
    plugin.register()
    monkeypatch.setenv(VARIABLE, "")


def configure(model: str, replay: dict) -> None:
    configure_with(model, {"name": "static", "replay": replay}, tensor_parallel_size=2)


def configure_with(model: str, settings: dict, **layout: object) -> None:
    EngineArgs(
        model=model,
        skip_tokenizer_init=True,
        max_model_len=64,
        enable_expert_parallel=True,
        additional_config={"moe_balancer": settings},
        **layout,
    ).create_engine_config()


def test_a_replay_that_does_not_fit_the_model_is_refused_before_workers_start(moe_model, tmp_path):
    with pytest.raises(BalancerError, match=r"`replay` cannot drive .* hot"):
        configure(moe_model, {"hot": {"experts": 1, "fraction": 1.0}})
    with pytest.raises(BalancerError, match="does not exist"):
        configure(moe_model, {"trace": str(tmp_path / "lost.npz")})
    assert os.environ[VARIABLE] == ""


def test_a_replay_that_fits_is_named_to_vllm(moe_model):
    configure(moe_model, {"zipf": 0.8})
    assert os.environ[VARIABLE] == STRATEGY


@pytest.mark.parametrize("balanced", [True, False])
def test_a_model_after_a_replayed_one_is_routed_by_its_own_router(moe_model, balanced):
    configure(moe_model, {"zipf": 0.8})
    settings = {"additional_config": {"moe_balancer": {"name": "static"}}} if balanced else {}
    layout = {"tensor_parallel_size": 2, "enable_expert_parallel": balanced}
    EngineArgs(
        model=moe_model, skip_tokenizer_init=True, max_model_len=64, **settings, **layout
    ).create_engine_config()
    assert VARIABLE not in os.environ


def test_a_trace_to_replay_is_found_by_workers_in_any_folder(moe_model, tmp_path, monkeypatch):
    traces.save(
        tmp_path / "t.npz",
        Trace(
            name="t",
            num_experts=8,
            top_k=2,
            layer_index_L=np.arange(2),
            topk_ids_TLK=np.tile(np.array([0, 1], np.uint8), (9, 2, 1)),
        ),
    )
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(
        deployment, "_set_up", lambda vllm_config, config, settled: seen.append(settled)
    )
    configure(moe_model, {"trace": "t.npz"})
    assert seen[-1]["replay"]["trace"] == str(tmp_path / "t.npz")


def test_a_way_of_exchange_that_the_layout_does_not_have_is_refused(moe_model):
    after_gather = {"name": "metro", "exchange": "after_gather"}
    with pytest.raises(BalancerError, match="tensor-parallel ranks hold all tokens"):
        configure_with(moe_model, after_gather, tensor_parallel_size=2)
    with pytest.raises(BalancerError, match="does not gather all tokens"):
        configure_with(
            moe_model,
            after_gather,
            data_parallel_size=2,
            all2all_backend="deepep_low_latency",
        )


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"name": "metro", "knee_tokens": 40, "free_tokens": 20}, "`free_tokens` is 20: it descr"),
        ({"name": "gem", "map": "m", "profile": "p", "online": {}}, "`online` measures the ranks"),
    ],
)
def test_what_only_cpu_ranks_do_is_refused_on_gpus(settings, reason, monkeypatch):
    config = BalancerConfig.model_validate(settings)
    combinations.check_device(config)
    monkeypatch.setattr(current_platform, "is_cpu", lambda: False)
    with pytest.raises(BalancerError, match=reason):
        combinations.check_device(config)


@pytest.mark.parametrize("name", ["metro", "harmoeny"])
def test_free_memory_is_asked_for_before_there_are_ranks_and_not_again(
    name, moe_model, monkeypatch
):
    """API servers configure themselves again when the ranks have taken what was free."""
    monkeypatch.setattr(read_deployment, "_free_host_bytes", lambda config, local_ranks: 10)
    with pytest.raises(BalancerError, match="and 10 bytes"):
        configure_with(moe_model, {"name": name}, tensor_parallel_size=2)
    monkeypatch.setattr("multiprocessing.parent_process", lambda: "the first one")
    monkeypatch.delenv(config._SET_UP, raising=False)
    with pytest.raises(BalancerError, match="and 10 bytes"):
        configure_with(moe_model, {"name": name}, tensor_parallel_size=2)
    monkeypatch.setenv(config._SET_UP, "1")
    configure_with(moe_model, {"name": name}, tensor_parallel_size=2)


def test_what_a_deployment_starts_knows_that_it_was_set_up(moe_model, monkeypatch):
    monkeypatch.delenv(config._SET_UP, raising=False)
    configure_with(moe_model, {"name": "static"}, tensor_parallel_size=2)
    assert os.environ[config._SET_UP] == str(os.getpid())
    monkeypatch.delenv(config._SET_UP)


def test_a_second_deployment_of_a_child_process_is_set_up_as_the_first(moe_model, monkeypatch):
    monkeypatch.setattr("multiprocessing.parent_process", lambda: "the one that started it")
    monkeypatch.delenv(config._SET_UP, raising=False)
    configure_with(moe_model, {"name": "static"}, tensor_parallel_size=2)
    assert deployment._is_first_process()
    monkeypatch.setenv(config._SET_UP, str(os.getpid() + 1))
    assert not deployment._is_first_process()
    configure_with(moe_model, {"name": "static"}, tensor_parallel_size=2)
    assert not deployment._is_first_process(), "an API server takes itself for the first"


def test_a_profile_that_is_not_read_need_not_fit(moe_model, monkeypatch):
    """That it has no effect is said; before, a server could not start with it."""
    seen = []
    monkeypatch.setattr(
        deployment, "_set_up", lambda vllm_config, config, settled: seen.append(settled)
    )
    static = {"name": "static", "profile": "no.json"}
    configure_with(moe_model, static, tensor_parallel_size=2)
    assert len(seen) == 1
    with pytest.raises(BalancerError, match=r"profile .*no\.json cannot be read"):
        configure_with(moe_model, static | {"name": "metro"}, tensor_parallel_size=2)


@pytest.mark.parametrize(
    ("mode", "is_eager"), [(CUDAGraphMode.NONE, True), (CUDAGraphMode.FULL_AND_PIECEWISE, False)]
)
def test_a_server_is_eager_without_graphs_whatever_flag_asked_for_it(moe_model, mode, is_eager):
    made = EngineArgs(
        model=moe_model, skip_tokenizer_init=True, max_model_len=64
    ).create_engine_config()
    made.compilation_config.cudagraph_mode = mode
    found = read_deployment.read_deployment(made, ranks_hold_memory=False)
    assert not made.model_config.enforce_eager and found.is_eager == is_eager


def test_a_cache_on_gpus_takes_nothing_from_the_host(monkeypatch):
    config = SimpleNamespace(cache_config=SimpleNamespace(kv_cache_memory_bytes=2**60))
    assert read_deployment._free_host_bytes(config, 2) == 0
    monkeypatch.setattr(current_platform, "is_cpu", lambda: False)
    assert read_deployment._free_host_bytes(config, 2) > 0


def compressed(num_bits: int) -> dict:
    """Weights of so many bits, as llm-compressor writes them, with activations of eight."""
    group = {"weights": {"num_bits": num_bits}, "input_activations": {"num_bits": 8}}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


@pytest.mark.parametrize(
    ("quantization", "said", "weight_bytes"),
    [
        (None, None, 2.0),
        ("fp8", {"quant_method": "fp8", "weight_block_size": [128, 128]}, 1.0),
        ("fp8_per_tensor", None, 1.0),
        ("experts_int8", None, 1.0),
        ("mxfp8", {"quant_method": "mxfp8"}, 1.0),
        ("modelopt", {"quant_method": "modelopt", "quant_algo": "FP8"}, 1.0),
        ("compressed-tensors", compressed(8), 1.0),
        ("compressed-tensors", compressed(4), 0.5),
        ("gptq_marlin", {"quant_method": "gptq", "bits": 8, "group_size": 32}, 1.0),
        ("gptq_marlin", {"quant_method": "gptq", "bits": 4, "group_size": 128}, 0.5),
        ("awq_marlin", {"quant_method": "awq", "w_bit": 4}, 0.5),
        ("modelopt_fp4", {"quant_method": "modelopt", "quant_algo": "NVFP4"}, 0.5),
        ("mxfp4", {"quant_method": "mxfp4"}, 0.5),
        ("quark", {"quant_method": "quark", "global_quant_config": {"weight": "fp6_e3m2"}}, 0.5),
        ("nvfp4_per_token", None, 0.5),
        ("deepseek_v4_fp8", {"quant_method": "fp8"}, 0.5),
    ],
)
@pytest.mark.parametrize("where", ["hf_config", "hf_text_config"])
def test_a_quantised_weight_takes_a_byte_unless_fewer_bits_are_named(
    quantization, said, weight_bytes, where
):
    model = SimpleNamespace(
        quantization=quantization,
        dtype=torch.bfloat16,
        hf_config=SimpleNamespace(),
        hf_text_config=SimpleNamespace(),
    )
    getattr(model, where).quantization_config = said
    assert read_deployment._weight_bytes(model) == weight_bytes


@pytest.mark.parametrize(
    ("name", "redundant", "expert_bytes", "warned"),
    [
        ("metro", 0, 1000, "will serve as eplb without redundant experts does"),
        ("first_copy", 0, 1000, "Set `redundancy`"),
        ("metro", 4, 1000, ""),
        ("eplb", 0, 1000, ""),
        ("eplb", 4, 0, "was not checked whether"),
    ],
)
def test_what_cannot_help_or_be_checked_is_warned_about(
    said, name, redundant, expert_bytes, warned
):
    facts = deployments.deployment(expert_bytes=expert_bytes)
    announcements.announce(BalancerConfig(name=name), redundant, facts)
    assert len(said) == (warned != "") and warned in " ".join(said)


@pytest.mark.parametrize(
    ("settings", "unread"),
    [
        ({"name": "eplb", "knee_tokens": 9, "window_size": 5}, "`knee_tokens`"),
        ({"name": "gem", "map": "m", "window_size": 5}, "`window_size`"),
        ({"name": "gem", "map": "m", "profile": "p"}, "`profile`"),
        ({"name": "harmoeny", "step_interval": 5, "knee_tokens": 9}, "`step_interval`"),
        (
            {"name": "static", "step_interval": 5, "window_size": 5},
            "`window_size`, `step_interval`",
        ),
        ({"name": "metro", "knee_tokens": 9, "free_tokens": 2, "window_size": 5}, ""),
        ({"name": "gem", "map": "m", "profile": "p", "online": {}}, ""),
    ],
)
def test_what_a_balancer_does_not_read_is_warned_about(said, settings, unread):
    announcements.announce(BalancerConfig(**settings), 4, deployments.deployment())
    assert [line for line in said if "has no use for" in line] == (
        [f"MoE balancer {settings['name']} has no use for {unread}, given in its settings or in "
         f"--eplb-config."] if unread else []
    )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "on_cpu", "buffer"),
    [
        ({"name": "eplb"}, False, ", and vLLM's buffer for exchanges 0.64 GiB per rank"),
        ({"name": "harmoeny"}, False, ", and vLLM's buffer for exchanges 0.64 GiB per rank"),
        ({"name": "harmoeny"}, True, ""),
        ({"name": "gem", "map": "m"}, False, ""),
    ],
)
def test_the_start_names_the_buffer_of_vllms_exchanges(told, settings, on_cpu, buffer):
    facts = deployments.deployment(expert_bytes=10 * 2**20, on_cpu=on_cpu)
    announcements.announce(BalancerConfig(**settings), 4, facts)
    assert len(told) == 1
    assert buffer in told[0] and (("buffer" in told[0]) == bool(buffer))


@pytest.fixture
def logged(monkeypatch) -> dict[str, list[str]]:
    """Lines of the start, by level."""
    lines: dict[str, list[str]] = {"info": [], "warning": []}
    logger = SimpleNamespace(
        **{
            level: lambda text, *values, level=level: lines[level].append(text % values)
            for level in lines
        }
    )
    monkeypatch.setattr("vllm.logger.init_logger", lambda name: logger)
    return lines


@pytest.fixture
def said(logged) -> list[str]:
    """Warnings of the start."""
    return logged["warning"]


@pytest.fixture
def told(logged) -> list[str]:
    """What the start says besides."""
    return logged["info"]
