"""A real ``vllm serve`` on a free port, and what its clients ask for."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import requests

from bench.server import (
    command_of,
    descendants,
    environment,
    free_port,
    stop,
    tail,
    wait_until_healthy,
)
from bench.starter import Forked, starter

VLLM = str(Path(sys.executable).with_name("vllm"))
STARTS_WITHIN_S = 400
DIES_WITHIN_S = 120

PROMPTS = [
    "The list of all files in a directory",
    "Return a new dictionary that maps",
    "If the argument is not a string, a TypeError",
    "An exception is raised when the connection",
    "This module provides classes for",
    "Changed in version 3.11: the parameter",
    "for line in file:",
    "The thread waits until",
    "A coroutine is",
    "x = 5",
    "Deprecated since",
    "The default encoding of the platform is used. " * 6,
]
LONG_PROMPT = "The default encoding of the platform is used. " * 30
MAX_TOKENS = 40
TENSOR_PARALLEL = ("--tensor-parallel-size", "2", "--enable-expert-parallel")
DATA_PARALLEL = ("--data-parallel-size", "2", "--enable-expert-parallel")
FLOAT32 = ("--dtype", "float32")
EAGER = ("--enforce-eager",)
GENTLY = ("--shutdown-timeout", "30")
WORKERS_END_GENTLY = {"VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "25"}
"""Flags and environment with which nothing is killed behind a SIGTERM."""
MOVING = {"redundancy": 1.5, "window_size": 15, "step_interval": 20}
"""Experts are placed anew every 20 steps, so several times while a test's requests run."""
REARRANGED = "Rearranged experts"
"""What vLLM's EPLB logs after it has moved experts."""


def balanced(name: str, **settings: Any) -> tuple[str, ...]:
    """The flags that ask for a balancer; those with replicas get EPLB that moves often."""
    if name not in ("static", "gem"):
        settings = MOVING | settings
    return ("--moe-balancer", name, "--moe-balancer-config", json.dumps(settings))


