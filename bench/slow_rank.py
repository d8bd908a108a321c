"""Makes one process slower by a known factor: stopped and continued many times a second.

    python -m bench.slow_rank PID FACTOR

The process gets no say and no hint, as on a slower device or beside a greedy neighbour. After every
run it is stopped for `ran * (FACTOR - 1)`, taken from the clock, and a stop that lasted too long is
made up for by a longer run, so late wake-ups of this script do not change the factor. The stops are
shorter than a MoE layer takes; real-time scheduling, where it is allowed, keeps them so.

While it is stopped, others may take its core, and then it waits for the core although it may run
again. Without this script it would not have given the core away, so that wait is a part of the
stop; the kernel counts it (`/proc/PID/schedstat`). All other time counts as run, also that in which
the process waits for its peer: stops fall into working and waiting time alike, so that work takes
FACTOR times as long however little of it there is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from bench.provenance import ROOT

STOP_S = 0.002
LOOK_S = 0.0002
"""Between two looks whether the process has its core back."""


class Waits(NamedTuple):
    """How often the first thread of a process got a core, and how long it waited for one, ns."""

    times: int
    waited_ns: int

    @classmethod
    def of(cls, pid: int) -> Waits:
        """Zeros where the kernel does not count them, and of a process that is gone."""
        try:
            counted = Path(f"/proc/{pid}/schedstat").read_text().split()
        except OSError:
            return cls(0, 0)
        return cls(int(counted[2]), int(counted[1]))


@contextlib.contextmanager
def slowed(pid: int, factor: float) -> Iterator[None]:
    """Slows a process down inside the block, from its first line on, and not behind it.

    Raises:
        ValueError: a factor below 1.
        RuntimeError: there is no such process, it may not be stopped, or it ended.
    """
    if factor < 1:
        raise ValueError(f"a rank cannot be made faster: {factor}")
    if factor == 1:
        yield
        return
    command = [sys.executable, "-m", "bench.slow_rank", str(pid), str(factor)]
    governor = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert governor.stdout is not None
        started = governor.stdout.readline()
        if started:
            yield
        if not started or governor.poll() is not None:
            raise RuntimeError(f"process {pid} ended, or may not be stopped")
    finally:
        governor.terminate()
        governor.wait()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def main(pid: Annotated[int, typer.Argument()], factor: Annotated[float, typer.Argument()]) -> None:
    """Stop and continue a process until this one is terminated or the other ends."""
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    owed_s, told = STOP_S, False
    with contextlib.suppress(ProcessLookupError):
        while True:
            stopped = time.perf_counter()
            os.kill(pid, signal.SIGSTOP)
            try:
                time.sleep(max(owed_s, 0.0))
                before = Waits.of(pid)
            finally:
                os.kill(pid, signal.SIGCONT)
            continued = time.perf_counter()
            if not told:
                print("slowing", flush=True)
                told = True
            runs = continued + waited_s(pid, before, continued)
            owed_s -= runs - stopped
            time.sleep(max(STOP_S - owed_s, 0.0) / (factor - 1))
            owed_s += (time.perf_counter() - runs) * (factor - 1)


def waited_s(pid: int, before: Waits, continued: float) -> float:
    """How long a process waited for its core once it was continued: at most as long as one stop.

    A process that waits for something else gets the core for a moment too, as it leaves the stop.

    Args:
        before: counted just before it was continued.
        continued: when that was, by time.perf_counter.
    """
    if before.times == 0:
        return 0.0
    while (now := Waits.of(pid)).times == before.times:
        if time.perf_counter() - continued > STOP_S:
            return STOP_S
        time.sleep(LOOK_S)
    waited = (now.waited_ns - before.waited_ns) / 1e9
    return min(max(waited, 0.0), time.perf_counter() - continued, STOP_S)


if __name__ == "__main__":
    typer.run(main)
