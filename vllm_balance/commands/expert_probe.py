"""Times vLLM's own expert kernel on several ranks at once, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Protocol

from vllm_balance.errors import BalancerError
from vllm_balance.model_shape import ModelShape

SECONDS = 0.25
"""Time that the repeats of one sample may take; at least MIN_REPEATS are made."""
MIN_REPEATS = 3
MAX_REPEATS = 15
_TIMEOUT, _START_TIMEOUT = 120.0, 600.0
"""Seconds after which a rank that does not answer counts as dead; while it imports torch first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One sample on one rank."""

    time_us: float
    """Median of the repeats."""
    repeats: int


class Kernel(Protocol):
    """vLLM's kernel with the experts of one rank, in its process."""

    def time(self, tokens_E: Sequence[int], repeats: int | None) -> Timing:
        """Times a batch, tokens per activated expert, so many times or as often as fits."""


class Probe:
    """The rank processes; every sample runs on all of them at the same time."""

    def __init__(self, connections: Sequence[Connection], pids: Sequence[int]) -> None:
        self._connections = connections
        self.pids = tuple(pids)
        """The process of each rank."""

    def measure(self, tokens_E: Sequence[int], repeats: int | None = None) -> list[Timing]:
        """Times the same batch, tokens per activated expert, on every rank.

        Raises:
            BalancerError: a rank died.
        """
        return self.measure_each([tokens_E] * len(self._connections), repeats=repeats)

    def measure_each(
        self, tokens_SE: Sequence[Sequence[int]], *, repeats: int | None = None
    ) -> list[Timing]:
        """Times one batch per rank, each as tokens per activated expert, at least one token.

        With one repeat the ranks begin together, as they do in a layer, and the slower one ends
        alone. Without a number there are as many repeats as fit into SECONDS.

        Raises:
            BalancerError: a rank died.
        """
        for rank, (connection, tokens_E) in enumerate(
            zip(self._connections, tokens_SE, strict=True)
        ):
            _send(rank, connection, tokens_E, repeats)
        return [_receive(rank, connection) for rank, connection in enumerate(self._connections)]

    def measure_alone(self, tokens_E: Sequence[int], repeats: int | None = None) -> Timing:
        """Times a batch on rank 0 while the other ranks are idle.

        Raises:
            BalancerError: the rank died.
        """
        _send(0, self._connections[0], tokens_E, repeats)
        return _receive(0, self._connections[0])


@contextmanager
def probing(
    shape: ModelShape, isa: str, cores_S: Sequence[Sequence[int]], num_local: int
) -> Iterator[Probe]:
    """`probing_kernels` on cores, each rank with `num_local` experts of random weights.

    Args:
        cores_S: the cores of each rank, which all compute.
    """
    with probing_kernels([partial(CpuKernel, shape, isa, own, num_local) for own in cores_S]) as on:
        yield on


@contextmanager
def probing_kernels(kernels_S: Sequence[Callable[[], Kernel]]) -> Iterator[Probe]:
    """Starts a process per rank, in which its kernel is made, and ends them.

    Raises:
        BalancerError: a rank died, e.g. for want of memory.
    """
    context = multiprocessing.get_context("spawn")
    connections, processes = [], []
    try:
        for kernel in kernels_S:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, kernel), daemon=True)
            process.start()
            theirs.close()
            connections.append(ours)
            processes.append(process)
        for rank, connection in enumerate(connections):
            _receive(rank, connection, _START_TIMEOUT)
        yield Probe(connections, [process.pid or 0 for process in processes])
    finally:
        for connection in connections:
            connection.close()
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.terminate()


def _send(rank: int, connection: Connection, tokens_E: Sequence[int], repeats: int | None) -> None:
    try:
        connection.send((list(tokens_E), repeats))
    except OSError:
        _receive(rank, connection)  # which says that the rank died


