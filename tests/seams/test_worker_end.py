"""A fetch that fails ends a worker process of vLLM's, and is an exception anywhere else."""

import multiprocessing
import os
import signal
import socket
import sys
from types import SimpleNamespace

import pytest

from vllm_balance.config import BalancerConfig
from vllm_balance.experts.prefetch import Copy, FetchError, SyncPrefetch, ThreadPrefetch
from vllm_balance.kernels.rebalance import Rules
from vllm_balance.seams.worker import BalancedWorker
from vllm_balance.seams.worker_end import EndingPrefetch, for_executor, own_signals
from vllm_balance.worker_balancer import WorkerBalancer

COPY = Copy(layer=3, expert=5, slot=9)


def broken(copy: Copy) -> None:
    raise OSError("page is gone")


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """What is logged. A process that would end raises SystemExit instead."""
    lines: list[str] = []
    logger = SimpleNamespace(exception=lambda text, *values: lines.append(text % values))
    monkeypatch.setattr("vllm.logger.init_logger", lambda name: logger)
    monkeypatch.setattr("os._exit", sys.exit)
    return lines


@pytest.mark.parametrize("executor", ["mp", "ray"])
@pytest.mark.parametrize("kind", [SyncPrefetch, ThreadPrefetch])
def test_a_worker_process_that_cannot_get_an_expert_says_so_and_ends(kind, executor, said):
    prefetch = for_executor(kind(broken), executor)
    with pytest.raises(SystemExit) as ended:
        prefetch.start([COPY])
        prefetch.wait(3)
    prefetch.close()
    assert ended.value.code == 1
    assert len(said) == 1
    assert "Expert 5 of MoE layer 3" in said[0] and "page is gone" in said[0]


@pytest.mark.parametrize("executor", ["uni", "external_launcher", object])
def test_elsewhere_the_error_reaches_the_caller(executor, said):
    prefetch = for_executor(SyncPrefetch(broken), executor)
    with pytest.raises(FetchError, match="Expert 5"):
        prefetch.start([COPY])
    assert said == []


def test_a_process_goes_on_while_copies_end_well_and_after_other_errors(said):
    done: list[Copy] = []
    prefetch = for_executor(ThreadPrefetch(done.append), "mp")
    prefetch.start([COPY])
    prefetch.wait(3)
    assert done == [COPY] and prefetch.pending(3) == set()
    prefetch.close()
    with pytest.raises(RuntimeError, match="shutdown"):
        prefetch.start([COPY])
    assert said == []


@pytest.mark.parametrize(("executor", "ends"), [("mp", True), ("uni", False)])
def test_a_worker_asks_which_executor_runs_it(executor, ends, monkeypatch):
    asked = []

    def rules(knee_tokens, costs):
        asked.append((knee_tokens, costs))
        return Rules(threshold_tokens=4, fetch_tokens=4)

    shared = SimpleNamespace(
        prefetch=SyncPrefetch(broken),
        rules=rules,
        connect=lambda layers, knee_tokens: None,
    )
    monkeypatch.setattr("vllm_balance.seams.worker.ModelSlots", lambda *arguments: shared)
    monkeypatch.setattr("vllm_balance.seams.worker.measured_costs", lambda *_: ["of a profile"])
    monkeypatch.setattr("vllm.distributed.get_ep_group", lambda: None)
    worker = BalancedWorker()
    worker.balancer_config = BalancerConfig(name="harmoeny")
    worker.worker_balancer = WorkerBalancer(balancer="harmoeny", rank=0)
    parallel = SimpleNamespace(distributed_executor_backend=executor)
    worker._knee = 4.0, 2.0
    worker._bind_slots(SimpleNamespace(parallel_config=parallel), [])
    assert isinstance(shared.prefetch, EndingPrefetch) == ends
    assert asked == [(4.0, ["of a profile"])]


def _terminated(executor: str) -> None:
    own_signals(executor)
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pause()


@pytest.mark.parametrize(("executor", "own"), [("mp", True), ("uni", False)])
def test_what_terminates_a_forked_worker_does_not_reach_the_server(executor, own):
    """The event loop of the process that forks is woken where a worker is not on its own."""
    loop, wakes = socket.socketpair()
    loop.settimeout(1)
    wakes.setblocking(False)
    before = signal.set_wakeup_fd(wakes.fileno())
    try:
        worker = multiprocessing.get_context("fork").Process(target=_terminated, args=(executor,))
        worker.start()
        worker.join(timeout=60)
    finally:
        signal.set_wakeup_fd(before)
    assert worker.exitcode == 0
    if own:
        with pytest.raises(TimeoutError):
            loop.recv(1)
    else:
        assert signal.SIGTERM in loop.recv(16)


def test_a_process_that_was_not_forked_keeps_its_event_loop():
    loop, wakes = socket.socketpair()
    wakes.setblocking(False)
    before = signal.set_wakeup_fd(wakes.fileno())
    try:
        own_signals("mp")
        assert signal.set_wakeup_fd(before) == wakes.fileno()
    finally:
        signal.set_wakeup_fd(before)
        loop.close()
        wakes.close()
