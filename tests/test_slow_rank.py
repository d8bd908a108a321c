"""A slowed process is stopped again and again, and runs freely behind the block."""

import subprocess
import sys
import time

import psutil
import pytest

from bench.placed import Slowed, slowdowns
from bench.slow_rank import slowed
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
    return [child for child in children if "bench.slow_rank" in child.cmdline()]


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
