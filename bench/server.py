"""A fresh `vllm serve` on the ranks of this machine: started, watched, asked, and always ended."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self

import httpx
import psutil

from bench.starter import Forked, starter

START_TIMEOUT_S = 300.0
RANKS_NICE = 10
"""What client and API server go before."""
RESTS_WITHIN_S = 60.0
REST_LOOK_S = 0.1
"""A look waits for the step that runs, so between two of them there is one if there are any."""
PORTS = range(20_000, 29_000)
"""Below those that Linux gives to outgoing connections, 32768 and up: a server binds its port many
seconds after it was chosen."""
_turns = itertools.count(64 * os.getpid())
"""Processes side by side begin at different ports, and no port is chosen twice in a row."""


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

    def __init__(self, arm: Arm, model: Path) -> None:
        self.arm, self.model = arm, model
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log: IO[bytes] | None = None
        self._process: subprocess.Popen[bytes] | Forked | None = None

    def __enter__(self) -> Self:
        self._log = tempfile.NamedTemporaryFile(
            prefix=f"vllm-{self.arm.name}-", suffix=".log", delete=False
        )
        # A run that is ended takes its server along.
        self._before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        self._process = self._start()
        try:
            wait_until_healthy(
                self._process,
                self.url,
                self._log_file,
                within_s=START_TIMEOUT_S,
            )
        except BaseException:
            self.__exit__()
            raise
        self._place_ranks()
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process is not None and self._log is not None
        self.resume()
        stop(self._process)
        signal.signal(signal.SIGTERM, self._before)
        self._log.close()
        if not exception or exception[0] is None:
            self._log_file.unlink(missing_ok=True)

    def _start(self) -> subprocess.Popen[bytes] | Forked:
        command = self.arm.command(self.model, self.port)
        environ = environment(self.arm.num_ranks, VLLM_PLUGINS="moe_balancer")
        return starter().start(command, log=self._log_file, environ=environ)

    def _place_ranks(self) -> None:
        """One core for each rank, as vLLM binds the ranks of a CPU when it spawns them.

        They yield: client and API server get a core when they need one, as on machines with cores
        to spare. To the API server by their own niceness; the client is of another session, and
        where Linux groups tasks by session (sched_autogroup) only that of the groups counts.
        """
        assert self._process is not None
        with contextlib.suppress(OSError):
            Path(f"/proc/{self._process.pid}/autogroup").write_text(str(RANKS_NICE))
        named = [(p, command_of(p)) for p in descendants(self._process.pid)]
        workers = [process for process, name in named if "VLLM::Worker" in name]
        # An engine of one rank has no worker process of its own.
        engines = [process for process, name in named if "VLLM::EngineCore" in name]
        ranks = sorted(workers or engines, key=command_of)
        for process, core in zip(ranks, rank_cores(len(ranks)), strict=True):
            for thread in process.threads():
                with contextlib.suppress(ProcessLookupError):
                    os.setpriority(os.PRIO_PROCESS, thread.id, RANKS_NICE)
            os.sched_setaffinity(process.pid, {core})

    @property
    def log(self) -> str:
        """What the server has printed so far."""
        return self._log_file.read_text(errors="replace")

    @property
    def _log_file(self) -> Path:
        assert self._log is not None
        return Path(self._log.name)

    def status(self, *, per_layer: bool = False) -> list[dict[str, Any]]:
        """The counters of every rank's balancer."""
        query = {"per_layer": per_layer}
        answer = httpx.get(f"{self.url}/moe_balancer", params=query, timeout=60)
        answer.raise_for_status()
        ranks: list[dict[str, Any]] = answer.json()["ranks"]
        return ranks

    def memory_bytes(self) -> int:
        """Resident memory of all its processes; pages that they share count in each."""
        assert self._process is not None
        total = 0
        for process in (psutil.Process(self._process.pid), *descendants(self._process.pid)):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        return total

    def worker(self, rank: int) -> int:
        """Process id of the worker of a tensor-parallel rank.

        Raises:
            RuntimeError: no process, or several, have the name that vLLM gives it.
        """
        assert self._process is not None
        name = f"VLLM::Worker_TP{rank}"
        found = [p.pid for p in descendants(self._process.pid) if name in command_of(p)]
        if len(found) != 1:
            raise RuntimeError(f"{len(found)} processes are named {name}")
        return found[0]

    def suspend(self) -> None:
        """Stops all its processes where they are: it takes no time of a core, but its memory."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Lets a suspended server go on; nothing to one that runs."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        for pid in (self._process.pid, *(p.pid for p in descendants(self._process.pid))):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def rest(self) -> None:
        """Returns when no rank takes a step any more: data-parallel ranks go on for up to 32 behind
        their last request, and what is asked of them meets each at another one.

        Raises:
            RuntimeError: they go on for RESTS_WITHIN_S.
        """
        deadline = time.monotonic() + RESTS_WITHIN_S
        before: list[int] = []
        while (now := [rank["decisions"] for rank in self.status()]) != before:
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"{self.arm.name}: {RESTS_WITHIN_S:g} s behind their last request the ranks "
                    f"still take steps: {before}, then {now} decisions"
                )
            before = now
            time.sleep(REST_LOOK_S)

    def move_to(self, map: Path) -> None:
        """Moves the experts to where a map has them.

        Raises:
            RuntimeError: the ranks refuse it.
        """
        url = f"{self.url}/moe_balancer/map"
        answer = httpx.post(url, json={"file": str(map)}, timeout=300)
        if answer.is_error:
            raise RuntimeError(f"{self.arm.name} stays where it is: {answer.text}")

    def reset(self) -> None:
        """Sets the counters to zero."""
        httpx.post(f"{self.url}/moe_balancer/reset", timeout=60).raise_for_status()

    def replay(self, settings: dict[str, Any]) -> None:
        """Replaces the routing that is replayed."""
        url = f"{self.url}/moe_balancer/replay"
        httpx.post(url, json=settings, timeout=300).raise_for_status()


def wait_until_healthy(
    process: subprocess.Popen[bytes] | Forked,
    url: str,
    log: Path,
    *,
    within_s: float,
) -> None:
    """Returns when the server answers its health check.

    Raises:
        RuntimeError: it ended, or was not healthy in time; with the end of its log.
    """
    start = time.monotonic()
    while time.monotonic() - start < within_s:
        if process.poll() is not None:
            raise RuntimeError(
                f"vllm serve ended at its start with status {process.returncode}:\n{tail(log)}"
            )
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        time.sleep(0.2)
    raise RuntimeError(f"vllm serve was not healthy after {within_s:.0f} s:\n{tail(log)}")


def tail(log: Path, num_lines: int = 60) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-num_lines:])


def environment(num_ranks: int, **more: str) -> dict[str, str]:
    """The environment of a small CPU server: one core per rank, a small KV cache, no network."""
    ours = {
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, rank_cores(num_ranks))),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    inherited = {name: value for name, value in os.environ.items() if name != "VLLM_PLUGINS"}
    return inherited | ours | more


def rank_cores(num_ranks: int) -> list[int]:
    """The core of each rank; ranks beyond the number of cores share them."""
    cores = sorted(os.sched_getaffinity(0))
    return [cores[rank % len(cores)] for rank in range(num_ranks)]


def free_port() -> int:
    """One of PORTS that nobody has.

    Raises:
        RuntimeError: all are taken.
    """
    for turn in itertools.islice(_turns, len(PORTS)):
        port = PORTS[turn % len(PORTS)]
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise RuntimeError(
        f"A server needs a TCP port, and {PORTS.start} to {PORTS.stop - 1} are all taken. "
        f"End what listens there."
    )


def stop(process: subprocess.Popen[bytes] | Forked, within_s: float = 20) -> None:
    """Asks a server that leads its own session to end, then ends what is left of the session."""
    family = descendants(process.pid)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(within_s)
    family = [*family, *descendants(process.pid)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    if process.poll() is None:
        process.kill()
    process.wait()
    psutil.wait_procs(family, timeout=10)


def command_of(process: psutil.Process) -> str:
    """Its command line, which is its title where it has set one; empty if it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def descendants(pid: int) -> list[psutil.Process]:
    """All processes of the session that a server leads, also orphaned ones."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(process.pid) == pid and process.pid != pid:
                found.append(process)
    return found
