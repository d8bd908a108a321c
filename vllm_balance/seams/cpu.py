"""Expert parallelism on CPU: what stock vLLM lacks there (vllm#57837). Fixes, not features."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from vllm_balance.seams import Seam

EXPERTS = "moe_balancer_experts"
"""Attribute of vLLM's CPU experts that holds the layer's LocalPairExperts."""


def _apply_experts(original: Callable[..., Any]) -> Callable[..., Any]:
    """Hands the kernel this rank's pairs with local ids. vLLM calls it with keywords only."""

    def apply(self: Any, **call: Any) -> None:
        experts = getattr(self, EXPERTS, None)
        if experts is None or call["expert_map"] is None:
            original(self, **call)
            return

        def kernel(
            outputs_NH: torch.Tensor,
            inputs_NH: torch.Tensor,
            weight_N1: torch.Tensor,
            expert_N1: torch.Tensor,
        ) -> None:
            local = {
                "output": outputs_NH,
                "hidden_states": inputs_NH,
                "topk_weights": weight_N1,
                "topk_ids": expert_N1,
                "global_num_experts": call["w1"].shape[0],
                "expert_map": None,
            }
            original(self, **{**call, **local})

        experts(
            call["output"], call["hidden_states"], call["topk_weights"], call["topk_ids"], kernel
        )

    return apply


def _all_gatherv(original: Callable[..., Any]) -> Callable[..., Any]:
    """Gathers tensors of different lengths: padded to the longest rank, gathered, cut."""

    def gather_one(self: Any, tensor: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        longest = max(sizes)
        if longest == min(sizes):
            whole: torch.Tensor = self.all_gather(tensor.contiguous(), dim=0)
            return whole
        padded = tensor.new_zeros((longest, *tensor.shape[1:]))
        padded[: tensor.shape[0]] = tensor
        gathered = self.all_gather(padded, dim=0)
        return torch.cat(
            [gathered[rank * longest : rank * longest + size] for rank, size in enumerate(sizes)]
        )

    def all_gatherv(
        self: Any,
        input_: torch.Tensor | list[torch.Tensor],
        dim: int = 0,
        sizes: list[int] | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        if dim != 0:
            raise ValueError(f"all_gatherv gathers along dimension 0 only, got {dim}.")
        tensors = [input_] if isinstance(input_, torch.Tensor) else input_
        lengths = sizes or [tensors[0].shape[0]] * self.world_size
        gathered = [gather_one(self, tensor, lengths) for tensor in tensors]
        return gathered[0] if isinstance(input_, torch.Tensor) else gathered

    return all_gatherv


def _reduce_scatterv(original: Callable[..., Any]) -> Callable[..., Any]:
    """Sums over ranks and keeps this rank's rows, whose number may differ from rank to rank."""

    def reduce_scatterv(
        self: Any, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None
    ) -> torch.Tensor:
        if dim not in (0, -input_.dim()):
            raise ValueError(f"reduce_scatterv scatters along dimension 0 only, got {dim}.")
        lengths = sizes or [input_.shape[0] // self.world_size] * self.world_size
        summed = self.all_reduce(input_.contiguous())
        first = sum(lengths[: self.rank_in_group])
        return summed[first : first + lengths[self.rank_in_group]]

    return reduce_scatterv


class _HostEvent:
    """``torch.Event`` for a device without streams: records host time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._time_s = 0.0

    def record(self, *args: Any) -> None:
        self._time_s = time.perf_counter()

    def synchronize(self) -> None:
        """Nothing runs beside the host."""

    def elapsed_time(self, end: _HostEvent) -> float:
        """Milliseconds from this event to ``end``."""
        return (end._time_s - self._time_s) * 1e3


def _rearrange(original: Callable[..., Any]) -> Callable[..., Any]:
    def rearrange(self: Any, *args: Any, **kwargs: Any) -> Any:
        device_event, torch.Event = torch.Event, _HostEvent  # type: ignore[misc, assignment]
        try:
            return original(self, *args, **kwargs)
        finally:
            torch.Event = device_event  # type: ignore[misc]

    return rearrange


_COMMUNICATOR = "vllm.distributed.device_communicators.cpu_communicator:CpuCommunicator"
_UPSTREAM = "vLLM serves expert parallelism on CPU itself (vllm#57837, vllm#47778)"

CPU_SEAMS = (
    Seam(
        target="vllm.model_executor.layers.fused_moe.experts.cpu_moe:CPUUnquantizedExperts.apply",
        parameters=(
            "output",
            "hidden_states",
            "w1",
            "topk_weights",
            "topk_ids",
            "global_num_experts",
            "expert_map",
        ),
        wrap=_apply_experts,
        why="the CPU experts ignore expert_map and read foreign ids as their own",
        delete_when=_UPSTREAM,
    ),
    Seam(
        target=f"{_COMMUNICATOR}.all_gatherv",
        parameters=("input_", "dim", "sizes"),
        wrap=_all_gatherv,
        why="data parallelism with expert parallelism dispatches through it",
        delete_when=_UPSTREAM,
        only_if_missing=True,
    ),
    Seam(
        target=f"{_COMMUNICATOR}.reduce_scatterv",
        parameters=("input_", "dim", "sizes"),
        wrap=_reduce_scatterv,
        why="data parallelism with expert parallelism combines through it",
        delete_when=_UPSTREAM,
        only_if_missing=True,
    ),
    Seam(
        target="vllm.distributed.eplb.eplb_state:EplbState.rearrange",
        parameters=("is_profile",),
        wrap=_rearrange,
        why="it times itself with torch.Event, which a CPU does not have",
        delete_when="EPLB is accepted on CPU",
    ),
)
