"""Hardware and model files: those of the catalogue are usable, damaged ones are refused."""

import inspect
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_balance.errors import BalancerError
from vllm_balance.simulate import catalogue, hardware, memory, models, validity
from vllm_balance.simulate.sweep import read

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", catalogue.names("hardware"))
def test_hardware_files_are_usable(name):
    found, profile = hardware.load(name)
    assert found.memory_bandwidth.value > 1e9 and found.compute
    assert (profile is not None) == (found.profile is not None)


@pytest.mark.parametrize(
    ("name", "billions", "active_layers"),
    [
        ("qwen3-30b-a3b", 30.5, 48),
        ("qwen3-235b-a22b", 235.1, 94),
        ("qwen3-235b-a22b-fp8", 235.1, 94),
        ("deepseek-v3", 671.0, 58),
        ("mixtral-8x7b", 46.7, 32),
        ("gpt-oss-20b", 20.9, 24),
        ("gpt-oss-120b", 116.8, 36),
        ("switch-128", 7.4, 12),
        ("qwen15-moe-fp32", 14.3, 24),
    ],
)
def test_weights_add_up_to_the_published_size(name, billions, active_layers):
    model = models.load(name)
    experts = model.num_moe_layers * model.num_experts.value * model.expert_weights
    wide = model.num_moe_layers * model.num_experts.value + 2 * model.vocabulary.value
    wide *= model.hidden.value
    narrow = model.dense_bytes - wide * model.head_weight.value
    total = experts + wide + narrow / model.dense_weight.value
    assert total / 1e9 == pytest.approx(billions, rel=0.01)
    assert model.num_moe_layers == active_layers


def test_deepseek_caches_its_latent_only():
    model = models.load("deepseek-v3")
    assert model.cache_width == 576
    assert model.cache_bytes(10) == 61 * 576 * 2 * 10
    assert models.load("qwen3-30b-a3b").cache_width == 2 * 4 * 128


def test_layers_with_a_window_cache_no_more_than_it():
    model = models.load("gpt-oss-120b")
    each = 2 * 8 * 64 * 2
    assert model.cache_bytes(100) == 36 * 100 * each
    assert model.cache_bytes(2048) == (18 * 2048 + 18 * 128) * each


def test_the_cache_has_the_number_format_of_the_model():
    """vLLM's default, --kv-cache-dtype auto: that of the checkpoint, 16 bits beside FP8."""
    for name in catalogue.names("model"):
        model = models.load(name)
        assert model.cache_element.value == max(2, int(model.dense_weight.value))


@pytest.mark.parametrize("name", catalogue.names("model"))
def test_model_files_say_what_vllm_supports(name):
    from vllm.model_executor.models.interfaces import MixtureOfExperts
    from vllm.model_executor.models.registry import ModelRegistry

    model = models.load(name)
    known = ModelRegistry.models.get(model.architecture)
    if known is None:
        assert model.support == "no model"
    else:
        built = known.load_model_cls()
        # gpt-oss's loader copies the experts of a layer in one piece: seams/loading.py refuses it.
        without = "no map" if "mxfp4" in inspect.getsource(inspect.getmodule(built)) else "no eplb"
        assert model.support == ("eplb" if MixtureOfExperts in built.__mro__ else without)


@pytest.mark.parametrize("name", catalogue.names("hardware"))
def test_engines_have_the_defaults_of_vllm(name, monkeypatch):
    """Its rule looks at the memory and the name of the device."""
    from vllm.engine import arg_utils
    from vllm.usage.usage_lib import UsageContext

    machine, _ = hardware.load(name)
    is_cpu = machine.experts == "in_turn"
    device = SimpleNamespace(
        get_device_total_memory=lambda: machine.memory.value,
        get_device_name=lambda: machine.name,
        is_tpu=lambda: False,
        is_cpu=lambda: is_cpu,
    )
    monkeypatch.setattr(arg_utils, "current_platform", device)
    ranks = machine.ranks_per_node.value if is_cpu else 1
    tokens, sequences = arg_utils.EngineArgs.get_batch_defaults(ranks)
    assert machine.engine.batched_tokens.value == tokens[UsageContext.OPENAI_API_SERVER]
    assert machine.engine.sequences.value == sequences[UsageContext.OPENAI_API_SERVER]


