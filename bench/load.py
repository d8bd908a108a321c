"""The load of a benchmark: vLLM's own `vllm bench serve` client, in this process.

In this process, because importing vLLM takes 8 s of a core and a run file has dozens of loads; the
client is `vllm.benchmarks.serve` with the arguments of its command line, nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import io
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from bench.slow_rank import Waits

METRICS = {"ttft": "ttft_ms", "tpot": "tpot_ms", "itl": "itl_ms", "e2el": "e2e_ms"}
"""The client's name of each latency, and a row's."""
NUM_QUANTILES = 51
PERCENTILES = (50, 90, 99)
SAMPLE_S = 1.0
"""Between two looks at the counters, which hold up the step behind them; in all arms alike."""


class Load(BaseModel):
    """Keys of `[load]` in a run file; `[loads.NAME]` changes some of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    requests: int = Field(ge=1)
    concurrency: int | None = Field(default=None, ge=1)
    """Requests at once; default: all."""
    prompt_tokens: int = Field(ge=1)
    max_tokens: int = Field(ge=1)
    """Generated per request, always exactly."""
    length_spread: float = Field(default=0.0, ge=0, lt=1)
    """Lengths are drawn evenly from 1 - spread to 1 + spread times the above."""
    slo_tpot_ms: float | None = Field(default=None, gt=0)
    """Goodput counts the requests whose TPOT is within it."""
    repeats: int = Field(default=1, ge=1)
    replay: dict[str, Any] | None = None
    """Keys of `[replay]`: the server routes so from this load on; the load should be warmed up."""
    warm_tokens: int | None = Field(default=None, ge=1)
    """Behind a change of load or of a rank's speed, the load is first sent twice with so many."""

    @property
    def warming(self) -> Load | None:
        """What is sent before the load itself, if anything."""
        if self.warm_tokens is None:
            return None
        return self.model_copy(update={"max_tokens": self.warm_tokens, "slo_tpot_ms": None})

    def is_skewed_prefill(self, replay: dict[str, Any]) -> bool:
        """Whether it is of first tokens that go to a few hot experts.

        Args:
            replay: the run file's own, which a load may replace.
        """
        return self.max_tokens == 1 and "hot" in (self.replay or replay)

    @property
    def at_once(self) -> int:
        """Requests in flight while there are enough."""
        return min(self.concurrency or self.requests, self.requests)

    @property
    def min_steps(self) -> int:
        """Forward passes that the shortest request takes."""
        return int(self.max_tokens * (1 - self.length_spread))


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """What the client measured and what the server's counters said meanwhile."""

    client: dict[str, Any]
    """Result of `vllm bench serve --save-detailed`."""
    looks: list[tuple[float, list[dict[str, Any]]]]
    """(seconds since the start, status of every rank), the start itself left out."""
    waited_s: float
    """For a core, of the client, while it drew the prompts and sent them."""


def arguments(load: Load, url: str, model: Path, seed: int) -> list[str]:
    """What follows `vllm bench serve`."""
    words = ["--backend", "openai", "--base-url", url, "--model", str(model)]
    words += ["--dataset-name", "random", "--random-range-ratio", str(load.length_spread)]
    words += ["--random-input-len", str(load.prompt_tokens)]
    words += ["--random-output-len", str(load.max_tokens)]
    words += ["--num-prompts", str(load.requests), "--max-concurrency", str(load.at_once)]
    words += ["--seed", str(seed), "--temperature", "0", "--disable-tqdm"]
    words += ["--percentile-metrics", ",".join(METRICS)]
    words += ["--metric-percentiles", ",".join(map(str, PERCENTILES)), "--save-detailed"]
    if load.slo_tpot_ms is not None:
        words += ["--goodput", f"tpot:{load.slo_tpot_ms:g}"]
    return words


