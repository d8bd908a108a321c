"""A fresh `vllm serve` on the ranks of this machine: started, watched, asked, and always ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx

START_TIMEOUT_S = 300.0


@dataclass(slots=True, kw_only=True)
class Arm:
    """One way to serve a model."""

    name: str
    balancer: str | None
    """Name for --moe-balancer; None: stock vLLM."""
    settings: dict[str, Any] = field(default_factory=dict)
    """For --moe-balancer-config."""
    tensor_parallel: int = 1
    data_parallel: int = 1
    flags: Sequence[str] = ()

    @property
    def num_ranks(self) -> int:
        return self.tensor_parallel * self.data_parallel

    def command(self, model: Path, port: int) -> list[str]:
        """The `vllm serve` that this arm is."""
        command = [str(Path(sys.executable).parent / "vllm"), "serve", str(model)]
        command += ["--port", str(port), "--host", "127.0.0.1"]
        command += ["--tensor-parallel-size", str(self.tensor_parallel)]
        command += ["--data-parallel-size", str(self.data_parallel)]
        if self.balancer is not None:
            command += ["--enable-expert-parallel", "--moe-balancer", self.balancer]
        if self.settings:
            command += ["--moe-balancer-config", json.dumps(self.settings)]
        return [*command, *self.flags]


class Server:
    """`with Server(arm, model) as server:` — healthy inside, gone outside.

    Raises:
        RuntimeError: the server ended or was not healthy in time; with the end of its log.
    """

    def __init__(
        self, arm: Arm, model: Path, *, on_wait: Callable[[float], None] = lambda seconds: None
    ) -> None:
        self.arm, self.model = arm, model
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._on_wait = on_wait
        self._log = tempfile.NamedTemporaryFile(  # noqa: SIM115 - closed in __exit__
            prefix=f"vllm-{arm.name}-", suffix=".log", delete=False
        )
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self.arm.command(self.model, self.port),
            env=_environment(self.arm.num_ranks),
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            self._wait_until_healthy()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process is not None
        _end(self._process)
        self._log.close()
        if not exception or exception[0] is None:
            Path(self._log.name).unlink(missing_ok=True)

    @property
    def log(self) -> str:
        """What the server has printed so far."""
        return Path(self._log.name).read_text(errors="replace")

    def status(self) -> list[dict[str, Any]]:
        """The counters of every rank's balancer."""
        answer = httpx.get(f"{self.url}/moe_balancer", timeout=60).raise_for_status()
        ranks: list[dict[str, Any]] = answer.json()["ranks"]
        return ranks

    def reset(self) -> None:
        """Sets the counters to zero."""
        httpx.post(f"{self.url}/moe_balancer/reset", timeout=60).raise_for_status()

    def _wait_until_healthy(self) -> None:
        assert self._process is not None
        start = time.monotonic()
        while time.monotonic() - start < START_TIMEOUT_S:
            if self._process.poll() is not None:
                raise RuntimeError(
                    f"vllm serve ({self.arm.name}) ended with status {self._process.returncode}:\n"
                    f"{self.log[-4000:]}"
                )
            try:
                if httpx.get(f"{self.url}/health", timeout=2).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            self._on_wait(time.monotonic() - start)
            time.sleep(0.25)
        raise RuntimeError(
            f"vllm serve ({self.arm.name}) was not healthy after {START_TIMEOUT_S:.0f} s:\n"
            f"{self.log[-4000:]}"
        )


def _environment(num_ranks: int) -> dict[str, str]:
    """One core per rank, a small KV cache, no downloads, and our HTTP endpoint allow-listed."""
    cores = sorted(os.sched_getaffinity(0))
    return {
        **os.environ,
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(
            str(cores[rank % len(cores)]) for rank in range(num_ranks)
        ),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_PLUGINS": "moe_balancer",
        "HF_HUB_OFFLINE": "1",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _end(process: subprocess.Popen[bytes]) -> None:
    """Asks the server to stop, then ends what is left of its process group."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
