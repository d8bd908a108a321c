"""The real-size model: the shape of Qwen3-30B-A3B, readable by transformers, made once."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bench import demo_model, demo_text, real_size_model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a tokenizer from little text."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo_text, "documents", lambda seed: ["A few words."] * 9)
    return tmp_path


def parameters(folder: Path) -> dict[str, int]:
    """Number of weights of each part, without allocating any."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    sizes = {"experts": 0, "self_attn": 0, "embed": 0}
    for name, weight in model.named_parameters():
        for part in sizes:
            sizes[part] += weight.numel() if part in name else 0
    return sizes


def test_the_layers_are_those_of_qwen3_30b_a3b(cache: Path) -> None:
    folder = real_size_model.ensure()
    config = AutoConfig.from_pretrained(folder)
    assert config.architectures == ["Qwen3MoeForCausalLM"]
    assert (config.num_hidden_layers, config.num_experts_per_tok) == (3, 8)
    assert config.dtype == torch.bfloat16
    exact = real_size_model.ensure(num_layers=1, dtype="float32")
    assert AutoConfig.from_pretrained(exact).dtype == torch.float32
    sizes = parameters(folder)
    assert sizes["experts"] == 3 * 128 * 3 * 2048 * 768
    per_layer = 2048 * 4096 * 2 + 2 * 2048 * 512 + 2 * 128
    assert sizes["self_attn"] == 3 * per_layer
    assert sizes["embed"] < 0.01 * sizes["experts"]


def test_the_heavy_preset_spends_nine_tenths_of_a_token_on_experts(cache: Path) -> None:
    def share(preset: str) -> float:
        sizes = parameters(real_size_model.ensure(preset, num_layers=1))
        used = sizes["experts"] * 8 / 128
        return used / (used + sizes["self_attn"])

    assert share("moe-heavy") > 0.9
    assert 0.6 < share("qwen3-30b-a3b") < 0.7


def test_a_second_call_makes_nothing_and_other_shapes_live_elsewhere(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = real_size_model.ensure(num_layers=2)
    assert real_size_model.ensure(num_layers=1) != first
    monkeypatch.setattr(real_size_model, "build", None)
    assert real_size_model.ensure(num_layers=2) == first
    assert not list(cache.glob("**/.real-size-model-*"))


def test_the_tokenizer_fits_the_vocabulary_and_has_a_chat_template(cache: Path) -> None:
    folder = real_size_model.ensure(num_layers=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) <= AutoConfig.from_pretrained(folder).vocab_size
    assert tokenizer.decode(tokenizer.encode("A few words.")) == "A few words."
    assert tokenizer.chat_template == demo_text.CHAT_TEMPLATE
    assert tokenizer.eos_token_id == AutoConfig.from_pretrained(folder).eos_token_id
    assert tokenizer.eos_token == demo_model.TURN_END


@pytest.mark.parametrize(
    ("preset", "changes", "message"),
    [
        ("qwen4", {}, "unknown preset 'qwen4'; there are qwen3-30b-a3b, moe-heavy"),
        ("moe-heavy", {"layers": 3}, "a shape has no layers; it has num_layers"),
        ("moe-heavy", {"num_layers": 0}, "num_layers must be at least 1"),
        ("moe-heavy", {"top_k": 129}, "top_k=129 is more than num_experts=128"),
        ("moe-heavy", {"inner": 100}, "inner must be a multiple of 32"),
        ("moe-heavy", {"num_heads": 6}, "multiple of num_kv_heads=4"),
        ("moe-heavy", {"dtype": "float16"}, "dtype must be bfloat16 or float32, got 'float16'"),
    ],
)
def test_shapes_that_cannot_be_served_are_refused(
    cache: Path, preset: str, changes: dict[str, int | str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        real_size_model.ensure(preset, **changes)
