"""A load, and the steps that it comes to: what is asked for, and which tokens are in which step."""

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
    """Simulated steps: of a steady load those that stand for a cycle, of a burst its first."""
    steady: bool = True
    """A finished request is followed by the next, and has been for long. False: a burst that none
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
    """Simulated steps, [N], which may be means of several, the steps of the load that they stand
    for, [M], and requests, [R], in the order of their first tokens, whose steps are the load's."""

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
    like_M: Array
    """The simulated step that each step of the load is like; of a burst, itself."""
    arrived_R: Array
    """Step at whose beginning, or of a burst at once behind whose beginning, the request came;
    negative: before the first step."""
    first_R: Array
    """Step that gave its first token."""

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
