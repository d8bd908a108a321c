"""Anonymous memory that processes of one machine share, and that no kill can leave behind."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_balance.errors import BalancerError
from vllm_balance.experts.host_memory import available_bytes
from vllm_balance.experts.huge_pages import ask_for_huge_pages


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where other processes find the memory while its owner keeps it open."""

    machine: str
    """Boot and process namespace: processes with another one cannot open it."""
    pid: int
    descriptor: int
    size_bytes: int


class SharedMemory:
    """A memory file without a name (Linux ``memfd``): gone with the last process that maps it.

    Nothing has to be unlinked, and the size of /dev/shm does not limit it.
    """

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._descriptor = descriptor
        self._map = mmap.mmap(descriptor, size_bytes)
        self.bytes_N = torch.frombuffer(self._map, dtype=torch.uint8)
        """The memory, uint8 [size_bytes]; keeps the mapping alive."""
        ask_for_huge_pages(self.bytes_N)

    @classmethod
    def allocate(cls, size_bytes: int) -> SharedMemory:
        """New memory, zeroed; pages are taken when they are first written.

        Raises:
            BalancerError: the machine does not have this much.
        """
        free = available_bytes()
        if size_bytes > free:
            raise BalancerError(
                f"The host store of all experts needs {size_bytes:,} bytes of shared memory, and "
                f"{free:,} are available. Free memory, or use a --moe-balancer that fetches no "
                f"experts."
            )
        descriptor = -1
        try:
            descriptor = os.memfd_create("moe_balancer_experts", os.MFD_CLOEXEC)
            os.truncate(descriptor, size_bytes)
            shared = cls(descriptor, size_bytes)
        except OSError as error:
            if descriptor >= 0:
                os.close(descriptor)
            raise BalancerError(
                f"The host store of all experts needs {size_bytes:,} bytes of shared memory, and "
                f"the machine refuses them: {error.strerror}. Free memory, or use a "
                f"--moe-balancer that fetches no experts."
            ) from error
        return shared

    @classmethod
    def open(cls, address: Address) -> SharedMemory:
        """The memory of another process of this machine.

        Raises:
            BalancerError: it is on another machine, or the owner cannot be reached.
        """
        if address.machine != machine():
            raise BalancerError(
                "The ranks run on different machines or in different containers, so they cannot "
                "share one host store of the experts. Start all ranks in one place, or use "
                "another --moe-balancer."
            )
        path = f"/proc/{address.pid}/fd/{address.descriptor}"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise BalancerError(
                f"This rank cannot open the host store of the experts at {path}: "
                f"{error.strerror}. All ranks must run as one user in one container."
            ) from error
        try:
            return cls(descriptor, address.size_bytes)
        except (OSError, ValueError) as error:
            os.close(descriptor)
            raise BalancerError(
                f"This rank cannot map the host store of the experts ({address.size_bytes:,} "
                f"bytes): {error}. Raise the limit of its address space (`ulimit -v`), or use "
                f"another --moe-balancer."
            ) from error

    @property
    def address(self) -> Address:
        return Address(
            machine=machine(),
            pid=os.getpid(),
            descriptor=self._descriptor,
            size_bytes=self.size_bytes,
        )

    def close_file(self) -> None:
        """Closes the file; the mapping stays. Call it when every process has opened its own."""
        os.close(self._descriptor)
        self._descriptor = -1


def machine() -> str:
    """The same text in all processes that can share memory."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # a sandbox that hides it
        boot = os.uname().nodename
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
