"""Batches for the schedules: counts of one layer from the papers' skew model and from traces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vllm_balance import traces
from vllm_balance.replay_rows import Hot, ReplaySettings, draw

BATCHES = 64
BATCH_TOKENS = 4096
SKEWS = ((0.0, 10), (0.5, 1), (0.9, 1), (0.5, 10), (0.9, 10))
"""Share of the pairs that goes to the hot experts, and their number."""
CHANGES = (None, 4, 1)
"""Batches after which other experts, all at home on one rank, are hot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Counts of one layer, batch by batch, and what was recorded before them."""

    name: str
    top_k: int
    fit_NE: np.ndarray
    """What placements may look at."""
    counts_NE: np.ndarray
    trace: tuple[traces.Trace, int] | None = None
    """The half of a trace to fit on and the position of the layer; None for the skew model."""

    @property
    def num_experts(self) -> int:
        return self.counts_NE.shape[1]


def skewed(num_ranks: int, seed: int) -> Iterator[Load]:
    """The skew model: experts of one rank are hot; one hot expert needs a top-1 model, as Switch.

    128 experts, 256 on 16 ranks so that ten of them fit on one."""
    num_experts = 256 if num_ranks > 8 else 128
    for alpha, hot in SKEWS:
        for change in CHANGES if alpha else (None,):
            top_k = 1 if hot == 1 else 8
            source = {"hot": Hot(experts=hot, fraction=alpha)} if alpha else {"zipf": 0.0}
            settings = ReplaySettings(**source, seed=seed, rows=BATCH_TOKENS * 8)
            ids_NK = draw(settings, 1, num_experts, top_k, 0)[0].numpy()
            rng = np.random.default_rng(seed)
            rows_NB = rng.integers(0, len(ids_NK), (2 * BATCHES, BATCH_TOKENS * num_ranks // 2))
            counts_NE = np.stack([
                np.bincount(
                    hot_first(num_experts, num_ranks, 0 if change is None else 1 + n // change)[
                        ids_NK[rows].ravel()
                    ],
                    minlength=num_experts,
                )
                for n, rows in enumerate(rows_NB)
            ])  # fmt: skip
            when = "steady" if change is None else f"new every {change}"
            yield Load(
                name=f"alpha {alpha} on {hot}, {when}" if alpha else "alpha 0",
                top_k=top_k,
                fit_NE=counts_NE[:BATCHES],
                counts_NE=counts_NE[BATCHES:],
            )


def hot_first(num_experts: int, num_ranks: int, phase: int) -> np.ndarray:
    """Which expert is hottest, second ... in a phase: those of one rank come first, [E]."""
    rng = np.random.default_rng((num_experts, num_ranks, phase))
    names_E = rng.permutation(num_experts)
    is_far_E = names_E // (num_experts // num_ranks) != rng.integers(num_ranks)
    return names_E[np.argsort(is_far_E, kind="stable")]


def recorded(folder: Path, seed: int) -> Iterator[Load]:
    """The middle layer of every trace with ids: prefill batches of requests one after another."""
    for path in sorted(folder.glob("*.npz")):
        trace = traces.load(path)
        if trace.topk_ids_TLK is None or len(trace.topk_ids_TLK) < BATCH_TOKENS:
            continue
        first, second = trace.split(seed)
        layer = trace.num_layers // 2
        yield Load(
            name=trace.name,
            top_k=trace.top_k,
            fit_NE=first.prefill_steps(BATCH_TOKENS, BATCHES, seed)[:, layer],
            counts_NE=second.prefill_steps(BATCH_TOKENS, BATCHES, seed + 1)[:, layer],
            trace=(first, layer),
        )
