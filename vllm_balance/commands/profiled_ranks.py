"""The ranks that a profile is of: groups of this machine's cores, or its GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from vllm_balance.commands.expert_probe import CpuKernel, Kernel
from vllm_balance.commands.gpu_kernel import GpuKernel
from vllm_balance.commands.profile_samples import ON_CORES, ON_GPU, Extent
from vllm_balance.errors import BalancerError
from vllm_balance.experts.host_memory import available_bytes
from vllm_balance.model_shape import ModelShape
from vllm_balance.seams.device import kernel_isa

PROCESS_BYTES = 600 * 2**20
"""Of a rank's process without its experts: torch and vLLM."""


@dataclass(frozen=True, slots=True)
class Cores:
    """Ranks of an x86 CPU."""

    cores_S: Sequence[Sequence[int]]
    extent: ClassVar[Extent] = ON_CORES
    shares_memory: ClassVar[bool] = True
    """Whether a rank that is alone has more memory to itself."""

    @property
    def cores_per_rank(self) -> int:
        return len(self.cores_S[0])

    @property
    def places(self) -> list[str]:
        """Where each rank runs, in words for the file."""
        return [
            f"core{'s' if len(cores) > 1 else ''} {', '.join(map(str, cores))}"
            for cores in self.cores_S
        ]

    def kernels(self, shape: ModelShape, local: int) -> list[Callable[[], Kernel]]:
        """What each rank's process makes, with so many experts.

        Raises:
            BalancerError: they do not fit into memory, or this is no x86 CPU.
        """
        self._require_memory(shape, local)
        isa = kernel_isa(shape.dtype)
        return [partial(CpuKernel, shape, isa, cores, local) for cores in self.cores_S]

    def _require_memory(self, shape: ModelShape, local: int) -> None:
        import torch

        ranks, weights = len(self.cores_S), 3 * shape.hidden * shape.inner * local
        # w13 is packed into a copy, and w2 beside the packed w13: 4/3 of all weights at once.
        of_experts = weights * getattr(torch, shape.dtype).itemsize * 4 // 3
        needed, left = ranks * (of_experts + PROCESS_BYTES), available_bytes()
        if needed > left:
            fitting = max(0, int((left / ranks - PROCESS_BYTES) * local / of_experts))
            raise BalancerError(
                f"{ranks} ranks with {local} experts each in {shape.dtype} take "
                f"{needed / 2**30:.1f} GiB of memory while they start, and {left / 2**30:.1f} GiB "
                f"are free, enough for {fitting} experts each. Ask for fewer experts (--experts) "
                f"or ranks."
            )


@dataclass(frozen=True, slots=True)
class Gpus:
    """Ranks of one GPU each, the first ones that are visible."""

    count: int
    extent: ClassVar[Extent] = ON_GPU
    cores_per_rank: ClassVar[int] = 1
    shares_memory: ClassVar[bool] = False

    @property
    def places(self) -> list[str]:
        """As of `Cores`."""
        from vllm.platforms import current_platform

        return [
            f"cuda:{index}, {current_platform.get_device_name(index)}"
            for index in range(self.count)
        ]

    def kernels(self, shape: ModelShape, local: int) -> list[Callable[[], Kernel]]:
        """As of `Cores`; whether they fit is found in each process, which owns the memory."""
        return [partial(GpuKernel, shape, f"cuda:{i}", local) for i in range(self.count)]


Ranks = Cores | Gpus
"""That are measured at once."""


def visible_gpus(ranks: int | None) -> Gpus:
    """So many GPUs, or all.

    Raises:
        BalancerError: fewer are visible, or they are of several kinds: servers compare a profile
            with one.
    """
    from vllm.platforms import current_platform

    found = current_platform.device_count()
    if (ranks or 1) > found:
        raise BalancerError(
            f"{ranks or 1} ranks were asked for, and {found} GPUs are visible. Profile fewer; one "
            f"rank's profile can stand for all if they are alike."
        )
    chosen = Gpus(ranks or found)
    kinds = sorted({current_platform.get_device_name(index) for index in range(chosen.count)})
    if len(kinds) > 1:
        raise BalancerError(
            f"The GPUs are of several kinds ({', '.join(kinds)}), and a profile is of one. Choose "
            f"alike ones with --ranks or CUDA_VISIBLE_DEVICES, or place experts without a profile: "
            f"`vllm-balance place --model MODEL --speeds ...`."
        )
    return chosen
