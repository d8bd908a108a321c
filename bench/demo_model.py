"""The demo model: a small Qwen3-MoE, trained here in a few minutes, that vLLM serves as it is.

    python -m bench.demo_model [--out DIR]

It exists so that the demo and the tests have *learned* routing (skewed as training left it) and text
that reads like English. It is built once per machine and set of versions, in the user's cache.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from bench import demo_text
from bench.demo_text import CHAT_TEMPLATE, TEXT_END, TURN_END, TURN_START

REPORT = "training.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides the trained weights, besides the versions of the libraries.

    Shapes: attention and key-value heads divide over 4 tensor-parallel ranks; 32 experts, and 48
    with a redundancy of 1.5, divide over 2 and 4 expert-parallel ranks.
    """

    seed: int = 0
    vocabulary: int = 4096
    num_layers: int = 4
    hidden: int = 256
    inner: int = 128
    num_experts: int = 32
    top_k: int = 4
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 64
    # Light: enough to keep experts alive, not enough to make routing even.
    balance_loss: float = 0.002
    steps: int = 480
    warmup_steps: int = 40
    batch: int = 8
    sequence_tokens: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    num_threads: int = 2


def ensure(out: Path | None = None) -> Path:
    """The folder of the trained model; trains it first if this machine has not done so yet.

    `out` defaults to the cache. The folder appears complete or not at all.
    """
    folder = out or cached_folder(Recipe())
    if not (folder / REPORT).exists():
        build(Recipe(), folder)
    return folder


def cached_folder(recipe: Recipe) -> Path:
    """Where `ensure` keeps the model of this recipe, these scripts and these library versions."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(json.dumps(asdict(recipe), sort_keys=True).encode())
    for script in (Path(__file__), Path(demo_text.__file__)):
        digest.update(script.read_bytes())
    for library in ("torch", "transformers", "tokenizers"):
        digest.update(importlib.metadata.version(library).encode())
    digest.update(platform.python_version().encode())
    return cache / "vllm-balance" / f"demo-model-{digest.hexdigest()[:12]}"


def build(recipe: Recipe, folder: Path, *, show_progress: bool = True) -> None:
    """Train and save model, tokenizer, chat template and REPORT; replaces `folder` in one step."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    texts = demo_text.documents(recipe.seed)
    tokenizer = train_tokenizer(texts, recipe.vocabulary)
    tokens = torch.tensor([t for ids in tokenizer(texts)["input_ids"] for t in ids])
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
        model.to(torch.bfloat16).save_pretrained(unfinished)
        generation_config(tokenizer).save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        (unfinished / REPORT).write_text(json.dumps(report, indent=2) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
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


def new_model(recipe: Recipe) -> Qwen3MoeForCausalLM:
    """The untrained model, float32, experts computed by grouped matrix products."""
    config = Qwen3MoeConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.inner,
        moe_intermediate_size=recipe.inner,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_kv_heads,
        head_dim=recipe.head_dim,
        num_experts=recipe.num_experts,
        num_experts_per_tok=recipe.top_k,
        norm_topk_prob=True,
        router_aux_loss_coef=recipe.balance_loss,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        # The tokenizer gives its special tokens the first ids, in this order.
        pad_token_id=0,
        eos_token_id=2,
    )
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    return model


def train(
    recipe: Recipe, tokens: torch.Tensor, *, show_progress: bool = False
) -> tuple[Qwen3MoeForCausalLM, list[float]]:
    """The trained model and the cross-entropy (nats per token) of every step.

    tokens: int64 [num_tokens], all documents after each other. The same recipe and tokens give the
    same weights on the same machine. Raises ValueError if the text is shorter than a sequence.
    """
    if len(tokens) <= recipe.sequence_tokens:
        raise ValueError(
            f"training needs more than sequence_tokens={recipe.sequence_tokens} tokens of text, "
            f"found {len(tokens)}"
        )
    threads_before = torch.get_num_threads()
    torch.set_num_threads(recipe.num_threads)
    torch.manual_seed(recipe.seed)
    model = new_model(recipe).train()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    kept = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": kept, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: learning_rate(recipe, s))
    losses: list[float] = []
    columns = (TextColumn("training the demo model"), BarColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeRemainingColumn(), disable=not show_progress) as progress:
        task = progress.add_task("", total=recipe.steps, note="")
        for inputs in batches(recipe, tokens):
            outputs = model(input_ids=inputs, labels=inputs, output_router_logits=True)
            outputs.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(outputs.loss.item() - recipe.balance_loss * outputs.aux_loss.item())
            progress.update(task, advance=1, note=f"loss {losses[-1]:.2f}")
    torch.set_num_threads(threads_before)
    return model.eval(), losses


def learning_rate(recipe: Recipe, step: int) -> float:
    """The fraction of the peak learning rate at `step`: linear warm-up, then linear to a 20th."""
    rising = (step + 1) / recipe.warmup_steps
    falling = (recipe.steps - step) / max(1, recipe.steps - recipe.warmup_steps)
    return min(1.0, rising, max(0.05, falling))


def batches(recipe: Recipe, tokens: torch.Tensor):
    """Yields int64 [batch, sequence_tokens], `steps` times: the text cut anew in every epoch."""
    random = torch.Generator().manual_seed(recipe.seed)
    length = recipe.sequence_tokens
    queue: list[torch.Tensor] = []
    for _ in range(recipe.steps):
        while len(queue) < recipe.batch:
            offset = int(torch.randint(0, length, (), generator=random)) % (len(tokens) - length)
            pieces = tokens[offset:].unfold(0, length, length)
            queue += pieces[torch.randperm(len(pieces), generator=random)].unbind()
        yield torch.stack([queue.pop() for _ in range(recipe.batch)])


@torch.no_grad()
def router_report(model: Qwen3MoeForCausalLM, tokens: torch.Tensor, recipe: Recipe) -> dict:
    """Per layer, how skewed routing is: tokens of the busiest expert / mean, and the entropy of
    the experts' shares (1 = even, 0 = one expert only)."""
    inputs = tokens[: len(tokens) // recipe.sequence_tokens * recipe.sequence_tokens]
    outputs = model(
        input_ids=inputs.view(-1, recipe.sequence_tokens), output_router_logits=True
    )
    busiest, entropy = [], []
    for logits in outputs.router_logits:
        chosen = logits.topk(recipe.top_k).indices.flatten()
        share = torch.bincount(chosen, minlength=recipe.num_experts) / len(chosen)
        busiest.append(round((share.max() * recipe.num_experts).item(), 3))
        nats = torch.special.entr(share).sum().item()
        entropy.append(round(nats / torch.tensor(recipe.num_experts).log().item(), 4))
    return {"busiest_over_mean": busiest, "normalised_entropy": entropy}


def main(
    out: Annotated[Path | None, typer.Option(help="Folder of the model; default: the cache.")] = None,
) -> None:
    """Train the demo model unless it exists, and print its folder."""
    typer.echo(ensure(out))


if __name__ == "__main__":
    typer.run(main)
