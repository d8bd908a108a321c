"""All experts of the model in host memory, as the kernels want them: where fetches read from."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_balance.errors import BalancerError
from vllm_balance.experts.shared_memory import SharedMemory

ALIGNMENT_BYTES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """How the ranks that share a store talk to each other while it is set up."""

    rank: int
    share: Callable[[Any], list[Any]]
    """Gives every rank the objects of all ranks, in rank order; a collective."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLayout:
    """How the tensors of one expert lie in its row of the store."""

    sizes_bytes: tuple[int, ...]
    """Bytes of one expert in each tensor of the layer."""

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor]) -> ExpertLayout:
        """The layout for tensors [local experts, ...], weights and scales alike."""
        return cls(sizes_bytes=tuple(rows.shape[1] for rows in map(as_bytes, tensors)))

    @property
    def offsets_bytes(self) -> tuple[int, ...]:
        """First byte of each tensor in the row."""
        padded = [-(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for size in self.sizes_bytes]
        return tuple(itertools.accumulate(padded[:-1], initial=0))

    @property
    def row_bytes(self) -> int:
        """Bytes of one expert in the store."""
        last = self.offsets_bytes[-1] + self.sizes_bytes[-1]
        return -(-last // ALIGNMENT_BYTES) * ALIGNMENT_BYTES

    @property
    def expert_bytes(self) -> int:
        """Bytes that a fetch copies."""
        return sum(self.sizes_bytes)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as uint8 [experts, bytes of one expert]."""
    return tensor.detach().view(tensor.shape[0], -1).view(torch.uint8)


class HostStore:
    """One copy of every expert of every layer, shared by the ranks of a machine."""

    def __init__(self, memory: SharedMemory, layout: ExpertLayout, shape_LE: tuple[int, int]):
        self.layout = layout
        self.size_bytes = memory.size_bytes
        self._rows_LEB = memory.bytes_N.view(*shape_LE, layout.row_bytes)

    @classmethod
    def shared(
        cls, layout: ExpertLayout, *, num_layers: int, num_experts: int, machine: Machine
    ) -> HostStore:
        """The store of all ranks, empty; a collective. The first rank's memory is taken.

        Raises:
            BalancerError: the memory cannot be had or shared, or the ranks' tensors differ.
        """
        size_bytes = num_layers * num_experts * layout.row_bytes
        memory = SharedMemory.allocate(size_bytes) if machine.rank == 0 else None
        mine = (layout, size_bytes, memory.address if memory else None)
        offers = machine.share(mine)
        if any(offer[:2] != offers[0][:2] for offer in offers):
            raise BalancerError(
                f"The experts have different tensors on different ranks: "
                f"{[offer[0].sizes_bytes for offer in offers]} bytes each. All ranks must load the "
                f"same model in the same format."
            )
        if memory is None:
            memory = SharedMemory.open(offers[0][2])
        machine.share(None)  # Every rank has opened it: the first may close its file.
        memory.close_file()
        return cls(memory, layout, (num_layers, num_experts))

    def write(self, layer: int, expert: int, slot: int, tensors: Sequence[torch.Tensor]) -> None:
        """Takes row ``slot`` of the layer's tensors [local experts, ...] as this expert."""
        for part_N, rows_EN in zip(self._parts(layer, expert), map(as_bytes, tensors), strict=True):
            part_N.copy_(rows_EN[slot])

    def read(self, layer: int, expert: int, slot: int, tensors: Sequence[torch.Tensor]) -> None:
        """Overwrites row ``slot`` of the layer's tensors with this expert; nothing is saved.

        On CPU in the calling thread alone and without the GIL: for a large copy PyTorch would wake
        a team of threads, beside the one that computes. On a device the copy is queued.
        """
        for part_N, rows_EN in zip(self._parts(layer, expert), map(as_bytes, tensors), strict=True):
            row_N = rows_EN[slot]
            if not row_N.is_cpu:
                row_N.copy_(part_N, non_blocking=True)
                continue
            assert row_N.is_contiguous() and row_N.shape == part_N.shape
            ctypes.memmove(row_N.data_ptr(), part_N.data_ptr(), part_N.nbytes)

    def pin(self) -> None:
        """Registers the memory with CUDA, so that copies from it run asynchronously.

        Raises:
            BalancerError: the driver refuses.
        """
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        status = runtime.cudaHostRegister(self._rows_LEB.data_ptr(), self.size_bytes, 0)
        if int(status) != 0:
            raise BalancerError(
                f"CUDA cannot pin the {self.size_bytes:,} bytes of the host store (error "
                f"{int(status)}). Raise the limit of locked memory (ulimit -l), or use another "
                f"--moe-balancer."
            )

    def _parts(self, layer: int, expert: int) -> list[torch.Tensor]:
        row_B = self._rows_LEB[layer, expert]
        return [
            row_B[offset : offset + size]
            for offset, size in zip(self.layout.offsets_bytes, self.layout.sizes_bytes, strict=True)
        ]
