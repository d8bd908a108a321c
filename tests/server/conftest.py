"""The demo model, and what one dense rank of stock vLLM answers: the truth for all servers."""

import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
from serving import EAGER, FLOAT32, LONG_PROMPT, PROMPTS, serve

from bench import demo_model


@dataclass(frozen=True, kw_only=True)
class Dense:
    """What one rank without expert parallelism, without our flag, answers in float32."""

    tokens: list[list[int]]
    """Greedy continuation of each of PROMPTS."""
    long_tokens: list[int]
    """Greedy continuation of LONG_PROMPT."""
    texts: list[list[int]]
    """Token ids of each prompt with its continuation."""
    logprobs: list[list[float]]
    """Log probability of each token of `texts` but the first."""
    num_computed_tokens: int
    """Tokens that went through the model for PROMPTS: the last of each answer does not."""
    endpoint_status: int
    """HTTP status of our endpoint, which nobody has allowed here."""
    log: str


@pytest.fixture(scope="session", autouse=True)
def stopped_cleanly():
    """A terminated test run unwinds like an interrupted one, and so stops its servers."""
    status = 128 + signal.SIGTERM
    before = signal.signal(
        signal.SIGTERM, lambda *_: pytest.exit("the test run was terminated", status)
    )
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def model() -> Path:
    return demo_model.ensure()


@pytest.fixture(scope="session")
def dense(model, tmp_path_factory) -> Dense:
    """The answers of one dense rank, which is started for this."""
    log = tmp_path_factory.getbasetemp() / "dense.log"
    with serve(model, *FLOAT32, *EAGER, log=log, num_ranks=1) as server:
        choices = [server.complete(prompt) for prompt in PROMPTS]
        texts = [choice["prompt_token_ids"] + choice["token_ids"] for choice in choices]
        return Dense(
            tokens=[choice["token_ids"] for choice in choices],
            long_tokens=server.tokens(LONG_PROMPT),
            texts=texts,
            logprobs=[server.logprobs(text) for text in texts],
            num_computed_tokens=sum(len(text) - 1 for text in texts),
            endpoint_status=requests.get(f"{server.url}/moe_balancer", timeout=60).status_code,
            log=log.read_text(errors="replace"),
        )