def send(
    load: Load,
    url: str,
    model: Path,
    seed: int,
) -> Answered:
    """Sends the load and looks at the balancer's counters every SAMPLE_S.

    Raises:
        RuntimeError: a request failed or was answered with another number of tokens.
    """
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    parsed = parser.parse_args(arguments(load, url, model, seed))
    before = Waits.of(os.getpid())
    client, looks = asyncio.run(_send_and_look(serve.main_async, parsed, url))
    waited_s = (Waits.of(os.getpid()).waited_ns - before.waited_ns) / 1e9
    # The client freezes the heap for its one load; this process goes on.
    gc.unfreeze()
    _require_all_answered(client, load)
    return Answered(client=client, looks=looks, waited_s=waited_s)


async def _send_and_look(
    main: Callable[[argparse.Namespace], Any],
    parsed: argparse.Namespace,
    url: str,
) -> tuple[dict[str, Any], list[tuple[float, list[dict[str, Any]]]]]:
    looks: list[tuple[float, list[dict[str, Any]]]] = []
    start = time.perf_counter()

    async def look(http: httpx.AsyncClient) -> None:
        answer = await http.get("/moe_balancer", params={"per_layer": True})
        ranks = answer.raise_for_status().json()["ranks"]
        looks.append((time.perf_counter() - start, ranks))

    async def keep_looking(http: httpx.AsyncClient) -> None:
        while True:
            await asyncio.sleep(SAMPLE_S)
            await look(http)

    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        looking = asyncio.create_task(keep_looking(http))
        # The client prints a report of its own.
        with contextlib.redirect_stdout(io.StringIO()):
            client = await main(parsed)
        looking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await looking
        await look(http)
    return client, looks


def _require_all_answered(client: dict[str, Any], load: Load) -> None:
    errors = [error for error in client["errors"] if error]
    if client["failed"] or client["completed"] != load.requests:
        raise RuntimeError(
            f"{client['failed']} of {load.requests} requests failed; no number from this load. "
            f"The first error: {errors[0] if errors else 'none given'}"
        )
    wrong = {n for n in client["output_lens"] if n != load.max_tokens}
    if wrong and not load.length_spread:
        raise RuntimeError(
            f"Requests for {load.max_tokens} tokens were answered with {sorted(wrong)}; no number "
            f"from this load."
        )


def timed(load: Load, answered: Answered) -> dict[str, Any]:
    """Fields of a row that the client measured."""
    client = answered.client
    return {
        "requests": load.requests,
        "concurrency": load.at_once,
        "prompt_tokens": load.prompt_tokens,
        "output_tokens": load.max_tokens,
        "duration_s": client["duration"],
        "client_waited_s": answered.waited_s,
        "requests_per_s": client["request_throughput"],
        "tokens_per_s": client["output_throughput"],
        "total_tokens_per_s": client["total_token_throughput"],
        "slo_tpot_ms": load.slo_tpot_ms,
        "goodput_per_s": client["request_goodput"],
        **{METRICS[name]: _latency(client, name) for name in METRICS},
    }


def _latency(client: dict[str, Any], name: str) -> dict[str, Any]:
    """Percentiles by the client, and quantiles of what they were made of."""
    seconds = _distribution(client)[name] or [0.0]
    quantiles = np.quantile(seconds, np.linspace(0, 1, NUM_QUANTILES))
    return {
        **{f"p{p}": client[f"p{p}_{name}_ms"] for p in PERCENTILES},
        "quantiles": [round(1e3 * value, 2) for value in quantiles],
    }


def _distribution(client: dict[str, Any]) -> dict[str, list[float]]:
    """Every latency, s: per request, and per token for `itl`; as the client defines them."""
    requests = list(zip(client["latencies"], client["ttfts"], client["output_lens"], strict=True))
    return {
        "ttft": client["ttfts"],
        "tpot": [(all_s - first_s) / (n - 1) for all_s, first_s, n in requests if n > 1],
        "itl": [itl for itls in client["itls"] for itl in itls],
        "e2el": client["latencies"],
    }
