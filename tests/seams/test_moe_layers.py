"""Which layers have experts, and how large these are, by the configurations of model families."""

from types import SimpleNamespace

import pytest

from vllm_balance.model_shape import moe_layers
from vllm_balance.seams.read_deployment import _expert_weights

FAMILIES = {
    "qwen3_moe": ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, (1, 5)),
    "deepseek_v3": ({"first_k_dense_replace": 3, "moe_layer_freq": 1}, (3, 4, 5)),
    "deepseek_v2, every second": ({"first_k_dense_replace": 1, "moe_layer_freq": 2}, (2, 4)),
    "lfm2_moe": ({"num_dense_layers": 2}, (2, 3, 4, 5)),
    "ernie4_5_moe": ({"moe_layer_start_index": 1, "moe_layer_interval": 2}, (1, 3, 5)),
    "llama4": ({"moe_layers": [1, 3], "interleave_moe_layer_step": 2}, (1, 3)),
    "step3": ({"moe_layers_enum": "4,5"}, (4, 5)),
    "mimo_v2": ({"moe_layer_freq": [0, 1, 1, 1, 1, 1]}, (1, 2, 3, 4, 5)),
    "exaone_moe": ({"mlp_layer_types": ["dense"] + ["sparse"] * 5}, (1, 2, 3, 4, 5)),
    "nemotron_h": ({"hybrid_override_pattern": "ME*EM-"}, (1, 3)),
    "jamba": ({"expert_layer_period": 2, "expert_layer_offset": 1}, (1, 3, 5)),
    "mixtral": ({}, (0, 1, 2, 3, 4, 5)),
}


@pytest.mark.parametrize(("keys", "layers"), FAMILIES.values(), ids=FAMILIES)
def test_layers_with_experts(keys, layers):
    assert moe_layers(SimpleNamespace(num_hidden_layers=6, **keys)) == layers


def test_weights_of_an_expert():
    qwen = {"hidden_size": 64, "intermediate_size": 500, "moe_intermediate_size": 32}
    assert _expert_weights(SimpleNamespace(**qwen)) == 3 * 64 * 32
    assert _expert_weights(SimpleNamespace(hidden_size=64, intermediate_size=128)) == 3 * 64 * 128
    ungated = {"mlp_hidden_act": "relu2", "moe_latent_size": 16}
    assert _expert_weights(SimpleNamespace(**qwen, **ungated)) == 2 * 16 * 32


def test_experts_of_unknown_size_have_none():
    assert _expert_weights(SimpleNamespace(d_model=64, expert_intermediate_size=32)) == 3 * 64 * 32
    assert _expert_weights(SimpleNamespace(hidden_size=64)) == 0
    odd = {"hidden_size": 64, "moe_intermediate_size": "wide"}
    assert _expert_weights(SimpleNamespace(**odd)) == 0


def test_of_experts_of_two_sizes_the_larger_counts():
    """Ernie 4.5 VL's, of text and of pictures."""
    ernie = SimpleNamespace(hidden_size=64, moe_intermediate_size=[1536, 512])
    assert _expert_weights(ernie) == 3 * 64 * 1536
