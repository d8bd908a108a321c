"""Every test here starts and ends with an untouched vLLM."""

import json

import pytest

from vllm_balance import seams
from vllm_balance.commands.doctor import all_seams
from vllm_balance.seams.arguments import REFUSING_SEAMS

EVERY_SEAM = (*all_seams(), *REFUSING_SEAMS)

QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 256,
    "vocab_size": 128,
}
QWEN3 = {
    key: value for key, value in QWEN3_MOE.items() if "expert" not in key and "moe" not in key
} | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}


@pytest.fixture(autouse=True)
def untouched_vllm(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    # EngineArgs loads plugins once per process; here every test registers ours itself or not.
    monkeypatch.setattr("vllm.plugins.plugins_loaded", True)
    seams.uninstall(EVERY_SEAM)
    assert not seams._ORIGINALS
    yield
    seams.uninstall(EVERY_SEAM)


@pytest.fixture(scope="session")
def moe_model(tmp_path_factory) -> str:
    """A folder with the configuration of a mixture of experts; there are no weights to load."""
    return _model(tmp_path_factory.mktemp("moe"), QWEN3_MOE)


@pytest.fixture(scope="session")
def dense_model(tmp_path_factory) -> str:
    return _model(tmp_path_factory.mktemp("dense"), QWEN3)


def _model(folder, config) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)
