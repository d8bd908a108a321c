"""A profile in the settings: the knee that it sets, and foreign ones refused."""

import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from vllm_balance import commands, documents, plugin, traces
from vllm_balance.errors import BalancerError
from vllm_balance.model_shape import from_config
from vllm_balance.profiles import Curve, Point, Profile, RankProfile, Units
from vllm_balance.seams import settings_files
from vllm_balance.seams.deployment import settings_of
from vllm_balance.seams.device import device_name, served_dtype
from vllm_balance.seams.settings_files import (
    initial_placement,
    measured_costs,
    require_profiled_cores,
)
from vllm_balance.seams.versions import kernel_versions

BETA_US = 0.5


@pytest.fixture(autouse=True)
def registered(untouched_vllm):
    plugin.register()


def curve(b_us: float, **changes) -> Curve:
    fields = dict(
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
    return Curve(**fields | changes)


def in_turn(b_us: float, free_tokens: int) -> Curve:
    """The form that a CPU has: a token beyond the free ones takes BETA_US."""
    changes = {"tile_us": BETA_US, "tile_tokens": 1, "free_tokens": free_tokens}
    return curve(b_us, beta_us=0.0, **changes)


def rank(number: int, found: Curve) -> RankProfile:
    point = Point(tokens_E=[1], time_us=1.0, repeats=1)
    return RankProfile(rank=number, place=f"core {number}", curve=found, points=[point])


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
            "ranks": [rank(0, curve(4.0)), rank(1, curve(6.0))],
        }
        documents.write(tmp_path / "profile.json", Profile(**fields | changes))
        return str(tmp_path / "profile.json")

    return run


ALL_REDUCE = {"exchange": "all_reduce"}


def configured(
    model: str, name: str = "metro", parallel: str = "tensor", dtype: str = "auto", **settings
):
    return EngineArgs(
        model=model,
        dtype=dtype,
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


def test_ranks_that_compute_in_turn_set_knee_and_free_tokens(moe_model, write):
    """Both are means over the ranks; a rank whose experts overlap has no free tokens."""
    asked = write(ranks=[rank(0, in_turn(4.0, 1)), rank(1, in_turn(6.0, 4))])
    found = settings_of(configured(moe_model, profile=asked))
    assert (found.knee_tokens, found.free_tokens) == (10.0, 2.5)
    mixed = write(ranks=[rank(0, in_turn(4.0, 1)), rank(1, curve(6.0))])
    found = settings_of(configured(moe_model, profile=mixed))
    assert (found.knee_tokens, found.free_tokens) == (10.0, None)
    named = settings_of(configured(moe_model, profile=asked, knee_tokens=3.0))
    assert (named.knee_tokens, named.free_tokens) == (3.0, None)
    fetching = settings_of(configured(moe_model, profile=asked, name="harmoeny"))
    assert (fetching.knee_tokens, fetching.free_tokens) == (10.0, None)


@pytest.mark.parametrize(
    ("of_model", "asked", "served"),
    [
        ("bfloat16", "float32", "float32"),
        ("bfloat16", "auto", "bfloat16"),
        ("float32", "auto", "bfloat16"),
    ],
)
def test_a_server_takes_the_profile_and_the_map_made_from_it(
    moe_model, write, tmp_path, of_model, asked, served
):
    """Whatever the checkpoint's dtype: `profile`, `place` and the server with one `--dtype`."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = json.loads((Path(moe_model) / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": of_model}))
    dtype = served_dtype(asked, from_config(folder).dtype)
    assert dtype == served
    shape = from_config(folder).model_copy(update={"dtype": dtype})
    files = {"profile": write(shape=shape, device=device_name(dtype))}
    files["map"] = str(tmp_path / "map.json")
    topk_ids_TLK = np.random.default_rng(0).permuted(np.tile(np.arange(8), (400, 2, 1)), axis=2)
    trace = traces.Trace(
        name="t",
        num_experts=8,
        top_k=2,
        layer_index_L=np.arange(2),
        topk_ids_TLK=topk_ids_TLK[..., :2].astype(np.uint8),
        request_id_T=np.arange(400) // 20,
    )
    traces.save(tmp_path / "t.npz", trace)
    arguments = ["place", "--profile", files["profile"], "--trace", str(tmp_path / "t.npz")]
    arguments += ["--steps", "4", "--batch", "32", "-o", files["map"]]
    placed = CliRunner().invoke(commands.app, arguments)
    assert placed.exit_code == 0, placed.output
    config = configured(str(folder), "gem", dtype=asked, **files)
    assert initial_placement(settings_of(config), config).origin == "gem map"


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
    monkeypatch.setattr(settings_files, "unprofiled_device", lambda: "a CPU of type aarch64")
    text = refused(moe_model, profile=write())
    assert f"`profile` names {write()}, and profiles describe unquantised experts on x86" in text
    assert "this server runs on a CPU of type aarch64. Leave `profile` out and set" in text


def test_experts_that_cannot_be_profiled(moe_model, write):
    config = configured(moe_model)
    config.model_config.quantization = "fp8"
    asked = settings_of(configured(moe_model, profile=write()))
    with pytest.raises(BalancerError, match=r"this server has experts in fp8\. Leave `profile`"):
        measured_costs(asked, config)


def test_a_gpu_takes_the_profile_of_one_of_its_kind(moe_model, write, monkeypatch):
    kind = type(current_platform)
    config = configured(moe_model, profile=write())
    monkeypatch.setattr(kind, "is_cuda_alike", lambda self: True)
    monkeypatch.setattr(kind, "get_device_name", classmethod(lambda cls, device_id=0: "H100"))
    with pytest.raises(BalancerError, match=r"device '.*, (vec|amx)' instead of 'H100, triton'"):
        measured_costs(settings_of(config), config)
    write(device="H100, triton")
    assert [cost.knee_tokens for cost in measured_costs(settings_of(config), config)] == [8, 12]


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
