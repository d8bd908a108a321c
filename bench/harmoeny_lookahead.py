"""Look-ahead judged offline: which experts would have been in their slots before the batch.

Before a batch a predictor says how many tokens each expert will get; what a schedule for these
counts would fetch is fetched early. Then the batch comes. Predictors:

- none: only what the slots kept from the batches before;
- last batch: the counts of the batch before;
- average: an exponential average of the counts, 1/4 for the newest batch;
- affinity: the ids of the layer before in the *same* batch, times how often an expert of this layer
  followed one of that layer in the half of the trace that is not judged.

The next layer's router on the current hidden states needs hidden states, which traces do not have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.harmoeny_loads import BATCH_TOKENS, BATCHES
from vllm_balance import traces
from vllm_balance.kernels.rebalance import Rules, schedule
from vllm_balance.placement.exflow import affinities
from vllm_balance.types import DynamicSlots

Predictor = Callable[[int], np.ndarray | None]
"""Predicted counts [E] of batch n, None if there is nothing to go by."""


@dataclass(slots=True)
class Tally:
    """Experts, summed over batches."""

    wanted: int = 0
    """Foreign experts that got tokens."""
    late: int = 0
    """Those of them that had to be fetched while the batch ran."""
    early: int = 0
    """Fetched before the batch."""
    wasted: int = 0
    """Fetched before the batch and without tokens in it."""


def judge(counts_NE: np.ndarray, predict: Predictor, num_ranks: int, num_dynamic: int,
          rules: Rules) -> Tally:  # fmt: skip
    """All batches with one predictor."""
    tally = Tally()
    slots = DynamicSlots.empty(
        num_logical=counts_NE.shape[1], num_ranks=num_ranks, num_dynamic=num_dynamic
    )
    for n, tokens_E in enumerate(counts_NE):
        guess_E, early_SD = predict(n), None
        if guess_E is not None:
            guessed = schedule(_counts(guess_E), slots, rules)
            slots, early_SD = guessed.slots, guessed.fetch_SD
        found = schedule(_counts(tokens_E), slots, rules)
        late_SD, slots = found.fetch_SD, found.slots
        used_SD = found.slots.idle_SD == 0
        tally.wanted += int(used_SD.sum())
        tally.late += int((late_SD >= 0).sum())
        if early_SD is not None:
            early = early_SD >= 0
            tally.early += int(early.sum())
            tally.wasted += int((early & ~(used_SD & (late_SD < 0))).sum())
    return tally


def _counts(tokens_E: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.rint(tokens_E).astype(np.int32))[None]


def predictors(
    here_NE: np.ndarray, before_NE: np.ndarray, follows_EE: np.ndarray
) -> dict[str, Predictor]:
    """The predictors of one layer.

    Args:
        here_NE: counts of the layer, batch by batch.
        before_NE: counts of the layer before it, of the same batches.
        follows_EE: tokens that used expert e there and e' here, in the other half.
    """
    average_NE = np.zeros(here_NE.shape)
    for n in range(1, len(here_NE)):
        newest = here_NE[n - 1] - average_NE[n - 1]
        average_NE[n] = average_NE[n - 1] + (newest if n == 1 else newest / 4)
    next_EE = follows_EE / np.maximum(follows_EE.sum(1, keepdims=True), 1)
    affinity_NE = before_NE @ next_EE
    return {
        "none": lambda n: None,
        "last batch": lambda n: here_NE[n - 1] if n else None,
        "average": lambda n: average_NE[n] if n else None,
        "affinity": lambda n: affinity_NE[n],
    }


def lookahead_rows(folder: Path, ranks: tuple[int, ...], dynamic: tuple[int, ...],
                   rules: Rules, seed: int) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One row per trace, ranks and slots: every predictor on the middle layer."""
    for path in sorted(folder.glob("*.npz")):
        trace = traces.load(path)
        if trace.topk_ids_TLK is None or len(trace.topk_ids_TLK) < BATCH_TOKENS:
            continue
        first, second = trace.split(seed)
        layer = trace.num_layers // 2
        steps_NLE = second.prefill_steps(BATCH_TOKENS, BATCHES, seed + 1)
        follows_EE = affinities(first)[layer - 1]
        guesses = predictors(steps_NLE[:, layer], steps_NLE[:, layer - 1], follows_EE)
        for num_ranks in (ranks_ for ranks_ in ranks if trace.num_experts % ranks_ == 0):
            for num_dynamic in dynamic:
                if num_dynamic > trace.num_experts - trace.num_experts // num_ranks:
                    continue
                row: dict[str, Any] = {"kind": "lookahead", "load": trace.name, "S": num_ranks,
                                       "D": num_dynamic, "E": trace.num_experts}  # fmt: skip
                for name, predict in guesses.items():
                    tally = judge(steps_NLE[:, layer], predict, num_ranks, num_dynamic, rules)
                    row[name] = {key: getattr(tally, key)
                                 for key in ("wanted", "late", "early", "wasted")}  # fmt: skip
                yield row
