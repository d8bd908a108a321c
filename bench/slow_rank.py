"""Makes one process slower by a known factor: stopped and continued many times a second.

    python -m bench.slow_rank PID FACTOR

The process gets no say and no hint, as on a slower device or beside a greedy neighbour. After every
run it is stopped for `ran * (FACTOR - 1)`, taken from the clock, and a stop that lasted too long is
made up for by the next, so late wake-ups of this script do not change the factor. The stops are
shorter than a MoE layer takes; real-time scheduling, where it is allowed, keeps them so.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Annotated

import typer

from bench.provenance import ROOT

STOP_S = 0.002


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
            finally:
                os.kill(pid, signal.SIGCONT)
            if not told:
                print("slowing", flush=True)
                told = True
            continued = time.perf_counter()
            owed_s -= continued - stopped
            time.sleep(STOP_S / (factor - 1))
            owed_s += (time.perf_counter() - continued) * (factor - 1)


if __name__ == "__main__":
    typer.run(main)
