"""A model with layers of real size and no weights, for `vllm serve --load-format dummy`.

    python -m bench.real_size_model [--preset NAME] [--num-layers N] [--dtype float32]

A folder with config.json and the demo model's tokenizer: few layers, a small vocabulary, so that
the MoE layers dominate as they do in the full model. Its router is random; drive it with
vllm_balance.replay. The output is meaningless, and equal between two runs only if greedy.
"""

import hashlib
import importlib.metadata
import json
import tempfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import typer
from filelock import FileLock
from transformers import Qwen3MoeConfig

from bench import demo_model, demo_text
from bench.provenance import cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The shape of a Qwen3-MoE; the defaults are the layers of Qwen3-30B-A3B.

    One expert has 3 * hidden * inner weights: 9.4 MB in bfloat16 with the defaults, 1.2 GB a layer.
    On a CPU without 16-bit arithmetic take float32: bfloat16 products of attention are so slow
    there that they hide the experts.
    """

    num_layers: int = 3
    num_experts: int = 128
    top_k: int = 8
    hidden: int = 2048
    inner: int = 768
    num_heads: int = 32
    num_kv_heads: int = 4
    head_dim: int = 128
    vocabulary: int = 4096
    max_tokens: int = 8192
    dtype: str = "bfloat16"


DTYPES = ("bfloat16", "float32")
PRESETS = {
    "qwen3-30b-a3b": Shape(),
    # The same experts beside a sixth of the attention: 92 % of a token's multiplications are the
    # experts' instead of 67 %, as in models with wider experts, at no more memory.
    "moe-heavy": Shape(num_heads=8, head_dim=64),
    # One expert per token, as in Switch: nine tenths of the tokens can go to one expert.
    "switch": Shape(num_heads=8, head_dim=64, top_k=1, inner=3072, num_experts=32),
    # The experts of DeepSeek-V2-Lite, top-6 of 64, beside as little attention.
    "v2-lite-experts": Shape(num_experts=64, top_k=6, inner=1408, num_heads=8, head_dim=64),
}


def ensure(preset: str = "qwen3-30b-a3b", **changes: int | str) -> Path:
    """The folder of a model of this preset with some fields of its Shape changed, made if needed.

    Raises ValueError for an unknown preset or field, or a shape that cannot be served.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; there are {', '.join(PRESETS)}")
    known = [field.name for field in fields(Shape)]
    unknown = sorted(changes.keys() - set(known))
    if unknown:
        raise ValueError(f"a shape has no {', '.join(unknown)}; it has {', '.join(known)}")
    shape = replace(PRESETS[preset], **changes)
    check(shape)
    folder = cached_folder(shape)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            build(shape, folder)
    return folder


def check(shape: Shape) -> None:
    """Raise ValueError, naming the fields, if vLLM's CPU kernels cannot run this shape."""
    if shape.dtype not in DTYPES:
        raise ValueError(f"dtype must be {' or '.join(DTYPES)}, got {shape.dtype!r}")
    for name, value in asdict(shape).items():
        if name != "dtype" and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if shape.top_k > shape.num_experts:
        raise ValueError(f"top_k={shape.top_k} is more than num_experts={shape.num_experts}")
    if shape.num_heads % shape.num_kv_heads:
        raise ValueError(
            f"num_heads={shape.num_heads} must be a multiple of num_kv_heads={shape.num_kv_heads}"
        )
    for name in ("hidden", "inner", "head_dim"):
        if getattr(shape, name) % 32:
            raise ValueError(f"{name} must be a multiple of 32, got {getattr(shape, name)}")


def cached_folder(shape: Shape) -> Path:
    """Where `ensure` keeps the model of this shape."""
    digest = hashlib.sha256(json.dumps(asdict(shape), sort_keys=True).encode())
    for script in (__file__, demo_model.__file__, demo_text.__file__):
        digest.update(Path(script).read_bytes())
    for library in ("transformers", "tokenizers"):
        digest.update(importlib.metadata.version(library).encode())
    return cache() / f"real-size-model-{digest.hexdigest()[:12]}"


def build(shape: Shape, folder: Path) -> None:
    """Write configuration and tokenizer; `folder` appears in one step."""
    tokenizer = demo_model.train_tokenizer(demo_text.documents(seed=0), shape.vocabulary)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".real-size-model-") as name:
        unfinished = Path(name) / "model"
        configuration(shape).save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(folder)


def configuration(shape: Shape) -> Qwen3MoeConfig:
    """The configuration that vLLM serves as Qwen3MoeForCausalLM."""
    return Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        dtype=shape.dtype,
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        moe_intermediate_size=shape.inner,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        max_position_embeddings=shape.max_tokens,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=2,
    )


def main(
    preset: Annotated[str, typer.Option(help=f"One of: {', '.join(PRESETS)}.")] = "qwen3-30b-a3b",
    num_layers: Annotated[int, typer.Option(min=1)] = 3,
    dtype: Annotated[str, typer.Option(help=f"One of: {', '.join(DTYPES)}.")] = DTYPES[0],
) -> None:
    """Make the model unless it exists, and print its folder."""
    typer.echo(ensure(preset, num_layers=num_layers, dtype=dtype))


if __name__ == "__main__":
    typer.run(main)
