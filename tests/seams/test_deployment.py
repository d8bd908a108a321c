"""Settings that only a finished VllmConfig can refuse."""

import os

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from vllm_balance import plugin
from vllm_balance.config import BalancerConfig
from vllm_balance.errors import BalancerError
from vllm_balance.replay import STRATEGY
from vllm_balance.seams import deployment

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
    deployment._check_device(config)
    monkeypatch.setattr(current_platform, "is_cpu", lambda: False)
    with pytest.raises(BalancerError, match=reason):
        deployment._check_device(config)
