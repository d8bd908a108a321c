"""A slowed process is stopped again and again, and runs freely behind the block."""

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from bench import slow_rank
from bench.placed import TOLERANCE, Slowed, slowdowns
from bench.server import command_of
from bench.slow_rank import STOP_S, Waits, slowed, waited_s
from bench.starts import plan


@pytest.fixture
def spinning():
    """A process that does nothing but compute."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    yield psutil.Process(process.pid)
    process.kill()
    process.wait()


def governors() -> list[psutil.Process]:
    children = psutil.Process().children()
    return [child for child in children if "bench.slow_rank" in command_of(child)]


def seen(process: psutil.Process, status: str, within_s: float = 20) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if process.status() == status:
            return True
    return False


def test_stopped_within_and_running_behind(spinning):
    with slowed(spinning.pid, 1.5):
        (governor,) = governors()
        assert seen(spinning, psutil.STATUS_STOPPED)
        assert seen(spinning, psutil.STATUS_RUNNING)
    assert not governor.is_running()
    assert spinning.status() != psutil.STATUS_STOPPED


def speed(pid: int, for_s: float = 0.3) -> float:
    """Time on a core per time by the clock.

    In real time, where that is allowed, so that only the process's stops take its core away; and no
    longer than needed, because nothing else has that core meanwhile.
    """
    clock = (~pid << 3) | 2  # The process's own, see clock_getcpuclockid(3).
    with in_real_time(pid):
        start, before = time.perf_counter(), time.clock_gettime(clock)
        time.sleep(for_s)
        return (time.clock_gettime(clock) - before) / (time.perf_counter() - start)


@contextlib.contextmanager
def in_real_time(pid: int):
    try:
        os.sched_setscheduler(pid, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:
        yield
        return
    try:
        yield
    finally:
        os.sched_setscheduler(pid, os.SCHED_OTHER, os.sched_param(0))


def test_a_busy_process_is_slower_by_the_factor(spinning):
    """By the times in which nobody else had its core: others run in its stops, too, which then
    slow it less."""
    shown = []
    before = speed(spinning.pid)
    for _ in range(9):
        with slowed(spinning.pid, 1.28):
            slow = speed(spinning.pid)
        behind = speed(spinning.pid)
        shown += [before / slow] if min(before, behind) > 0.97 else []
        before = behind
    if len(shown) < 5:
        pytest.skip("other processes had the core of the busy one meanwhile")
    assert statistics.median(shown) == pytest.approx(1.28, abs=TOLERANCE)


class Machine:
    """A process that always computes, on a core that others take as soon as it is stopped.

    Args:
        waits_s: after each stop until it has the core back.
        late_s: what every sleep of the governor takes too long.
    """

    pid = 1

    def __init__(self, monkeypatch, waits_s: float, late_s: float) -> None:
        self._waits_s, self._late_s = waits_s, late_s
        self._runs_from, self._stopped, self._num_runs = 0.0, False, 1
        self.now = self.ran_s = 0.0
        monkeypatch.setattr(slow_rank, "time", self)
        monkeypatch.setattr(slow_rank.os, "kill", self.kill)
        monkeypatch.setattr(slow_rank.os, "sched_setscheduler", lambda *_: None)
        monkeypatch.setattr(slow_rank.signal, "signal", lambda *_: None)
        monkeypatch.setattr(Waits, "of", lambda pid: self.counted())

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        end = self.now + seconds + self._late_s
        if not self._stopped:
            self.ran_s += max(0.0, end - max(self.now, self._runs_from))
        self.now = end
        if self.now > 10:
            raise ProcessLookupError

    def kill(self, pid: int, number: int) -> None:
        if number == signal.SIGCONT and self._stopped:
            self._runs_from, self._num_runs = self.now + self._waits_s, self._num_runs + 1
        self._stopped = number == signal.SIGSTOP

    def counted(self) -> Waits:
        is_waiting = not self._stopped and self.now < self._runs_from
        times = self._num_runs - is_waiting
        return Waits(times, round(times * self._waits_s * 1e9))


@pytest.mark.parametrize("factor", [1.08, 1.28])
@pytest.mark.parametrize(("waits_s", "late_s"), [(0.0, 0.0), (0.0007, 0.0), (0.0015, 0.0003)])
def test_the_wait_for_the_core_is_part_of_the_stop(monkeypatch, factor, waits_s, late_s):
    machine = Machine(monkeypatch, waits_s, late_s)
    slow_rank.main(machine.pid, factor)
    assert machine.now / machine.ran_s == pytest.approx(factor, abs=0.01)


class Looks:
    """What the kernel counts of a process at each look, a millisecond apart, the last for ever."""

    def __init__(self, monkeypatch, *counted: tuple[int, float]) -> None:
        self.now, self.counted = 0.0, [Waits(times, int(s * 1e9)) for times, s in counted]
        clock = SimpleNamespace(perf_counter=lambda: self.now, sleep=lambda _: None)
        monkeypatch.setattr(slow_rank, "time", clock)
        monkeypatch.setattr(Waits, "of", self.look)

    def look(self, pid: int) -> Waits:
        self.now += 0.001
        return self.counted.pop(0) if len(self.counted) > 1 else self.counted[0]


def test_the_wait_for_a_core_after_a_stop_is_what_the_kernel_counted(monkeypatch):
    Looks(monkeypatch, (7, 3.0), (7, 3.0), (8, 3.0015))
    assert waited_s(1, Waits(7, 3_000_000_000), 0.0) == pytest.approx(0.0015)


def test_a_wait_counts_as_no_more_than_one_stop(monkeypatch):
    Looks(monkeypatch, (7, 3.0))
    assert waited_s(1, Waits(7, 3_000_000_000), 0.0) == STOP_S
    Looks(monkeypatch, (7, 3.0), (8, 4.0))
    assert waited_s(1, Waits(7, 3_000_000_000), 0.0) == STOP_S


def test_a_wait_from_before_the_stop_s_end_and_none_at_all_do_not_count(monkeypatch):
    Looks(monkeypatch, (8, 4.0))
    assert waited_s(1, Waits(7, 3_000_000_000), 0.0) == pytest.approx(0.001)
    assert waited_s(1, Waits(0, 0), 0.0) == 0.0
    Looks(monkeypatch, (0, 0.0))  # The process has ended.
    assert waited_s(1, Waits(7, 3_000_000_000), 0.0) == 0.0


@pytest.mark.skipif(
    not Path("/proc/self/schedstat").exists(), reason="a kernel that counts no waits"
)
def test_the_kernel_counts_waits_of_a_process_and_nothing_of_none(spinning):
    assert Waits.of(spinning.pid).times > 0
    assert Waits.of(os.getpid()).times > 0
    assert Waits.of(2**22 + 1) == Waits(0, 0)


def test_a_governor_that_was_killed_leaves_nothing_stopped(spinning):
    with pytest.raises(RuntimeError, match="ended, or may not"), slowed(spinning.pid, 1.5):
        (governor,) = governors()
        governor.kill()
        governor.wait()
    assert spinning.status() != psutil.STATUS_STOPPED


def test_factors(spinning):
    with slowed(spinning.pid, 1.0):
        assert governors() == []
    with pytest.raises(ValueError, match="cannot be made faster"), slowed(spinning.pid, 0.9):
        pass


def test_no_such_process():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with pytest.raises(RuntimeError), slowed(ended.pid, 1.5):
        pass


def test_an_arm_whose_map_knows_the_slowdown_has_a_server_for_each():
    settings = {
        "slow": [1, 1.16],
        "arms": {"static": {}, "eplb": {"place": "eplb"}, "gem": {"place": "gem"}},
    }
    load = {"load": {"requests": 1, "prompt_tokens": 1, "max_tokens": 1}}
    starts = [(start.arm, start.factors) for start in plan(settings | load, rounds=1)]
    forth = [
        ("static", (1.0, 1.16)),
        ("eplb", (1.0, 1.16)),
        ("gem", (1.0,)),
        ("gem", (1.16,)),
    ]
    assert starts == forth + forth[::-1]
    assert plan({"arms": {"static": {}}} | load, rounds=1)[0].factors == (1.0,)


def test_a_case_may_slow_another_rank():
    settings = {
        "slow": [1.16],
        "in_turns": True,
        "arms": {"static": {}, "gem": {"place": "gem"}},
        "load": {"requests": 1, "prompt_tokens": 1, "max_tokens": 1},
        "cases": {"first": {"slow_rank": 0}, "second": {}, "more": {"slow": [1.16, 1.28]}},
    }
    starts = plan(settings, rounds=1)
    assert [(start.case, start.arm, start.slow_rank, start.factors) for start in starts] == [
        ("first", "static", 0, (1.16,)),
        ("first", "gem", 0, (1.16,)),
        ("second", "static", 1, (1.16,)),
        ("second", "gem", 1, (1.16,)),
        ("more", "static", 1, (1.16, 1.28)),
        ("more", "gem", 1, (1.16,)),
        ("more", "gem", 1, (1.28,)),
    ]
    assert slowdowns(settings) == [Slowed(0, 1.16), Slowed(1, 1.16), Slowed(1, 1.28)]
    assert slowdowns({}) == [Slowed(1, 1.0)]
