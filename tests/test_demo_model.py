"""The demo model: trained, served by stock classes, reproducible, and never half there."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeForCausalLM

from bench import demo_model, demo_text, demo_training
from bench.demo_training import Recipe

TINY = Recipe(
    vocabulary=300,
    num_layers=1,
    hidden=32,
    inner=32,
    num_experts=4,
    top_k=2,
    head_dim=32,
    num_heads=2,
    num_kv_heads=1,
    steps=12,
    warmup_steps=2,
    batch=2,
    sequence_tokens=16,
)


@pytest.fixture(scope="session")
def folder() -> Path:
    """The cached model; trained now, once per machine, if it is not there."""
    return demo_model.ensure()


@pytest.fixture(scope="module")
def report(folder: Path) -> dict:
    return json.loads((folder / demo_model.REPORT).read_text())


@pytest.fixture(scope="module")
def model(folder: Path) -> Qwen3MoeForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = ["The quick brown fox jumps over the lazy dog." + demo_text.TEXT_END] * 40
    monkeypatch.setattr(demo_text, "documents", lambda seed, characters: documents)


# Training takes under 3 minutes of a free core, and longer when cores are shared.
@pytest.mark.timeout(1800)
def test_training_lowered_the_loss(report: dict) -> None:
    """From guessing (ln 4096 = 8.3 nats) to less than half the uncertainty, in nats per token."""
    assert report["first_loss"] == pytest.approx(8.32, abs=0.2)
    assert report["last_loss"] < report["first_loss"] - 3.5


def test_the_saved_model_predicts_text_as_well_as_training_said(
    model: Qwen3MoeForCausalLM, folder: Path, report: dict
) -> None:
    recipe = Recipe()
    text = "".join(demo_text.documents(recipe.seed, recipe.text_characters)[:60])
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[:, :1024]
    windows = tokens[:, : tokens.shape[1] // 128 * 128].view(-1, 128)
    with torch.no_grad():
        loss = model(input_ids=windows, labels=windows).loss.item()
    assert loss < report["last_loss"] + 0.5


def test_routing_is_skewed_and_no_layer_has_collapsed(report: dict) -> None:
    router = report["router"]
    assert len(router["busiest_over_mean"]) == 4
    assert all(1.2 < ratio < 8 for ratio in router["busiest_over_mean"])
    assert all(0.6 < entropy < 0.99 for entropy in router["normalised_entropy"])


def test_the_text_is_made_of_words(model: Qwen3MoeForCausalLM, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    known = set(" ".join(demo_text.documents(seed=0)).split())
    inputs = tokenizer(["The function returns", "A class is", "If the file"], padding=True)
    inputs = {name: torch.tensor(rows) for name, rows in inputs.items()}
    torch.manual_seed(0)
    outputs = model.generate(**inputs, max_new_tokens=32)
    words = tokenizer.batch_decode(outputs, skip_special_tokens=True)
    words = " ".join(words).split()
    assert len(words) > 25
    assert sum(word in known for word in words) > 0.8 * len(words)


def test_shapes_divide_over_two_and_four_ranks(model: Qwen3MoeForCausalLM) -> None:
    config = model.config
    for ranks in (2, 4):
        assert config.num_attention_heads % ranks == 0
        assert config.num_key_value_heads % ranks == 0
        assert config.num_experts * 3 // 2 % ranks == 0
    assert config.moe_intermediate_size % 32 == 0


def test_the_chat_template_renders_what_training_saw(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "What is ast?"}, {"role": "assistant", "content": "It"}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole == demo_text._turn("user", "What is ast?") + demo_text._turn("assistant", "It")
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert whole.startswith(prompt)
    ids = tokenizer(prompt).input_ids
    assert ids[0] == tokenizer.convert_tokens_to_ids(demo_text.TURN_START)
    assert tokenizer.decode(ids) == prompt


def test_generation_stops_at_the_end_of_a_turn_or_text(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stops = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_ids_to_tokens(stops) == [demo_text.TURN_END, demo_text.TEXT_END]


def test_a_second_call_trains_nothing_and_copies_on_request(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_model, "build", None)
    assert demo_model.ensure() == folder
    copy = tmp_path / "copy"
    for _ in range(2):
        assert demo_model.ensure(copy) == copy
    assert (copy / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_a_folder_of_something_else_is_not_touched(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is not this demo model"):
        demo_model.ensure(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_same_seed_gives_the_same_model(little_text: None, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        demo_model.build(replace(TINY, seed=seed), tmp_path / name, show_progress=False)
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "abc"}
    assert weights["a"] == weights["b"] != weights["c"]


def test_an_interrupted_build_leaves_nothing(
    little_text: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(tokenizer: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_model, "generation_config", interrupt)
    with pytest.raises(KeyboardInterrupt):
        demo_model.build(TINY, tmp_path / "model", show_progress=False)
    assert not list(tmp_path.iterdir())


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ValueError, match="more than sequence_tokens=16 tokens of text, found 10"):
        demo_training.train(TINY, torch.zeros(10, dtype=torch.int64))
