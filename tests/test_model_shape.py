"""Shapes of models from their config.json."""

import json

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


@pytest.mark.parametrize(
    "config", [{}, [], 3, {**QWEN, "num_experts": None}, {**QWEN, "num_experts": "many"},
               {**QWEN, "hidden_size": 0}, {**QWEN, "torch_dtype": 5}]
)  # fmt: skip
def test_what_is_no_moe_model_is_refused(tmp_path, config):
    with pytest.raises(BalancerError, match=r"config\.json"):
        shape_of(tmp_path, config)


def test_files_that_are_missing_or_no_json_are_refused(tmp_path):
    with pytest.raises(BalancerError, match="cannot be read"):
        model_shape.from_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff{")
    with pytest.raises(BalancerError, match="not valid JSON"):
        model_shape.from_config(tmp_path)