def test_as_much_memory_is_used_as_vllm_takes_by_default():
    from vllm.config import CacheConfig

    assert CacheConfig().gpu_memory_utilization == memory.USABLE


@pytest.mark.parametrize("name", catalogue.names("model"))
def test_embedding_head_and_router_are_not_quantised(name):
    """vLLM's Fp8Config leaves them to the number format of the checkpoint."""
    model = models.load(name)
    assert model.head_weight.value == max(round(model.dense_weight.value), 2)
    assert model.wide_number == ("float32" if model.head_weight.value == 4 else "float16")


@pytest.mark.parametrize("name", ["a100-40", "a100-80", "b200", "h100", "h20", "h200", "v100-dgx1"])
def test_links_of_gpus_are_no_peaks(name):
    """The data sheets' numbers, which the sources quote, are more than messages reach."""
    machine, _ = hardware.load(name)
    vendor = machine.sources["vendor"]
    nvlink = float(re.search(r"NVLink \d at (\d+) GB/s", vendor)[1])
    pcie = float(re.search(r"PCIe \d.0 x16 at (\d+) GB/s", vendor)[1])
    assert machine.scale_up.bandwidth.value == pytest.approx(0.82e9 * nvlink, rel=0.01)
    assert 0.8 <= machine.host.bandwidth.value / (1e9 * pcie) <= 0.88
    if machine.scale_out is not None:
        port = float(re.search(r"one (\d+) Gbit/s", machine.sources["network"])[1])
        assert 0.92 <= machine.scale_out.bandwidth.value / (port / 8 * 1e9) <= 0.96


def test_metro_decides_longer_over_more_experts():
    """Between the shapes that its kernel was compiled for, and as fast as the nearest beyond."""
    machine, _ = hardware.load("b200")
    times = [machine.decide_us("metro", experts) for experts in (8, 64, 128, 192, 256, 1024)]
    assert times == pytest.approx([9.87, 9.87, 11.22, (11.22 + 18.4) / 2, 18.4, 51.3])
    assert machine.decide_us("first_copy", 128) == machine.decide_us("eplb", 256) == 3
    cpu, _ = hardware.load("cpu-amx")
    assert cpu.decide_us("metro", 64) == cpu.decide_us("metro", 256) > 0


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(BalancerError, match=r"a100-40, a100-80, b200"):
        hardware.load("tpu")
    with pytest.raises(BalancerError, match="deepseek-v3"):
        models.load("no/such/file.toml")


