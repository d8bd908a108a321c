"""Training of the demo model: recipe, architecture, loop, and how skewed the routing became."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM


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
    # Little enough to be read more than twice: the model learns phrases, not only words.
    text_characters: int = 400_000
    steps: int = 480
    warmup_steps: int = 40
    batch: int = 4
    sequence_tokens: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    # A second thread saves 30 % of the time on an idle machine. Beside other work both spend more
    # than half of their time spinning in wait of each other.
    num_threads: int = 1


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
    columns = (
        TextColumn("training the demo model"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not show_progress) as progress:
        task = progress.add_task("", total=recipe.steps, note="")
        for inputs in batches(recipe, tokens):
            outputs = model(
                input_ids=inputs, labels=inputs, output_router_logits=True, use_cache=False
            )
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


def batches(recipe: Recipe, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
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
def router_report(
    model: Qwen3MoeForCausalLM, tokens: torch.Tensor, recipe: Recipe
) -> dict[str, list[float]]:
    """Per layer, how skewed routing is: tokens of the busiest expert / mean, and the entropy of
    the experts' shares (1 = even, 0 = one expert only)."""
    inputs = tokens[: len(tokens) // recipe.sequence_tokens * recipe.sequence_tokens]
    outputs = model(input_ids=inputs.view(-1, recipe.sequence_tokens), output_router_logits=True)
    busiest, entropy = [], []
    for logits in outputs.router_logits:
        chosen = logits.topk(recipe.top_k).indices.flatten()
        share = torch.bincount(chosen, minlength=recipe.num_experts) / len(chosen)
        busiest.append(round((share.max() * recipe.num_experts).item(), 3))
        nats = torch.special.entr(share).sum().item()
        entropy.append(round(nats / torch.tensor(recipe.num_experts).log().item(), 4))
    return {"busiest_over_mean": busiest, "normalised_entropy": entropy}
