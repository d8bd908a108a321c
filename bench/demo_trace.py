"""A trace of real routing for `[replay] trace = "demo"`: what the demo model's router chooses.

The demo model reads its own text once, with its own router; nothing is downloaded. Like the model
the trace is made once and cached beside it.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench import demo_model, demo_text

NUM_REQUESTS = 64
TOKENS_PER_REQUEST = 128


def ensure() -> Path:
    """The trace's file, made if needed: `topk_ids` uint8 [tokens, layers, top_k] and where from."""
    model = demo_model.ensure()
    path = model.parent / f"{model.name}-trace.npz"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                unfinished = Path(folder) / path.name
                np.savez_compressed(unfinished, **record(model))
                os.replace(unfinished, path)
    return path


@torch.no_grad()
def record(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of the trace: NUM_REQUESTS texts of TOKENS_PER_REQUEST tokens each."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = "".join(demo_text.documents(seed=1)[:400])
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[0]
    inputs = tokens[: NUM_REQUESTS * TOKENS_PER_REQUEST].view(NUM_REQUESTS, TOKENS_PER_REQUEST)
    top_k = model.config.num_experts_per_tok
    logits = model(input_ids=inputs, output_router_logits=True).router_logits
    chosen = torch.stack([layer.topk(top_k).indices for layer in logits], dim=1)
    token = np.arange(len(chosen))
    return {
        "topk_ids": chosen.numpy().astype(np.uint8),
        "num_experts": np.array(model.config.num_experts),
        "top_k": np.array(top_k),
        "request_id": token // TOKENS_PER_REQUEST,
        "position": token % TOKENS_PER_REQUEST,
    }
