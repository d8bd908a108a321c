"""Which tokens are in which step: continuous batching with chunked prefill, as vLLM schedules.

In a step every request that decodes gets one token; what is left of the token budget goes to
prompts, first come first served. None of this depends on how long steps take, so the steps are
known before their times.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_balance.simulate.steady import steady
from vllm_balance.simulate.steps import COLUMNS, NO_WINDOW, Load, Steps, cache_use

Array = np.ndarray[Any, np.dtype[Any]]


def schedule(load: Load, *, window: int | None = None, seed: int = 0) -> Steps:
    """The steps of a load. `window`: how far back layers with a window look."""
    far = window or NO_WINDOW
    return steady(load, far, np.random.default_rng(seed)) if load.steady else _burst(load, far)


def _burst(load: Load, window: int) -> Steps:
    """Every step until the last request ends, at most `max_steps`."""
    states = [_Requests(load, window, engine) for engine in range(load.engines)]
    rows: list[tuple[int, ...]] = []
    while len(rows) < load.max_steps and any(state.unfinished for state in states):
        rows.append(_together([state.step(len(rows)) for state in states]))
    columns = np.array(rows, dtype=np.int64).T
    first_C = np.concatenate([state.first_C for state in states])
    first_R = np.sort(first_C[first_C >= 0], kind="stable")
    return Steps(
        **dict(zip(COLUMNS, columns, strict=True)),
        like_M=np.arange(len(rows)),
        arrived_R=np.zeros(len(first_R), np.int64),
        first_R=first_R,
    )


def _together(rows: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The row of a step, from one of `_Requests.step` for each engine: tokens of all engines, and
    what the one with most of them has alone."""
    most = max(rows, key=lambda row: row[0] + row[1])
    decode, prefill, sampled = (sum(row[column] for row in rows) for column in range(3))
    return decode, prefill, sampled, most[1], *most[3:]


class _Requests:
    """The requests of a burst on one engine. `computed_C` counts tokens whose cache entries
    exist."""

    def __init__(self, load: Load, window: int, engine: int) -> None:
        self.load, self.window, self.engine = load, window, engine
        own = len(range(engine, load.concurrency, load.engines))
        self.done = load.prompt_tokens + load.output_tokens - 1
        self.computed_C = np.zeros(own, np.int64)
        self.first_C = np.full(own, -1)

    @property
    def unfinished(self) -> bool:
        return bool((self.computed_C < self.done).any())

    def step(self, now: int) -> tuple[int, ...]:
        """Advances by one step; its decoding tokens, prompt tokens, tokens that come out, pairs
        attended to, those of prompts, tokens read, and the first and last of these in the window.
        """
        prompt = self.load.prompt_tokens
        before_C = self.computed_C.copy()
        decoding_C = (before_C >= prompt) & (before_C < self.done)
        missing_C = np.maximum(prompt - before_C, 0)
        if now == 0:
            missing_C[int(self.engine == 0) :] = 0
        ahead_C = np.cumsum(missing_C) - missing_C
        room = self.load.engine_budget - int(decoding_C.sum())
        taken_C = np.clip(room - ahead_C, 0, missing_C)
        self.computed_C = before_C + taken_C + decoding_C
        prompted_C = (taken_C > 0) & (self.computed_C == prompt)
        self.first_C[prompted_C] = now
        prompts = list(zip(before_C.tolist(), taken_C.tolist(), strict=True))
        decodes = [(before, 1) for before in before_C[decoding_C].tolist()]
        chunks = decodes + [(before, added) for before, added in prompts if added]
        attended, reads = cache_use(chunks, NO_WINDOW)
        return (
            int(decoding_C.sum()),
            int(taken_C.sum()),
            int(decoding_C.sum() + prompted_C.sum()),
            attended,
            cache_use(chunks[len(decodes) :], NO_WINDOW)[0],
            reads,
            *cache_use(chunks, self.window),
        )
