"""The demo model: a small Qwen3-MoE, trained here in a few minutes, that vLLM serves as it is.

    python -m bench.demo_model [--out DIR]

It exists so that the demo and the tests have *learned* routing (skewed as training left it)
and text that reads like English. It is built once per machine and set of versions, in the cache.
"""

import hashlib
import importlib.metadata
import json
import platform
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from bench import demo_text, demo_training
from bench.demo_text import CHAT_TEMPLATE, TEXT_END, TURN_END, TURN_START
from bench.demo_training import Recipe, router_report, train
from bench.provenance import cache

REPORT = "training.json"


def ensure(out: Path | None = None) -> Path:
    """The folder of the trained model; trains it first if this machine has not done so yet.

    The model lives in the cache, complete or not at all; `out` asks for a copy of it elsewhere.
    Raises ValueError if `out` holds something other than this model.
    """
    cached = cached_folder(Recipe())
    with FileLock(f"{cached}.lock"):
        if not cached.exists():
            build(Recipe(), cached)
    return copy_model(cached, out) if out else cached


def copy_model(cached: Path, out: Path) -> Path:
    """`out`, now a copy of `cached`. Raises ValueError if it holds something else."""
    if not out.exists():
        shutil.copytree(cached, out)
    elif (out / REPORT).exists() and (out / REPORT).read_text() == (cached / REPORT).read_text():
        pass
    else:
        raise ValueError(
            f"{out} exists and is not this demo model: name a folder that does not exist"
        )
    return out


def cached_folder(recipe: Recipe) -> Path:
    """Where `ensure` keeps the model of this recipe, these scripts and these library versions."""
    digest = hashlib.sha256(json.dumps(asdict(recipe), sort_keys=True).encode())
    for script in (__file__, demo_text.__file__, demo_training.__file__):
        digest.update(Path(script).read_bytes())
    for library in ("torch", "transformers", "tokenizers"):
        digest.update(importlib.metadata.version(library).encode())
    digest.update(platform.python_version().encode())
    return cache() / f"demo-model-{digest.hexdigest()[:12]}"


def build(recipe: Recipe, folder: Path, *, show_progress: bool = True) -> None:
    """Train, then save model, tokenizer, chat template and REPORT; `folder` appears in one step."""
    started = time.monotonic()
    texts = demo_text.documents(recipe.seed, recipe.text_characters)
    tokenizer = train_tokenizer(texts, recipe.vocabulary)
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts)
    tokens = torch.tensor([token for text in encoded for token in text.ids])
    model, losses = train(recipe, tokens, show_progress=show_progress)
    report = {
        "recipe": asdict(recipe),
        "text_tokens": len(tokens),
        "trained_tokens": recipe.steps * recipe.batch * recipe.sequence_tokens,
        "first_loss": losses[0],
        "last_loss": sum(losses[-20:]) / len(losses[-20:]),
        "router": router_report(model, tokens[: 16 * recipe.sequence_tokens], recipe),
        "seconds": round(time.monotonic() - started, 1),
    }
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".demo-model-") as name:
        unfinished = Path(name) / "model"
        disable_progress_bar()
        model.to(torch.bfloat16).save_pretrained(unfinished)
        generation_config(tokenizer).save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        (unfinished / REPORT).write_text(json.dumps(report, indent=2) + "\n")
        unfinished.rename(folder)


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `vocabulary` entries with the chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[TEXT_END, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=TURN_END, pad_token=TEXT_END, model_max_length=2048
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def generation_config(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """Stop at the end of a turn or of a text; sample by default as a small model needs it."""
    turn_end, text_end = tokenizer.convert_tokens_to_ids([TURN_END, TEXT_END])
    return GenerationConfig(
        eos_token_id=[turn_end, text_end],
        pad_token_id=text_end,
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
    )


def main(
    out: Annotated[
        Path | None, typer.Option(help="Folder of the model; default: the cache.")
    ] = None,
) -> None:
    """Train the demo model unless it exists, and print its folder."""
    typer.echo(ensure(out))


if __name__ == "__main__":
    typer.run(main)
