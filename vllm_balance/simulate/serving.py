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
    far, random = window or NO_WINDOW, np.random.default_rng(seed)
    return steady(load, far, random) if load.steady else _loop(load, far, random)


def _loop(load: Load, window: int, random: np.random.Generator) -> Steps:
    """Every step until the last request ends, at most `max_steps`."""
    requests = _Requests(load, window, random)
    rows: list[tuple[int, ...]] = []
    while len(rows) < load.max_steps and requests.unfinished_R.any():
        rows.append(requests.step(len(rows)))
    columns = np.array(rows, dtype=np.int64).T
    order = np.argsort(requests.first_R, kind="stable")
    order = order[requests.first_R[order] >= 0]
    return Steps(
        **dict(zip(COLUMNS, columns, strict=True)),
        like_M=np.arange(len(rows)),
        arrived_R=requests.arrived_R[order],
        first_R=requests.first_R[order],
        last_R=requests.last_R[order],
    )


class _Requests:
    """The requests of a closed loop that ends, on all engines, in the order in which they are sent.
    `computed_R` counts tokens whose cache entries exist."""

    def __init__(self, load: Load, window: int, random: np.random.Generator) -> None:
        self.load, self.window = load, window
        self.prompt_R, output_R = load.lengths(random)
        self.done_R = self.prompt_R + output_R - 1
        self.sent = 0
        self.computed_R = np.zeros_like(self.done_R)
        self.engine_R, self.arrived_R, self.taken_from_R, self.first_R = (
            np.full_like(self.done_R, -1) for _ in range(4)
        )
        self._send(0)

    @property
    def unfinished_R(self) -> Array:
        """Requests that were sent and have not all of their tokens."""
        return (self.engine_R >= 0) & (self.computed_R < self.done_R)

    @property
    def last_R(self) -> Array:
        """Step of the last token of each request that has its first one: one token in each."""
        return np.asarray(self.first_R + self.done_R - self.prompt_R)

    def _send(self, now: int) -> None:
        """Requests follow those that ended before step `now`, until there are no more.

        Engines do not wait: a step that some request has still to do is running by then, and takes
        none in. Where there is none, the first to come begins one, and has it to itself.
        """
        unfinished = int(self.unfinished_R.sum())
        end = min(self.sent + self.load.concurrency - unfinished, len(self.done_R))
        self.arrived_R[self.sent : end] = now
        self.taken_from_R[self.sent : end] = now + 1
        if not unfinished:
            self.taken_from_R[self.sent : end][:1] = now
        for request in range(self.sent, end):
            # As vLLM balances them: to the engine with fewest.
            engine_R = self.engine_R[self.unfinished_R]
            self.engine_R[request] = np.bincount(engine_R, minlength=self.load.engines).argmin()
        self.sent = end

    def step(self, now: int) -> tuple[int, ...]:
        """Advances by one step; what `Steps` has of it, in the order of COLUMNS."""
        before_R = self.computed_R.copy()
        decoding_R = self.unfinished_R & (before_R >= self.prompt_R)
        is_on_DR = self.engine_R == np.arange(self.load.engines)[:, None]
        prompts_DR = self._taken(is_on_DR, decoding_R, now)
        prompts_R = prompts_DR.sum(0)
        self.computed_R = before_R + prompts_R + decoding_R
        prompted_R = (prompts_R > 0) & (self.computed_R == self.prompt_R)
        self.first_R[prompted_R] = now
        # All wait for the engine with most tokens.
        most = int((prompts_DR + is_on_DR * decoding_R).sum(1).argmax())
        decodes, prompts = (
            list(zip(before_R[added_R > 0].tolist(), added_R[added_R > 0].tolist(), strict=True))
            for added_R in (is_on_DR[most] * decoding_R, prompts_DR[most])
        )
        attended, reads = cache_use(decodes + prompts, NO_WINDOW)
        self._send(now + 1)
        return (
            int(decoding_R.sum()),
            int(prompts_R.sum()),
            int(decoding_R.sum() + prompted_R.sum()),
            int(prompts_DR[most].sum()),
            attended,
            cache_use(prompts, NO_WINDOW)[0],
            reads,
            *cache_use(decodes + prompts, self.window),
        )

    def _taken(self, is_on_DR: Array, decoding_R: Array, now: int) -> Array:
        """Tokens of each prompt that each engine has room for, first come first served, [D, R]."""
        is_taken_R = self.unfinished_R & (self.taken_from_R <= now)
        missing_R = is_taken_R * np.maximum(self.prompt_R - self.computed_R, 0)
        missing_DR = is_on_DR * missing_R
        ahead_DR = np.cumsum(missing_DR, axis=1) - missing_DR
        room_D = self.load.engine_budget - (is_on_DR & decoding_R).sum(1)
        return np.asarray(np.clip(room_D[:, None] - ahead_DR, 0, missing_DR))