def _receive(rank: int, connection: Connection, within_s: float = _TIMEOUT) -> Timing:
    try:
        if not connection.poll(within_s):
            raise BalancerError(
                f"Rank {rank} did not answer for {within_s:.0f} s while profiling. Something else "
                f"holds its core, or the machine swaps: run it again when the machine is quiet, or "
                f"with fewer ranks or --experts."
            )
        answer: Timing = connection.recv()
    except (EOFError, ConnectionError) as error:
        raise BalancerError(
            f"Rank {rank} died while profiling. Its message is above; if there is none, the "
            f"machine probably has too little memory: try fewer ranks or --experts."
        ) from error
    return answer


def _serve(connection: Connection, make: Callable[[], Kernel]) -> None:
    """Body of a rank process: answers every list of tokens with a Timing, until hung up."""
    kernel = make()
    kernel.time([1], None)
    connection.send(Timing(time_us=0.0, repeats=0))
    while True:
        try:
            tokens_E, repeats = connection.recv()
        except EOFError:
            return
        connection.send(kernel.time(tokens_E, repeats))


class CpuKernel:
    """The kernel for unquantised experts on x86 CPUs, on the cores of one rank."""

    def __init__(self, shape: ModelShape, isa: str, cores: Sequence[int], num_local: int) -> None:
        os.sched_setaffinity(0, cores)
        # Read by OpenMP when torch is imported: a thread stays on its core, as in vLLM's workers.
        os.environ["OMP_PLACES"] = ",".join(f"{{{core}}}" for core in cores)
        os.environ["OMP_PROC_BIND"] = "true"
        import torch

        torch.set_num_threads(len(cores))
        if isa == "amx":
            torch.cpu._init_amx()
        self._isa = isa
        self._w13, self._w2 = _weights(shape, isa, num_local)
        self._generator = torch.Generator().manual_seed(cores[0])

    def time(self, tokens_E: Sequence[int], repeats: int | None) -> Timing:
        """Median time; each repeat takes other experts, as serving does."""
        import torch
        from vllm import _custom_ops as ops

        w13, w2 = self._w13, self._w2
        hidden_NH = torch.randn(sum(tokens_E), w13.shape[2], generator=self._generator)
        hidden_NH = hidden_NH.to(w13.dtype)
        output_NH = torch.empty_like(hidden_NH)
        ones_N1 = torch.ones(len(hidden_NH), 1)
        count_E = torch.tensor(tokens_E)
        least, most = (repeats, repeats) if repeats else (MIN_REPEATS, MAX_REPEATS)
        times: list[int] = []
        while len(times) < least or (sum(times) < SECONDS * 1e9 and len(times) < most):
            chosen_E = torch.randperm(len(w13), generator=self._generator)[: len(tokens_E)]
            ids_N = chosen_E.repeat_interleave(count_E)
            order_N = torch.randperm(len(ids_N), generator=self._generator)
            ids_N1 = ids_N[order_N].to(torch.int32).unsqueeze(1).contiguous()
            start = time.perf_counter_ns()
            ops.cpu_fused_moe(
                output_NH, hidden_NH, w13, w2, None, None, ones_N1, ids_N1, "silu", self._isa
            )
            times.append(time.perf_counter_ns() - start)
        return Timing(time_us=sorted(times)[len(times) // 2] / 1000, repeats=len(times))


def _weights(shape: ModelShape, isa: str, num_local: int):  # type: ignore[no-untyped-def]
    """Prepacked (w13 [E, 2I, H], w2 [E, H, I]); all experts alike in value, apart in memory.

    In huge pages, as our CPU worker has them.
    """
    import torch
    from vllm import _custom_ops as ops

    from vllm_balance.experts.huge_pages import gather_into_huge_pages

    dtype = getattr(torch, shape.dtype)
    packed = []
    for rows, columns in ((2 * shape.inner, shape.hidden), (shape.hidden, shape.inner)):
        one = (torch.randn(rows, columns) * columns**-0.5).to(dtype)
        packed.append(ops.cpu_prepack_moe_weight(one.repeat(num_local, 1, 1), isa))
    gather_into_huge_pages(packed)
    return packed