def damaged(tmp_path, kind, name, old, new):
    text = (catalogue.folder(kind) / f"{name}.toml").read_text()
    assert old in text
    file = tmp_path / "damaged.toml"
    file.write_text(text.replace(old, new, 1))
    return str(file)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('unit = "byte/s"', 'unit = "GB/s"', "byte/s"),
        ('source = "vendor"', 'source = "hearsay"', "hearsay"),
        ("vendor =", "vendors =", "vendor"),
        ('kind = "vllm-balance hardware"', 'kind = "vllm-balance model"', "kind"),
        ("format = 1", "format = 2", "format"),
        ("[scale_up]", "[scale_sideways]", "scale_up"),
        ("value = 3.35e12", "value = -1", "greater"),
        ("value = 3.35e12", "value = nan", "finite"),
        ("value = 3.35e12", 'value = "3.35e12"', "number"),
        ("expert_compute = { value = 0.47", "expert_compute = { value = 1.47", "less"),
        ("ranks_per_node = { value = 8", "ranks_per_node = { value = 0", "at least 1"),
        ("eplb = {", "elpb = {", "eplb"),
        ("float16 = {", "bfloat17 = {", "bfloat17"),
        ("format = 1", "format = 1\nmachine = ''", "machine"),
        ("format = 1", "format = 1\nmachine = 4", "machine"),
        ("request_beside", "request_behind", "request_beside"),
        ("request_beside = { value = 0", "request_beside = { value = -1", "greater"),
        ("[host]", "[hosts]", "hosts"),
        ("[engine]", "[engines]", "engine"),
        ("sequences = { value = 1024", "sequences = { value = 8192", "more tokens than requests"),
        ("sequences = { value = 1024", "sequences = { value = 0", "at least one request"),
        ("format = 1", "format = ", "no TOML"),
        ("format = 1", "format = 1\nprofile = 'gone.json'", "cannot be read"),
        ("format = 1", "format = 1\nother_profiles = ['gone.json']", "stands for all other"),
    ],
)
def test_damaged_hardware_files_are_refused(tmp_path, old, new, reason):
    with pytest.raises(BalancerError, match=reason):
        hardware.load(damaged(tmp_path, "hardware", "h100", old, new))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("top_k = { value = 8", "top_k = { value = 800", "top_k"),
        ("num_dense_layers = { value = 0", "num_dense_layers = { value = 48", "experts"),
        ("hidden = { value = 2048", "hidden = { value = 0", "hidden"),
        ("hidden = { value = 2048", "hidden = { value = 2048.5", "hidden"),
        ("num_kv_heads = { value = 4", "num_kv_heads = { value = 0", "num_kv_heads must be"),
        ("head_dim = { value = 128", "head_dim = { value = 0", "head_dim must be"),
        ("top_k =", "num_groups = { value = 3, unit = '1', source = 'config' }\ntop_k =", "divide"),
        ('expert_number = "float16"', 'expert_number = "int3"', "expert_number"),
        ("num_heads", "num_hats", "num_heads"),
        ('support = "eplb"', 'support = "yes"', "support"),
        ("architecture", "architect", "architecture"),
    ],
)
def test_damaged_model_files_are_refused(tmp_path, old, new, reason):
    with pytest.raises(BalancerError, match=reason):
        models.load(damaged(tmp_path, "model", "qwen3-30b-a3b", old, new))


def test_a_model_has_the_profile_of_experts_as_large_as_its_own(tmp_path):
    first = Path(catalogue.folder("hardware") / "cpu-amx.profile.json")
    wide = json.loads(first.read_text())
    wide["shape"]["inner"] = 3072
    (tmp_path / "here.wide.profile.json").write_text(json.dumps(wide))
    (tmp_path / "cpu-amx.profile.json").write_text(first.read_text())
    text = (catalogue.folder("hardware") / "cpu-amx.toml").read_text()
    own = [line for line in text.splitlines() if not line.startswith("other_profiles")]
    path = tmp_path / "here.toml"
    path.write_text("\n".join(["other_profiles = ['here.wide.profile.json']", *own]))
    qwen3 = models.load("qwen3-30b-a3b")

    def inner(model=None):
        return hardware.load(str(path), model)[1].shape.inner

    assert inner(qwen3) == inner() == 768
    assert inner(qwen3.with_counts(inner=3072)) == 3072
    assert inner(qwen3.with_counts(inner=1408)) == 768
    in_float32 = qwen3.with_counts(inner=3072).model_copy(update={"expert_number": "float32"})
    assert inner(in_float32) == 768


def test_missing_arithmetic_is_refused_by_name():
    machine, _ = hardware.load("a100-80")
    with pytest.raises(BalancerError, match="no float8 arithmetic"):
        machine.peak("float8")


def test_the_published_errors_are_those_of_the_committed_rows():
    rows = read(ROOT / "bench" / "results" / "validation.jsonl")
    found = validity.load()
    for part, kind in (("profiled", "pair"), ("roofline", "published ratio")):
        counted = (
            row
            for row in rows
            if row["kind"] == kind and not row.get("kept") and row.get("profiled", True)
        )
        own = sorted(abs(row["error"]) for row in counted)
        errors = getattr(found, part)
        assert errors.points.value == len(own)
        assert errors.mean.value == round(sum(own) / len(own), 3)
        assert sum(error > errors.one_in_ten.value + 5e-4 for error in own) <= len(own) / 10


def test_a_machine_has_the_error_of_its_kind():
    """Of measured times where a profile is of the model's experts, else of data sheets."""
    found = validity.load()
    _, profile = hardware.load("cpu-amx")
    known, other = models.load("qwen3-30b-a3b"), models.load("mixtral-8x7b")
    assert found.of(profile, known) == found.profiled
    assert found.of(profile, other) == found.roofline
    assert found.of(None, known) == found.roofline
