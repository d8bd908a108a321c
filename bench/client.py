"""Requests to an OpenAI-compatible server, several at a time, with the times that users feel."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One streamed completion."""

    token_ids: tuple[int, ...]
    ttft_s: float
    """Seconds from the request to the first token."""
    e2e_s: float
    """Seconds from the request to the last token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What came back from requests that were sent together."""

    answers: tuple[Answer, ...]
    seconds: float

    @property
    def ttft_ms(self) -> float:
        """Median over requests."""
        return 1e3 * statistics.median(answer.ttft_s for answer in self.answers)

    @property
    def e2e_ms(self) -> float:
        """Median over requests."""
        return 1e3 * statistics.median(answer.e2e_s for answer in self.answers)

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens of all requests together."""
        return sum(len(answer.token_ids) for answer in self.answers) / self.seconds


def send(
    url: str,
    model: str,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    on_token: Callable[[], None] = lambda: None,
) -> Answers:
    """Sends all prompts at once, greedily decoded to exactly ``max_tokens`` tokens each.

    Raises:
        httpx.HTTPError: the server refused a request or broke the connection.
    """

    async def all_at_once() -> Answers:
        async with httpx.AsyncClient(base_url=url, timeout=300) as client:
            start = time.perf_counter()
            answers = await asyncio.gather(
                *(_stream(client, model, prompt, max_tokens, on_token) for prompt in prompts)
            )
            return Answers(answers=tuple(answers), seconds=time.perf_counter() - start)

    return asyncio.run(all_at_once())


async def _stream(
    client: httpx.AsyncClient,
    model: str,
    prompt: str,
    max_tokens: int,
    on_token: Callable[[], None],
) -> Answer:
    request = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    token_ids: list[int] = []
    start = first = last = time.perf_counter()
    async with client.stream("POST", "/v1/completions", json=request) as response:
        if response.is_error:
            await response.aread()
            response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            choice = json.loads(line.removeprefix("data: "))["choices"][0]
            last = time.perf_counter()
            first = last if not token_ids else first
            token_ids += choice["token_ids"]
            on_token()
    return Answer(
        token_ids=tuple(token_ids),
        ttft_s=first - start,
        e2e_s=last - start,
    )
