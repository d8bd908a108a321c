"""Copies of experts into slots beside the computation: a thread on CPU, a stream on CUDA.

A copy is started when it is known, and waited for where its expert is computed. What fails is
raised there: a slot whose copy did not end well is never read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch

from vllm_balance.errors import BalancerError


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """Bring one expert into one of this rank's slots."""

    layer: int
    expert: int
    slot: int
    """Local number of the slot: its row in the layer's tensors."""


RunCopy = Callable[[Copy], None]
"""Overwrites the slot. May raise."""


class Prefetch(Protocol):
    """Runs copies in the order in which they were started."""

    def start(self, copies: Sequence[Copy]) -> None:
        """Begins copies; their slots must not be computed with at this moment."""
        ...

    def pending(self, layer: int) -> set[int]:
        """Local slots of the layer whose copy has not ended well so far."""
        ...

    def wait(self, layer: int) -> None:
        """Returns when all started copies of this layer are in place.

        Raises:
            FetchError: one of them failed, now or before.
        """
        ...

    def close(self) -> None:
        """Ends what runs in the background."""
        ...


class FetchError(BalancerError):
    """A rank could not get an expert while serving. It must end: its peers count on it."""


def failed(copy: Copy, error: BaseException) -> FetchError:
    """What a rank says when it cannot get an expert."""
    return FetchError(
        f"Expert {copy.expert} of MoE layer {copy.layer} could not be copied into slot "
        f"{copy.slot} of this rank ({type(error).__name__}: {error}), so its tokens cannot be "
        f"computed. Restart the server; `prefetch` = 'sync' tells a broken copy from a broken "
        f"thread."
    )


class SyncPrefetch:
    """Copies at once, in the thread that asks: for comparison."""

    def __init__(self, run: RunCopy) -> None:
        self._run = run

    def start(self, copies: Sequence[Copy]) -> None:
        for copy in copies:
            try:
                self._run(copy)
            except (OSError, RuntimeError, ValueError) as error:
                raise failed(copy, error) from error

    def pending(self, layer: int) -> set[int]:
        return set()

    def wait(self, layer: int) -> None:
        """Nothing is ever under way."""

    def close(self) -> None:
        """Nothing runs."""


class ThreadPrefetch:
    """One thread that copies, where its rank runs; a copy must give up the GIL meanwhile."""

    def __init__(self, run: RunCopy) -> None:
        self._run = run
        self._started: dict[int, list[tuple[Copy, Future[None]]]] = {}
        """Copies of each layer that nobody has waited for, and all of a layer with one that failed;
        touched by the rank's thread only."""
        self._thread = ThreadPoolExecutor(1, "expert-prefetch")

    def start(self, copies: Sequence[Copy]) -> None:
        for copy in copies:
            future = self._thread.submit(self._run, copy)
            self._started.setdefault(copy.layer, []).append((copy, future))

    def pending(self, layer: int) -> set[int]:
        started = [
            (copy, future)
            for copy, future in self._started.get(layer, ())
            if not future.done() or future.exception() is not None
        ]
        self._started[layer] = started
        return {copy.slot for copy, _ in started}

    def wait(self, layer: int) -> None:
        for copy, future in self._started.get(layer, ()):
            try:
                future.result()
            except (OSError, RuntimeError, ValueError) as error:
                raise failed(copy, error) from error
        self._started.pop(layer, None)

    def close(self) -> None:
        self._thread.shutdown()


class StreamPrefetch:
    """A CUDA stream that copies from pinned memory. Not measured: written without a GPU.

    Every copy waits for what the computing stream was given before :meth:`start`, so for all
    earlier uses of the slot; :meth:`wait` makes the computing stream wait, not the host.
    """

    def __init__(self, run: RunCopy) -> None:
        self._run = run
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._under_way: dict[int, tuple[set[int], torch.cuda.Event]] = {}
        """Of each layer whose copies nobody has waited for: their slots, and the last one's end."""

    def start(self, copies: Sequence[Copy]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for copy in copies:
                try:
                    self._run(copy)
                except (RuntimeError, ValueError) as error:
                    raise failed(copy, error) from error
            for layer in {copy.layer for copy in copies}:
                slots = {copy.slot for copy in copies if copy.layer == layer}
                before, _ = self._under_way.get(layer, (set(), None))
                self._under_way[layer] = (before | slots, self._stream.record_event())

    def pending(self, layer: int) -> set[int]:
        slots, event = self._under_way.get(layer, (set(), None))
        if event is not None and event.query():  # type: ignore[no-untyped-call]
            del self._under_way[layer]
            return set()
        return slots

    def wait(self, layer: int) -> None:
        _, event = self._under_way.pop(layer, (set(), None))
        if event is not None:
            torch.cuda.current_stream().wait_event(event)

    def close(self) -> None:
        self._stream.synchronize()
