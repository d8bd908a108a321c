"""Hardware and model files: those of the catalogue are usable, damaged ones are refused."""

import pytest

from vllm_balance.errors import BalancerError
from vllm_balance.simulate import catalogue, hardware, models, validity


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
    total = experts + model.dense_bytes / model.dense_weight.value
    assert total / 1e9 == pytest.approx(billions, rel=0.01)
    assert model.num_moe_layers == active_layers


def test_deepseek_caches_its_latent_only():
    model = models.load("deepseek-v3")
    assert model.cache_width == 576
    assert model.cache_bytes_per_token == 61 * 576 * 2
    assert models.load("qwen3-30b-a3b").cache_width == 2 * 4 * 128


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
        ("request_ahead", "request_behind", "request_ahead"),
        ("request_ahead = { value = 0", "request_ahead = { value = -1", "greater"),
        ("[host]", "[hosts]", "hosts"),
        ("format = 1", "format = ", "no TOML"),
        ("format = 1", "format = 1\nprofile = 'gone.json'", "cannot be read"),
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
        ('expert_number = "float16"', 'expert_number = "int3"', "expert_number"),
        ("num_heads", "num_hats", "num_heads"),
    ],
)
def test_damaged_model_files_are_refused(tmp_path, old, new, reason):
    with pytest.raises(BalancerError, match=reason):
        models.load(damaged(tmp_path, "model", "qwen3-30b-a3b", old, new))


def test_missing_arithmetic_is_refused_by_name():
    machine, _ = hardware.load("a100-80")
    with pytest.raises(BalancerError, match="no float8 arithmetic"):
        machine.peak("float8")


def test_the_published_error_is_there():
    found = validity.load()
    assert found.points.value > 0 and 0 < found.gain_error.value < 0.5
