"""Which tokens are in which step: continuous batching with chunked prefill, as vLLM schedules.

A fixed number of requests is in flight. In a step every request that decodes gets one token;
what is left of the token budget goes to prompts, first come first served. None of this depends
on how long steps take, so the steps are known before their times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_balance.errors import BalancerError

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What clients ask for."""

    concurrency: int
    """Requests in flight, over all ranks."""
    prompt_tokens: int
    output_tokens: int
    token_budget: int
    """Most tokens in a step (vLLM's max_num_batched_tokens, times data-parallel ranks)."""
    max_steps: int
    steady: bool = True
    """Start amid decoding, a finished request is followed by the next. False: a burst that none
    follows. The engine begins a step with the first request, and the others wait for its end."""

    def __post_init__(self) -> None:
        least = min(self.concurrency, self.prompt_tokens, self.output_tokens, self.max_steps)
        if least < 1:
            raise BalancerError(
                f"A load needs at least one request, prompt token, output token and step; got "
                f"{self.concurrency}, {self.prompt_tokens}, {self.output_tokens} and "
                f"{self.max_steps}."
            )
        if self.token_budget < self.concurrency + self.steady:
            raise BalancerError(
                f"{self.concurrency} requests do not fit in steps of {self.token_budget} tokens "
                f"with room for prompts. Lower the concurrency or raise the token budget."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Steps, [N], and requests, [R], in the order of their first tokens."""

    decode_N: Array
    """Tokens of requests that decode."""
    prefill_N: Array
    """Tokens of prompts."""
    sampled_N: Array
    """Tokens that come out: one per decoding request and per finished prompt."""
    looks_N: Array
    """Pairs of a query token and a cached one."""
    reads_N: Array
    """Cached tokens read: once per request in the step."""
    narrow_looks_N: Array
    """The same where a layer looks back `window` tokens only."""
    narrow_reads_N: Array
    arrived_R: Array
    """Step at whose beginning, or of a burst at once behind whose beginning, the request came."""
    first_R: Array
    """Step that gave its first token; -1: before the first step."""
    last_R: Array
    """Step that gave its last token, or the last step."""

    @property
    def tokens_N(self) -> Array:
        """Tokens in each step."""
        return self.decode_N + self.prefill_N


def schedule(load: Load, *, window: int | None = None, seed: int = 0) -> Steps:
    """The steps of a load. `window`: how far back narrow layers look."""
    random = np.random.default_rng(seed)
    state = _Requests(load, window or 2**40, random)
    rows: list[tuple[int, ...]] = []
    while len(rows) < load.max_steps and state.computed_C.min() < state.done:
        rows.append(state.step(len(rows)))
    columns = np.array(rows, dtype=np.int64).T
    requests = np.array(state.finished + state.unfinished(len(rows)), dtype=np.int64).reshape(-1, 3)
    names = ("decode", "prefill", "sampled", "looks", "reads", "narrow_looks", "narrow_reads")
    return Steps(
        **{f"{name}_N": column for name, column in zip(names, columns, strict=True)},
        **{f"{name}_R": requests[:, i] for i, name in enumerate(("arrived", "first", "last"))},
    )


class _Requests:
    """The requests in flight. `computed_C` counts tokens whose cache entries exist."""

    def __init__(self, load: Load, window: int, random: np.random.Generator) -> None:
        self.load, self.window = load, window
        self.done = load.prompt_tokens + load.output_tokens - 1
        self.computed_C = np.zeros(load.concurrency, np.int64)
        if load.steady:
            self.computed_C = random.integers(load.prompt_tokens, self.done + 1, load.concurrency)
            self.computed_C = np.minimum(self.computed_C, max(self.done - 1, 0))
        started = self.computed_C >= load.prompt_tokens
        self.arrived_C = np.where(started, -1, 0)
        self.first_C = np.full(load.concurrency, -1)
        self.finished: list[tuple[int, int, int]] = []

    def step(self, now: int) -> tuple[int, ...]:
        """Advances by one step; its row of `Steps`."""
        prompt = self.load.prompt_tokens
        before_C = self.computed_C.copy()
        decoding_C = (before_C >= prompt) & (before_C < self.done)
        missing_C = np.maximum(prompt - before_C, 0)
        if now == 0 and not self.load.steady:
            missing_C[1:] = 0
        order_C = np.lexsort((np.arange(len(missing_C)), self.arrived_C))
        ahead_C = np.cumsum(missing_C[order_C]) - missing_C[order_C]
        room = self.load.token_budget - int(decoding_C.sum())
        taken_C = np.empty_like(missing_C)
        taken_C[order_C] = np.clip(room - ahead_C, 0, missing_C[order_C])
        added_C = taken_C + decoding_C
        self.computed_C = before_C + added_C
        prompted_C = (taken_C > 0) & (self.computed_C == prompt)
        self.first_C[prompted_C] = now
        self._finish(now)
        return (
            int(decoding_C.sum()),
            int(taken_C.sum()),
            int(decoding_C.sum() + prompted_C.sum()),
            *_cache_use(before_C, added_C, 2**40),
            *_cache_use(before_C, added_C, self.window),
        )

    def _finish(self, now: int) -> None:
        ended_C = np.flatnonzero((self.computed_C == self.done) & (self.arrived_C <= now))
        for request in ended_C:
            self.finished.append((self.arrived_C[request], self.first_C[request], now))
        if self.load.steady:
            self.computed_C[ended_C], self.first_C[ended_C] = 0, -1
            self.arrived_C[ended_C] = now + 1
        else:
            self.arrived_C[ended_C] = 2**40

    def unfinished(self, num_steps: int) -> list[tuple[int, int, int]]:
        """Requests that decode when the last step ends."""
        going = (self.computed_C >= self.load.prompt_tokens) & (self.computed_C < self.done)
        return [
            (self.arrived_C[request], self.first_C[request], num_steps - 1)
            for request in np.flatnonzero(going)
        ]


def _cache_use(before_C: Array, added_C: Array, window: int) -> tuple[int, int]:
    """(looks, reads) of the tokens added in a step, none further back than `window`."""
    after_C = before_C + added_C
    short_C = np.clip(window - before_C, 0, added_C)
    looks = (short_C * before_C + short_C * (short_C + 1) // 2 + (added_C - short_C) * window).sum()
    reads = np.where(added_C > 0, np.minimum(after_C, window + added_C - 1), 0).sum()
    return int(looks), int(reads)
