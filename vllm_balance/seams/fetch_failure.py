"""A fetch that fails in a worker process ends it, so that vLLM's engine notices at once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vllm_balance.experts.prefetch import Copy, FetchError, Prefetch


def for_executor(prefetch: Prefetch, executor: Any) -> Prefetch:
    """The prefetch as a rank of this executor needs it.

    Args:
        executor: vLLM's ``distributed_executor_backend``. Only ``mp`` watches processes of its
            own; elsewhere an exception reaches those who can end the engine.
    """
    return EndingPrefetch(prefetch) if executor == "mp" else prefetch


class EndingPrefetch:
    """A prefetch that ends the process where another one raises.

    vLLM's worker process catches every exception and answers for one rank only. Any other rank
    would go on to the next call, and its peers would wait for it in a collective until the call
    times out, minutes later. That a process is gone is seen at once.
    """

    def __init__(self, prefetch: Prefetch) -> None:
        self._prefetch = prefetch

    def start(self, copies: Sequence[Copy]) -> None:
        with _ends_process():
            self._prefetch.start(copies)

    def pending(self, layer: int) -> set[int]:
        return self._prefetch.pending(layer)

    def wait(self, layer: int) -> None:
        with _ends_process():
            self._prefetch.wait(layer)

    def close(self) -> None:
        self._prefetch.close()


@contextmanager
def _ends_process() -> Iterator[None]:
    """Logs a fetch that fails inside and ends the process with status 1, without clean-up: that
    of a process group waits for the other ranks."""
    try:
        yield
    except FetchError as error:
        from vllm.logger import init_logger

        init_logger(f"vllm.{__name__}").exception("This worker ends. %s", error)
        os._exit(1)
