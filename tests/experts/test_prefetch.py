"""Copies beside the computation: in order, waited for, never taken for done when they failed."""

import os
import threading

import pytest

from vllm_balance.errors import BalancerError
from vllm_balance.experts.prefetch import Copy, SyncPrefetch, ThreadPrefetch


def copies(*slots: int, layer: int = 0) -> list[Copy]:
    return [Copy(layer=layer, expert=10 + slot, slot=slot) for slot in slots]


@pytest.fixture
def thread():
    """Makes a prefetch whose thread is ended behind the test."""
    made = []

    def make(run, **options) -> ThreadPrefetch:
        made.append(ThreadPrefetch(run, **options))
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
    prefetch.start(copies(2))
    prefetch.wait(0)
    assert prefetch.pending(0) == set()
    prefetch.wait(0)


@pytest.mark.parametrize("error", [RuntimeError("bad page"), OSError("gone"), ValueError("x")])
def test_a_copy_that_fails_is_an_error_where_it_is_waited_for(thread, error):
    def run(copy: Copy) -> None:
        if copy.slot == 1:
            raise error

    prefetch = thread(run)
    prefetch.start(copies(0, 1, 2))
    with pytest.raises(BalancerError, match=r"Expert 11 of MoE layer 0 .* slot 1") as raised:
        prefetch.wait(0)
    assert raised.value.__cause__ is error
    with pytest.raises(BalancerError, match="Expert 11"):
        SyncPrefetch(run).start(copies(0, 1, 2))


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


def test_the_thread_runs_where_it_is_told_and_else_where_its_rank_runs(thread):
    found = []
    own = os.sched_getaffinity(0)
    core = {max(own)}
    for cores in (None, core):
        prefetch = thread(lambda copy: found.append(os.sched_getaffinity(0)), cores=cores)
        prefetch.start(copies(0))
        prefetch.wait(0)
    assert found == [own, core]
    assert os.sched_getaffinity(0) == own


def test_synchronous_copies_are_done_when_started():
    done = []
    prefetch = SyncPrefetch(done.append)
    prefetch.start(copies(0, 1))
    assert done == copies(0, 1) and prefetch.pending(0) == set()
    prefetch.wait(0)
    prefetch.close()
