"""A load, and the steps that it comes to: what is asked for, and which tokens are in which step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_balance.errors import BalancerError

Array = np.ndarray[Any, np.dtype[Any]]
COLUMNS: tuple[str, ...] = ("decode_N", "prefill_N", "sampled_N", "engine_prefill_N", "attended_N")
COLUMNS += ("prompt_attended_N", "reads_N", "window_attended_N", "window_reads_N")
"""Fields of `Steps` that have a value for each simulated step."""
NO_WINDOW = 2**40
"""Tokens that layers without a window look back: more than any request has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What clients ask for."""

    concurrency: int
    """Requests in flight, over all ranks."""
    prompt_tokens: int
    output_tokens: int
    token_budget: int
    """Most tokens in a step, over all engines (vLLM's max_num_batched_tokens, times engines)."""
    max_steps: int
    """Simulated steps: of a steady load those that stand for a cycle, of another its first."""
    steady: bool = True
    """Closed loop in its steady state: when a request ends, the next one starts. False: the loop
    from its first burst to its last answer."""
    requests: int | None = None
    """Of a loop that ends, over all of it; None: one burst, as many as are in flight."""
    length_spread: float = 0.0
    """Of a loop that ends: lengths are drawn from 1 - spread to 1 + spread times the above."""
    engines: int = 1
    """Data-parallel engines: each computes whole requests within an equal part of the budget."""

    def __post_init__(self) -> None:
        sizes = (self.concurrency, self.prompt_tokens, self.output_tokens, self.max_steps)
        if min(*sizes, self.engines) < 1:
            raise BalancerError(
                f"A load needs at least one request, prompt token, output token, step and engine; "
                f"got {', '.join(map(str, (*sizes, self.engines)))}."
            )
        if self.token_budget < self.concurrency + self.steady:
            raise BalancerError(
                f"{self.concurrency} requests do not fit in steps of {self.token_budget} tokens "
                f"with room for prompts. Lower the concurrency or raise the token budget."
            )
        if self.requests is not None and self.requests < self.concurrency:
            raise BalancerError(
                f"{self.concurrency} requests in flight were asked for, and {self.requests} in "
                f"all. Lower the concurrency or raise the requests."
            )
        if not 0 <= self.length_spread < 1:
            raise BalancerError(f"A length_spread is from 0 to below 1; got {self.length_spread}.")
        if self.steady and (self.requests is not None or self.length_spread):
            raise BalancerError(
                "A steady load has no end and its requests are alike: leave out requests and "
                "length_spread, or simulate the whole loop with steady=False."
            )

    @property
    def engine_budget(self) -> int:
        """Most tokens of one engine in a step."""
        return max(self.token_budget // self.engines, 1)

    def lengths(self, random: np.random.Generator) -> tuple[Array, Array]:
        """Prompt and output tokens of each request of a loop that ends, two [R].

        As the client draws them (vLLM's RandomDataset): evenly between whole numbers, all prompts
        and then all outputs, so that its seed gives its lengths.
        """
        prompt_R, output_R = (
            random.integers(
                max(math.floor(tokens * (1 - self.length_spread)), 1),
                math.ceil(tokens * (1 + self.length_spread)) + 1,
                self.requests or self.concurrency,
            )
            for tokens in (self.prompt_tokens, self.output_tokens)
        )
        return prompt_R, output_R


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Simulated steps, [N], which may be means of several, the steps of the load that they stand
    for, [M], and requests, [R], in the order of their first tokens, whose steps are the load's.

    Experts see the tokens of all engines. All wait for the engine with most prompt tokens, and what
    is attended to and read is its own.
    """

    decode_N: Array
    """Tokens of requests that decode."""
    prefill_N: Array
    """Tokens of prompts."""
    sampled_N: Array
    """Tokens that come out: one per decoding request and per finished prompt."""
    engine_prefill_N: Array
    """Tokens of prompts on the engine that has most."""
    attended_N: Array
    """Pairs of a query token and a cached one, there."""
    prompt_attended_N: Array
    """Those of them whose query token is a prompt's."""
    reads_N: Array
    """Cached tokens read: once per request in the step."""
    window_attended_N: Array
    """The same where a layer looks back `window` tokens only."""
    window_reads_N: Array
    like_M: Array
    """The simulated step that each step of the load is like; of a loop that ends, itself."""
    arrived_R: Array
    """Step at whose start the request arrived; of a loop that ends just after it, so that the step
    is without it, unless it is the request that the step was begun for. Negative: before the first
    step."""
    first_R: Array
    """Step that gave its first token."""
    last_R: Array
    """Step that gave its last one; at or behind the load's last step of a request that goes on."""

    @property
    def tokens_N(self) -> Array:
        """Tokens in each step."""
        return self.decode_N + self.prefill_N

    @property
    def whole_N2(self) -> Array:
        """Whole numbers of decoding tokens and of prompt tokens in each step, int64."""
        decode_N = np.rint(self.decode_N)
        return np.stack([decode_N, np.rint(self.tokens_N) - decode_N], axis=1).astype(np.int64)

    @property
    def times_N(self) -> Array:
        """How many steps of the load each simulated one stands for."""
        return np.bincount(self.like_M, minlength=len(self.decode_N))


def cache_use(chunks: Iterable[tuple[int, int]], window: int) -> tuple[int, int]:
    """What tokens added in a step attend to and read, none further back than `window`.

    Args:
        chunks: (tokens in the cache before the step, tokens added) of each request.

    Returns:
        Pairs of an added token and a cached one, and cached tokens read.
    """
    attended = reads = 0
    for before, added in chunks:
        short = min(max(window - before, 0), added)
        attended += short * before + short * (short + 1) // 2 + (added - short) * window
        reads += min(before + added, window + added - 1)
    return attended, reads
