"""A profile in the settings: the knee that it sets, and foreign ones refused."""

from datetime import UTC, datetime
from pathlib import Path

import pytest
from vllm.engine.arg_utils import EngineArgs

from vllm_balance import documents, plugin
from vllm_balance.errors import BalancerError
from vllm_balance.model_shape import from_config
from vllm_balance.profiles import Curve, Point, Profile, RankProfile, Units
from vllm_balance.seams import settings_files
from vllm_balance.seams.deployment import settings_of
from vllm_balance.seams.device import device_name
from vllm_balance.seams.settings_files import measured_costs, require_profiled_cores
from vllm_balance.seams.versions import kernel_versions

BETA_US = 0.5


@pytest.fixture(autouse=True)
def registered(untouched_vllm):
    plugin.register()


def curve(b_us: float) -> Curve:
    return Curve(
        a_us=1.0,
        b_us=b_us,
        c_us=0.0,
        beta_us=BETA_US,
        tile_us=0.0,
        tile_tokens=None,
        free_tokens=None,
        knee_tokens=b_us / BETA_US,
        r2=1.0,
        median_relative_error=0.0,
        residual_us=[0.0],
    )


@pytest.fixture
def write(moe_model, tmp_path):
    """Writes a profile of the model on this machine, with two ranks, and returns its path."""

    def run(**changes) -> str:
        fields = {
            "units": Units(),
            "created": datetime(2026, 11, 22, tzinfo=UTC),
            "device": device_name(from_config(Path(moe_model)).dtype),
            "versions": kernel_versions(),
            "shape": from_config(Path(moe_model)),
            "ranks": [
                RankProfile(
                    rank=rank,
                    place=f"core {rank}",
                    curve=curve(b_us),
                    points=[Point(tokens_E=[1], time_us=1.0, repeats=1)],
                )
                for rank, b_us in enumerate((4.0, 6.0))
            ],
        }
        documents.write(tmp_path / "profile.json", Profile(**fields | changes))
        return str(tmp_path / "profile.json")

    return run


ALL_REDUCE = {"exchange": "all_reduce"}


def configured(model: str, name: str = "metro", parallel: str = "tensor", **settings):
    return EngineArgs(
        model=model,
        skip_tokenizer_init=True,
        max_model_len=64,
        **{f"{parallel}_parallel_size": 2},
        enable_expert_parallel=True,
        additional_config={"moe_balancer": {"name": name, **settings}},
    ).create_engine_config()


def refused(model: str, name: str = "metro", **settings) -> str:
    with pytest.raises(BalancerError) as raised:
        configured(model, name, **settings)
    text = str(raised.value)
    assert "\n" not in text and text.endswith(".")
    return text


def test_the_measured_knee_replaces_the_default(moe_model, write):
    config = configured(moe_model, profile=write())
    assert settings_of(config).knee_tokens == 10.0
    costs = measured_costs(settings_of(config), config)
    assert [cost.knee_tokens for cost in costs] == [8.0, 12.0]


def test_an_explicit_knee_wins(moe_model, write):
    config = configured(moe_model, profile=write(), knee_tokens=3.0)
    assert settings_of(config).knee_tokens == 3.0


def test_without_a_profile_nothing_is_measured(moe_model):
    config = configured(moe_model)
    assert settings_of(config).knee_tokens is None
    assert measured_costs(settings_of(config), config) is None


def test_foreign_profiles(moe_model, write):
    shape = from_config(Path(moe_model))
    for change, said in (
        ({"device": "abacus"}, "device 'abacus' instead of"),
        ({"versions": {"vllm": "0.1", "torch": "1.0"}}, "vllm 0.1 instead of"),
        ({"shape": shape.model_copy(update={"top_k": 3})}, "top_k 3 instead of 2"),
        ({"shape": shape.model_copy(update={"dtype": "float32"})}, "dtype float32 instead of"),
    ):
        text = refused(moe_model, profile=write(**change))
        assert said in text and "run `vllm-balance profile`" in text
        assert ("with `--dtype bfloat16`" in text) == ("dtype" in said)
    assert "cannot be read" in refused(moe_model, profile="lost.json")


def test_a_profile_of_ranks_with_other_cores(moe_model, write):
    """Known in the worker, which binds its threads, and before it loads weights."""
    named = settings_of(configured(moe_model, profile=write(cores_per_rank=4)))
    require_profiled_cores(named, 4)
    with pytest.raises(BalancerError, match=r"4 cores each, and this rank has 2 threads.*-rank 2`"):
        require_profiled_cores(named, 2)
    require_profiled_cores(settings_of(configured(moe_model)), 2)


def test_a_device_that_cannot_be_profiled(moe_model, write, monkeypatch):
    monkeypatch.setattr(settings_files, "unprofiled_device", lambda: "H100")
    text = refused(moe_model, profile=write())
    assert f"`profile` names {write()}, and profiles describe x86 CPUs only" in text
    assert "this server runs on H100. Leave `profile` out and set `knee_tokens`" in text


def test_a_profile_of_another_number_of_ranks(moe_model, write):
    one = Profile.model_validate_json(Path(write()).read_bytes()).ranks[:1]
    configured(moe_model, profile=write(ranks=one))
    three = [*one, *(one[0].model_copy(update={"rank": rank}) for rank in (1, 2))]
    assert "the profile has 3" in refused(moe_model, profile=write(ranks=three))


def test_online_gem_gets_the_state_of_eplb_which_never_rearranges(moe_model, write):
    config = configured(moe_model, "gem", profile=write(), online={"interval": 50})
    eplb = config.parallel_config.eplb_config
    assert config.parallel_config.enable_eplb
    assert eplb.num_redundant_experts == 0 and eplb.step_interval > 2**60
    assert settings_of(config).online.interval == 50


def test_what_online_needs(moe_model, write):
    assert "`profile` is missing" in refused(moe_model, "gem", online={})
    assert "belongs to --moe-balancer gem" in refused(moe_model, profile=write(), online={})
    text = refused(moe_model, "gem", profile=write(), online={"intervall": 5})
    assert "Did you mean 'online.interval'?" in text
    text = refused(moe_model, "gem", profile=write(), online={}, parallel="data", **ALL_REDUCE)
    assert "only its own tokens" in text
    text = refused(moe_model, "gem", profile=write(), online={}, redundancy=1.5)
    assert "redundant experts were asked for" in text
