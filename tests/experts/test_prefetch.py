"""Copies beside the computation: in order, waited for, never taken for done when they failed."""

import threading
from contextlib import contextmanager
from typing import ClassVar

import pytest
import torch

from vllm_balance.errors import BalancerError
from vllm_balance.experts.prefetch import (
    Copy,
    FetchError,
    StreamPrefetch,
    SyncPrefetch,
    ThreadPrefetch,
)


def copies(*slots: int, layer: int = 0) -> list[Copy]:
    return [Copy(layer=layer, expert=10 + slot, slot=slot) for slot in slots]


@pytest.fixture
def thread():
    """Makes a prefetch whose thread is ended behind the test."""
    made = []

    def make(run) -> ThreadPrefetch:
        made.append(ThreadPrefetch(run))
        return made[-1]

    yield make
    for prefetch in made:
        prefetch.close()


def test_the_thread_copies_in_order_while_the_rank_goes_on(thread):
    gate, done = threading.Event(), []

    def run(copy: Copy) -> None:
        gate.wait(30)
        done.append(copy)

    prefetch = thread(run)
    started = [*copies(0, 1), *copies(1, layer=1), *copies(0)]
    prefetch.start(started)
    assert prefetch.pending(0) == {0, 1} and prefetch.pending(1) == {1}
    assert done == []
    gate.set()
    prefetch.wait(1)
    assert done[:3] == started[:3], "earlier copies of other layers ran first"
    prefetch.wait(0)
    assert done == started
    assert prefetch.pending(0) == prefetch.pending(1) == set()


def test_a_copy_that_has_arrived_is_not_pending_without_a_wait(thread):
    arrived = threading.Event()
    prefetch = thread(lambda copy: arrived.set() if copy.slot == 1 else None)
    prefetch.start(copies(0, 1))
    assert arrived.wait(30)
    prefetch.start(copies(2, layer=1))
    prefetch.wait(1)
    assert prefetch.pending(0) == set()


@pytest.mark.parametrize("error", [RuntimeError("bad page"), OSError("gone"), ValueError("x")])
def test_a_copy_that_fails_is_an_error_where_it_is_waited_for(thread, error):
    def run(copy: Copy) -> None:
        if copy.slot == 1:
            raise error

    prefetch = thread(run)
    prefetch.start(copies(0, 1, 2))
    with pytest.raises(FetchError, match=r"Expert 11 of MoE layer 0 .* slot 1") as raised:
        prefetch.wait(0)
    assert raised.value.__cause__ is error and isinstance(raised.value, BalancerError)
    with pytest.raises(FetchError, match="Expert 11"):
        SyncPrefetch(run).start(copies(0, 1, 2))


def test_who_waits_again_for_a_failed_copy_is_told_again(thread):
    def run(copy: Copy) -> None:
        if copy.slot == 1:
            raise RuntimeError("no")

    prefetch = thread(run)
    prefetch.start([*copies(0, 1, 2), *copies(0, layer=3)])
    for _ in range(2):
        with pytest.raises(FetchError, match="slot 1"):
            prefetch.wait(0)
    prefetch.wait(3)  # All copies of layer 0 have ended before.
    assert prefetch.pending(0) == {1}
    with pytest.raises(FetchError, match="slot 1"):
        prefetch.wait(0)


def test_a_failed_copy_stays_pending_so_that_its_slot_is_never_computed_with(thread):
    ended = threading.Event()

    def run(copy: Copy) -> None:
        if copy.slot == 2:
            ended.set()
            return
        raise RuntimeError("no")

    prefetch = thread(run)
    prefetch.start(copies(0, 2))
    assert ended.wait(30)
    prefetch.start(copies(2, layer=3))
    prefetch.wait(3)
    assert prefetch.pending(0) == {0}


def test_synchronous_copies_are_done_when_started():
    done = []
    prefetch = SyncPrefetch(done.append)
    prefetch.start(copies(0, 1))
    assert done == copies(0, 1) and prefetch.pending(0) == set()
    prefetch.wait(0)
    prefetch.close()


class FakeEvent:
    """An event that lies behind copies, which end when a test says so."""

    ended: ClassVar[set[int]] = set()

    def __init__(self, number: int) -> None:
        self.number = number

    def query(self) -> bool:
        return self.number in self.ended


class FakeStream:
    """Writes down what a CUDA stream is asked for; its events are numbered."""

    def __init__(self, name: str, said: list[str]) -> None:
        self.name, self.said, self.events = name, said, 0

    def wait_stream(self, other: "FakeStream") -> None:
        self.said.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> "FakeEvent":
        self.events += 1
        self.said.append(f"{self.name} records {self.events}")
        return FakeEvent(self.events)

    def wait_event(self, event: "FakeEvent") -> None:
        self.said.append(f"{self.name} waits for event {event.number}")

    def synchronize(self) -> None:
        self.said.append(f"{self.name} ends")


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """What the streams were asked for, in order."""
    lines: list[str] = []
    computing = FakeStream("computing", lines)

    @contextmanager
    def on(stream: FakeStream):
        lines.append(f"on {stream.name}")
        yield
        lines.append(f"off {stream.name}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda: FakeStream("copying", lines))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: computing)
    monkeypatch.setattr(torch.cuda, "stream", on)
    return lines


def test_a_stream_copies_behind_what_computes_and_what_computes_waits_for_its_event(said):
    prefetch = StreamPrefetch(lambda copy: said.append(f"copy {copy.layer} {copy.slot}"))
    prefetch.start([*copies(0, 1), *copies(1, layer=1)])
    assert said == [
        "copying waits for computing",
        "on copying",
        "copy 0 0",
        "copy 0 1",
        "copy 1 1",
        "copying records 1",
        "copying records 2",
        "off copying",
    ]
    said.clear()
    assert prefetch.pending(0) == {0, 1} and prefetch.pending(1) == {1}
    prefetch.wait(0)
    assert prefetch.pending(0) == prefetch.pending(2) == set(), "what is given now runs behind it"
    prefetch.wait(0)
    prefetch.wait(2)
    assert said == ["computing waits for event 1"], "once, and for its own layer only"
    prefetch.wait(1)
    prefetch.close()
    assert said[1:] == ["computing waits for event 2", "copying ends"]


def test_copies_of_a_stream_that_have_ended_are_not_pending(said, monkeypatch):
    prefetch = StreamPrefetch(lambda copy: None)
    prefetch.start(copies(0))
    prefetch.start(copies(2))
    monkeypatch.setattr(FakeEvent, "ended", {1})
    assert prefetch.pending(0) == {0, 2}, "the copies end in order, and the last one has not"
    monkeypatch.setattr(FakeEvent, "ended", {1, 2})
    assert prefetch.pending(0) == set()
    said.clear()
    prefetch.wait(0)
    assert said == []


def test_a_copy_that_a_stream_refuses_is_an_error_at_once(said):
    def run(copy: Copy) -> None:
        raise RuntimeError("no kernel image")

    with pytest.raises(FetchError, match="no kernel image"):
        StreamPrefetch(run).start(copies(0))