class Server:
    """A running server. Its log is a file, because tests look for what it says."""

    def __init__(self, process: subprocess.Popen | Forked, port: int, log: Path) -> None:
        self.process, self.log = process, log
        self.url = f"http://127.0.0.1:{port}"
        self.key = "none"
        """What a server with --api-key asks for."""

    def complete(self, prompt: Any, max_tokens: int = MAX_TOKENS, **more: Any) -> dict[str, Any]:
        """The first choice of a greedy completion that does not stop early, with token ids."""
        body = {
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            **more,
        }
        headers = {"Authorization": f"Bearer {self.key}"}
        url = f"{self.url}/v1/completions"
        answer = requests.post(url, json=body, headers=headers, timeout=300)
        assert answer.status_code == 200, f"{answer.status_code}: {answer.text}\n{self.tail()}"
        return answer.json()["choices"][0]

    def tokens(self, prompt: Any, max_tokens: int = MAX_TOKENS) -> list[int]:
        return self.complete(prompt, max_tokens)["token_ids"]

    def all_tokens(self, prompts: list[Any], at_once: int = 12) -> list[list[int]]:
        """Answers to all prompts, asked concurrently."""
        with ThreadPoolExecutor(at_once) as clients:
            return list(clients.map(self.tokens, prompts))

    def outcome_of(self, prompt: str | list[int], max_tokens: int = 1900) -> int | str:
        """HTTP status of a request, by default a long one, or how its connection ended."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        url = f"{self.url}/v1/completions"
        try:
            return requests.post(url, json=body, timeout=DIES_WITHIN_S).status_code
        except requests.RequestException as error:
            return type(error).__name__

    def logprobs(self, token_ids: list[int]) -> list[float]:
        """Log probability of each token but the first, given those before it."""
        found = self.complete(token_ids, max_tokens=1, prompt_logprobs=0)["prompt_logprobs"][1:]
        return [of[str(token)]["logprob"] for of, token in zip(found, token_ids[1:], strict=True)]

    def status(self, **query: Any) -> list[dict[str, Any]]:
        """What ``GET /moe_balancer`` says of each rank."""
        answer = requests.get(f"{self.url}/moe_balancer", params=query, timeout=60)
        assert answer.status_code == 200, f"{answer.status_code}: {answer.text}\n{self.tail()}"
        return answer.json()["ranks"]

    def metric(self, name: str) -> float:
        """Sum of one of vLLM's own Prometheus counters over its labels."""
        lines = requests.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        values = [float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{")]
        assert values, f"no metric {name}"
        return sum(values)

    def reset(self) -> None:
        requests.post(f"{self.url}/moe_balancer/reset", timeout=60).raise_for_status()

    def record(self, action: str, **settings: Any) -> list[dict[str, Any]]:
        """Starts or stops a recording; the state of each recording rank."""
        url = f"{self.url}/moe_balancer/record/{action}"
        answer = requests.post(url, json=settings or None, timeout=60)
        assert answer.status_code == 200, f"{answer.status_code}: {answer.text}\n{self.tail()}"
        return answer.json()["ranks"]

    def assert_dies_of(self, deed: Callable[[], object]) -> None:
        """What is done while eight long requests run ends them all, and the server with an error,
        soon and with all its processes."""
        self.reset()
        with ThreadPoolExecutor(8) as clients:
            running = [clients.submit(self.outcome_of, prompt) for prompt in PROMPTS[:8]]
            deadline = time.monotonic() + DIES_WITHIN_S
            # Not the metric: several API servers write it seconds later, when requests have ended.
            while self.status()[0]["pairs"] == 0:
                assert time.monotonic() < deadline, "the requests did not start"
            deed()
            self._assert_dead(running)

    def _assert_dead(self, running: list[Future[int | str]]) -> None:
        started = time.monotonic()
        outcomes = [request.result(timeout=DIES_WITHIN_S) for request in running]
        assert 200 not in outcomes, f"it served on: {outcomes}\n{self.tail()}"
        code = self.process.wait(timeout=DIES_WITHIN_S)
        assert time.monotonic() - started < DIES_WITHIN_S
        assert code != 0
        _, alive = psutil.wait_procs(descendants(self.process.pid), timeout=DIES_WITHIN_S)
        assert alive == []

    def end(self) -> int:
        """Ends the server as its operator does; its exit status.

        That is 0 with `GENTLY` and its environment only. Else vLLM kills its engine at once, and
        may then fail on a process that is a zombie still.
        """
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=DIES_WITHIN_S)

    def count_in_log(self, text: str) -> int:
        return self.log.read_text(errors="replace").count(text)

    def workers(self) -> list[psutil.Process]:
        """The processes that hold a model: vLLM names them after their role."""
        named = [(child, command_of(child)) for child in descendants(self.process.pid)]
        workers = [child for child, name in named if "Worker" in name]
        return workers or [child for child, name in named if "EngineCore" in name]

    def tail(self) -> str:
        return tail(self.log)


@contextmanager
def serve(
    model: Path | str,
    *arguments: str,
    log: Path,
    num_ranks: int,
    spawned: bool = False,
    **environ: str,
) -> Iterator[Server]:
    """Starts a server, waits until it is healthy, and leaves no process behind.

    Texts of up to 2,048 tokens, 16 at once; more `arguments` win over these. It is forked from a
    process that has imported vLLM (bench/starter.py), or `spawned` as a user starts it.
    """
    port = free_port()
    command = [VLLM, "serve", str(model), "--port", str(port)]
    command += ["--max-model-len", "2048", "--max-num-seqs", "16", *arguments]
    environ = environment(num_ranks, **environ)
    process: subprocess.Popen | Forked
    if spawned:
        with log.open("w") as output:
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environ,
                cwd=log.parent,
                start_new_session=True,
            )
    else:
        process = starter().start(command, log=log, environ=environ, folder=log.parent)
    server = Server(process, port, log)
    try:
        wait_until_healthy(process, server.url, log, within_s=STARTS_WITHIN_S)
        yield server
    finally:
        stop(process)
