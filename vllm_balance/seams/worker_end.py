"""What fails in a worker process ends it, so that vLLM's engine notices at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import current_process
from multiprocessing.context import ForkProcess
from threading import current_thread, main_thread
from typing import Any

from vllm_balance.experts.prefetch import Copy, FetchError, Prefetch

WATCHED = ("mp", "ray")
"""Executors of vLLM whose processes catch every exception and are watched for their end; with
others an exception reaches those who can end the engine."""


def for_executor(prefetch: Prefetch, executor: Any) -> Prefetch:
    """The prefetch as a rank of this executor needs it.

    Args:
        executor: vLLM's ``distributed_executor_backend``.
    """
    return EndingPrefetch(prefetch) if executor in WATCHED else prefetch


class EndingPrefetch:
    """A prefetch that ends the process where another one raises.

    vLLM's worker process catches every exception and answers for one rank only. Any other rank
    would go on to the next call, and its peers would wait for it in a collective until the call
    times out, minutes later. That a process is gone is seen at once.
    """

    def __init__(self, prefetch: Prefetch) -> None:
        self._prefetch = prefetch

    def start(self, copies: Sequence[Copy]) -> None:
        with ends_process(FetchError):
            self._prefetch.start(copies)

    def pending(self, layer: int) -> set[int]:
        return self._prefetch.pending(layer)

    def wait(self, layer: int) -> None:
        with ends_process(FetchError):
            self._prefetch.wait(layer)

    def close(self) -> None:
        self._prefetch.close()


def own_signals(executor: Any) -> None:
    """From now on a signal to this worker is none to the process that it was forked from.

    A fork inherits the file descriptor that wakes the event loop of vLLM's API server. A worker
    that is gone has vLLM terminate its peers, which the server would then take for its own end: it
    would stop without telling the requests that run, and wait for their clients to give up.

    Args:
        executor: vLLM's ``distributed_executor_backend``; some keep a worker in their own process.
    """
    is_forked = executor in WATCHED and isinstance(current_process(), ForkProcess)
    if is_forked and current_thread() is main_thread():
        signal.set_wakeup_fd(-1)


@contextmanager
def ends_process(kind: type[Exception]) -> Iterator[None]:
    """Logs an exception of this kind and ends the process with status 1, without clean-up: that of
    a process group waits for the other ranks."""
    try:
        yield
    except kind as error:
        from vllm.logger import init_logger

        init_logger(f"vllm.{__name__}").exception("This worker ends. %s", error)
        os._exit(1)
