"""vLLM's Triton kernel for unquantised experts on one GPU, timed. It has not run on a GPU yet."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from vllm_balance.commands.expert_probe import SECONDS, Timing
from vllm_balance.errors import BalancerError
from vllm_balance.model_shape import ModelShape

LEFT_FREE = 2 * 2**30
"""Bytes of a GPU for activations, the kernel's workspace and what clears the cache."""


class GpuKernel:
    """The experts of one rank, of random weights."""

    def __init__(self, shape: ModelShape, device: str, num_local: int) -> None:
        """
        Args:
            device: as in "cuda:1".

        Raises:
            BalancerError: the experts do not fit into the memory that is free.
        """
        import torch

        self._device = torch.device(device)
        torch.accelerator.set_device_index(self._device)
        dtype = getattr(torch, shape.dtype)
        require_memory(shape, device, num_local, dtype.itemsize)
        sizes = (2 * shape.inner, shape.hidden), (shape.hidden, shape.inner)
        self._w13, self._w2 = (
            torch.empty(num_local, *size, dtype=dtype, device=self._device).normal_(
                std=size[1] ** -0.5
            )
            for size in sizes
        )
        self._generator = torch.Generator(self._device).manual_seed(self._device.index or 0)

    def time(self, tokens_E: Sequence[int], repeats: int | None) -> Timing:
        """Median time by events on the device, whose cache is cleared before each repeat, so that
        weights come from memory as in serving.

        Args:
            repeats: one, if given.
        """
        import torch
        from triton.testing import do_bench
        from vllm.model_executor.layers.fused_moe import fused_experts

        w13, w2, device = self._w13, self._w2, self._device
        chosen_E = torch.randperm(len(w13), generator=self._generator, device=device)
        count_E = torch.tensor(tokens_E, device=device)
        ids_N = chosen_E[: len(tokens_E)].repeat_interleave(count_E)
        order_N = torch.randperm(len(ids_N), generator=self._generator, device=device)
        ids_N1 = ids_N[order_N].to(torch.int32).unsqueeze(1)
        hidden_NH = torch.empty(len(ids_N), w13.shape[2], dtype=w13.dtype, device=device).normal_()
        ones_N1 = torch.ones(len(ids_N), 1, device=device)
        times_ms = do_bench(
            lambda: fused_experts(hidden_NH, w13, w2, ones_N1, ids_N1),
            rep=0 if repeats else 1000 * SECONDS,
            return_mode="all",
        )
        return Timing(time_us=1000 * statistics.median(times_ms), repeats=len(times_ms))


def require_memory(shape: ModelShape, device: str, num_local: int, width: int) -> None:
    """Returns if so many experts fit on a GPU.

    Args:
        width: bytes of a weight.

    Raises:
        BalancerError: they do not.
    """
    import torch

    of_one = 3 * shape.hidden * shape.inner * width
    free = torch.accelerator.get_memory_info(device)[0] - LEFT_FREE
    if num_local * of_one > free:
        raise BalancerError(
            f"{num_local} experts in {shape.dtype} take {num_local * of_one / 2**30:.1f} GiB, and "
            f"{max(free, 0) / 2**30:.1f} GiB of {device} are free, enough for "
            f"{max(free, 0) // of_one}. Ask for fewer with --experts, or end what else uses it."
        )
