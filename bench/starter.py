"""Starts many servers and imports vLLM once.

On the CPU vLLM spawns its processes: API server, engine and workers import torch and vLLM one
after the other, a minute per server on a slow core. Here one process imports them, and every server
is forked from it, its own processes included, as vLLM does by itself on GPUs.

A forked worker takes over the OpenMP library and the number of its threads, one. vLLM would bind
that thread to a core by an environment that is read no more; `bench.server` binds it.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import setproctitle

IMPORTED = (
    "vllm.entrypoints.cli.main",
    "vllm.entrypoints.cli.serve",
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.qwen3_moe",
)
"""What servers import, except vllm-balance: that must come in as vLLM's plugin."""


class Starter:
    """The process from which servers are forked; it ends with this one."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "LD_PRELOAD": openmp()},
        )

    def start(
        self, command: list[str], *, log: Path, environ: dict[str, str], folder: Path | None = None
    ) -> Forked:
        """Forks `vllm ...`, which leads a session of its own and prints to `log`."""
        where = str(folder or Path.cwd())
        pid = self.ask(command=command, log=str(log), environ=environ, folder=where)
        return Forked(self, pid)

    def ask(self, **request: Any) -> Any:
        """The answer to one request: a process id to `command`, a status to `pid`.

        Raises:
            RuntimeError: the process has ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        answer = ""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the process that forks servers has ended; its error is above")
        return json.loads(answer)


class Forked:
    """A forked server, with those methods of subprocess.Popen that are used."""

    def __init__(self, starter: Starter, pid: int) -> None:
        self._starter, self.pid = starter, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._starter.ask(pid=self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (timeout or float("inf"))
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.05)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@cache
def starter() -> Starter:
    """The one of this process."""
    return Starter()


def openmp() -> str:
    """For LD_PRELOAD what vLLM's CPU platform preloads in its workers: torch's OpenMP library."""
    folder = Path(find_spec("torch").origin).parent / "lib"
    return ":".join(
        [*filter(None, [os.environ.get("LD_PRELOAD")]), *map(str, folder.glob("libgomp*.so*"))]
    )


def main() -> int | None:
    """Serves requests until nobody asks any more, then ends what is left of its servers: who asked
    may have been killed. A forked child returns from here as `vllm`."""
    # They may be meant for a whole group of processes: who asks ends its servers first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What imports print is no answer.
    for name in IMPORTED:
        import_module(name)
    servers = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "pid" in request:
            answer = status_of(request["pid"])
            if answer is not None:  # Its number may become another process's.
                servers.discard(request["pid"])
        elif (answer := os.fork()) == 0:
            return run(request)
        else:
            servers.add(answer)
        print(json.dumps(answer), file=answers, flush=True)
    end_sessions(servers)
    return None


def end_sessions(leaders: set[int]) -> None:
    """Kills every process of these sessions, also those that are stopped, until none is left."""
    found = bool(leaders)
    while found:
        found = False
        for process in psutil.process_iter(["status"]):
            with contextlib.suppress(ProcessLookupError):
                dead = process.info["status"] == psutil.STATUS_ZOMBIE
                # A leader has no session of its own until it has begun to run.
                if not dead and leaders & {process.pid, os.getsid(process.pid)}:
                    os.kill(process.pid, signal.SIGKILL)
                    found = True


def status_of(pid: int) -> int | None:
    """Exit status of a child, negative for a signal; None while it runs."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def run(request: dict[str, Any]) -> int | None:
    """In the forked process: becomes `vllm ...`."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, of in enumerate((nothing, log, log)):
        os.dup2(of, descriptor)
    os.chdir(request["folder"])
    setproctitle.getproctitle()  # Finds the place of the title, which it cannot later.
    os.environ.clear()
    os.environ.update(request["environ"])
    added = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [folder for folder in added if folder and folder not in sys.path]
    sys.argv = request["command"]
    get_context = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: get_context(method and "fork")
    let_api_servers_share_metrics()
    return import_module("vllm.entrypoints.cli.main").main()


def let_api_servers_share_metrics() -> None:
    """Several API servers keep metrics in files, which Prometheus decides when it is imported."""
    serve = import_module("vllm.entrypoints.cli.serve")
    values = import_module("prometheus_client.values")
    set_up = serve.setup_multiprocess_prometheus

    def set_up_and_decide_again() -> None:
        set_up()
        values.ValueClass = values.get_value_class()

    serve.setup_multiprocess_prometheus = set_up_and_decide_again


if __name__ == "__main__":
    sys.exit(main())
