"""Which tokens are in which step: continuous batching with chunked prefill, as vLLM schedules.

In a step every request that decodes gets one token; what is left of the token budget goes to
prompts, first come first served. None of this depends on how long steps take, so the steps are
known before their times.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_balance.simulate.steady import steady
from vllm_balance.simulate.steps import NO_WINDOW, Load, Steps, cache_use

Array = np.ndarray[Any, np.dtype[Any]]
_NAMES = ("decode", "prefill", "sampled", "attended", "reads", "window_attended", "window_reads")


def schedule(load: Load, *, window: int | None = None, seed: int = 0) -> Steps:
    """The steps of a load. `window`: how far back layers with a window look."""
    far = window or NO_WINDOW
    return steady(load, far, np.random.default_rng(seed)) if load.steady else _burst(load, far)


def _burst(load: Load, window: int) -> Steps:
    """Every step until the last request ends, at most `max_steps`."""
    state = _Requests(load, window)
    rows: list[tuple[int, ...]] = []
    while len(rows) < load.max_steps and state.computed_C.min() < state.done:
        rows.append(state.step(len(rows)))
    columns = np.array(rows, dtype=np.int64).T
    first_C = state.first_C[np.argsort(state.first_C, kind="stable")]
    return Steps(
        **{f"{name}_N": column for name, column in zip(_NAMES, columns, strict=True)},
        like_M=np.arange(len(rows)),
        arrived_R=np.zeros(int((first_C >= 0).sum()), np.int64),
        first_R=first_C[first_C >= 0],
    )


class _Requests:
    """The requests of a burst. `computed_C` counts tokens whose cache entries exist."""

    def __init__(self, load: Load, window: int) -> None:
        self.load, self.window = load, window
        self.done = load.prompt_tokens + load.output_tokens - 1
        self.computed_C = np.zeros(load.concurrency, np.int64)
        self.first_C = np.full(load.concurrency, -1)

    def step(self, now: int) -> tuple[int, ...]:
        """Advances by one step; its row of `Steps`."""
        prompt = self.load.prompt_tokens
        before_C = self.computed_C.copy()
        decoding_C = (before_C >= prompt) & (before_C < self.done)
        missing_C = np.maximum(prompt - before_C, 0)
        if now == 0:
            missing_C[1:] = 0
        ahead_C = np.cumsum(missing_C) - missing_C
        room = self.load.token_budget - int(decoding_C.sum())
        taken_C = np.clip(room - ahead_C, 0, missing_C)
        added_C = taken_C + decoding_C
        self.computed_C = before_C + added_C
        prompted_C = (taken_C > 0) & (self.computed_C == prompt)
        self.first_C[prompted_C] = now
        chunks = [(int(b), int(a)) for b, a in zip(before_C, added_C, strict=True) if a]
        return (
            int(decoding_C.sum()),
            int(taken_C.sum()),
            int(decoding_C.sum() + prompted_C.sum()),
            *cache_use(chunks, NO_WINDOW),
            *cache_use(chunks, self.window),
        )
