"""Shapes of models from their config.json."""

import json
from pathlib import Path

import pytest

from vllm_balance import model_shape
from vllm_balance.errors import BalancerError

QWEN = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_hidden_layers": 48,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "torch_dtype": "bfloat16",
}


def shape_of(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return model_shape.from_config(tmp_path)


def test_the_expert_s_inner_size_goes_before_the_dense_one(tmp_path):
    shape = shape_of(tmp_path, QWEN)
    assert (shape.num_layers, shape.num_experts, shape.top_k) == (48, 128, 8)
    assert (shape.hidden, shape.inner, shape.dtype) == (2048, 768, "bfloat16")
    assert model_shape.from_config(tmp_path / "config.json") == shape


def test_other_names_and_nested_text_models_are_read(tmp_path):
    mixtral = {**QWEN, "num_local_experts": 8, "intermediate_size": 14336}
    del mixtral["num_experts"], mixtral["moe_intermediate_size"]
    shape = shape_of(tmp_path, {"text_config": mixtral, "architectures": ["X"]})
    assert (shape.num_experts, shape.inner, shape.architecture) == (8, 14336, "X")


def test_ernies_names_are_read(tmp_path):
    ernie = {**QWEN, "moe_num_experts": 64, "moe_k": 6}
    del ernie["num_experts"], ernie["num_experts_per_tok"]
    shape = shape_of(tmp_path, ernie)
    assert (shape.num_experts, shape.top_k) == (64, 6)


def test_a_wrong_value_is_explained_in_a_paragraph(tmp_path):
    with pytest.raises(BalancerError, match=r"`num_experts` .it is 'many'.: .* valid int") as no:
        shape_of(tmp_path, {**QWEN, "num_experts": "many"})
    assert "\n" not in str(no.value) and "http" not in str(no.value)


@pytest.mark.parametrize(
    "config", [{}, [], 3, {**QWEN, "num_experts": None}, {**QWEN, "num_experts": "many"},
               {**QWEN, "hidden_size": 0}, {**QWEN, "torch_dtype": 5}]
)  # fmt: skip
def test_what_is_no_moe_model_is_refused(tmp_path, config):
    with pytest.raises(BalancerError, match=r"config\.json"):
        shape_of(tmp_path, config)


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A model in Hugging Face's cache, as a download leaves it; its folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--tiny-moe"
    snapshot = repository / "snapshots" / "0123abc"
    for folder in ("refs", "blobs", "snapshots/0123abc"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abc")
    (repository / "blobs" / "77").write_text(json.dumps(QWEN))
    (snapshot / "config.json").symlink_to("../../blobs/77")
    return snapshot


def test_a_model_is_found_by_its_name_on_hugging_face(cached):
    shape = model_shape.from_config("org/tiny-moe")
    assert (shape.name, shape.num_experts) == ("org/tiny-moe", 128)
    for same in (Path("org/tiny-moe"), cached, cached / "config.json"):
        assert model_shape.from_config(same) == shape


def test_a_folder_goes_before_a_name(cached, tmp_path, monkeypatch):
    (tmp_path / "org" / "tiny-moe").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    shape_of(Path("org/tiny-moe"), QWEN | {"num_experts": 4})
    found = model_shape.from_config("org/tiny-moe")
    assert (found.name, found.num_experts) == ("tiny-moe", 4)


@pytest.mark.parametrize("name", ["org/other", "org/a/b", "..x", "/lost/model"])
def test_a_model_that_is_nowhere_says_where_it_was_looked_for(cached, name):
    with pytest.raises(BalancerError) as refused:
        model_shape.from_config(name)
    said = str(refused.value)
    assert f"The model {name} cannot be read: there is no such folder or file" in said
    assert "Hugging Face's cache (nothing is downloaded)" in said and "hf download" in said


def test_moe_layers_of_a_file(tmp_path):
    for config, layers in (
        (QWEN, tuple(range(48))),
        (QWEN | {"num_hidden_layers": 4, "first_k_dense_replace": 1}, (1, 2, 3)),
        ({"text_config": QWEN | {"num_hidden_layers": 3, "mlp_only_layers": [1]}}, (0, 2)),
    ):
        shape_of(tmp_path, config)
        assert model_shape.layers_of(tmp_path) == layers
    shape_of(tmp_path, QWEN | {"mlp_only_layers": 5})
    with pytest.raises(BalancerError, match="which layers are MoE layers"):
        model_shape.layers_of(tmp_path)


def test_files_that_are_missing_or_no_json_are_refused(tmp_path):
    with pytest.raises(BalancerError, match="cannot be read"):
        model_shape.from_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff{")
    with pytest.raises(BalancerError, match="not valid JSON"):
        model_shape.from_config(tmp_path)
