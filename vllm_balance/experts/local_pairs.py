"""Expert parallelism for a kernel that knows only its own experts: compute local pairs, add back.

vLLM's CPU experts take local expert ids and no map, so a rank must hand over exactly the
(token, choice) pairs whose expert it owns. Foreign pairs are never computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import embedding_bag

PairKernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""(output [N, D], hidden states [N, D], weights float32 [N, 1], local ids int32 [N, 1]) -> None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalPairs:
    """The N pairs of a batch whose expert lives on this rank, in token order."""

    token_N: torch.Tensor
    """Token of each pair, [N] int64, not falling."""
    expert_N1: torch.Tensor
    """Local expert id of each pair, [N, 1] int32."""
    weight_N1: torch.Tensor
    """Router weight of each pair, [N, 1] float32."""
    first_T: torch.Tensor
    """First pair of each token, [T] int64."""


def extended_map(expert_map_P: torch.Tensor) -> torch.Tensor:
    """Local id of each physical expert and one -1 behind, so that id -1 stays foreign, [P + 1]."""
    return torch.cat([expert_map_P, expert_map_P.new_full((1,), -1)])


def select_local_pairs(
    topk_ids_TK: torch.Tensor, topk_weights_TK: torch.Tensor, extended_map_P1: torch.Tensor
) -> LocalPairs:
    """The pairs this rank computes; ids are physical, -1 marks a choice that nobody computes."""
    local_TK = extended_map_P1[topk_ids_TK.long()]
    is_local_TK = local_TK >= 0
    token_N, _ = is_local_TK.nonzero(as_tuple=True)
    num_pairs_T = is_local_TK.sum(1)
    return LocalPairs(
        token_N=token_N,
        expert_N1=local_TK[is_local_TK].to(torch.int32).unsqueeze(1),
        weight_N1=topk_weights_TK[is_local_TK].float().unsqueeze(1),
        first_T=num_pairs_T.cumsum(0) - num_pairs_T,
    )


class LocalPairExperts:
    """Runs a kernel on the local pairs of a batch and sums them per token, reusing its buffers."""

    def __init__(self, expert_map_P: torch.Tensor) -> None:
        self._extended_map_P1 = extended_map(expert_map_P)
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self.kernel_ns = 0
        """Time in the kernel, ns."""
        self.wrapping_ns = 0
        """Time around it: choosing, gathering and adding back local pairs, ns."""

    def __call__(
        self,
        output_TD: torch.Tensor,
        hidden_states_TD: torch.Tensor,
        topk_weights_TK: torch.Tensor,
        topk_ids_TK: torch.Tensor,
        kernel: PairKernel,
    ) -> None:
        """Writes this rank's share of the layer's output: the weighted sum of its local pairs.

        Each pair is computed once in the input's dtype; a token's pairs are summed in float32.
        """
        start = time.perf_counter_ns()
        pairs = select_local_pairs(topk_ids_TK, topk_weights_TK, self._extended_map_P1)
        num_pairs = pairs.token_N.shape[0]
        if num_pairs == 0:
            output_TD.zero_()
            return
        inputs_ND, outputs_ND = self._room_for(num_pairs, hidden_states_TD)
        torch.index_select(hidden_states_TD, 0, pairs.token_N, out=inputs_ND)
        kernel_start = time.perf_counter_ns()
        kernel(outputs_ND, inputs_ND, pairs.weight_N1, pairs.expert_N1)
        kernel_end = time.perf_counter_ns()
        every_N = torch.arange(num_pairs)
        output_TD.copy_(embedding_bag(every_N, outputs_ND, pairs.first_T, mode="sum"))
        self.kernel_ns += kernel_end - kernel_start
        self.wrapping_ns += time.perf_counter_ns() - kernel_end + kernel_start - start

    def reset(self) -> None:
        """Sets the times to zero."""
        self.kernel_ns = self.wrapping_ns = 0

    def _room_for(self, num_pairs: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Two [num_pairs, D] views of buffers that only grow: fresh pages cost more than a copy."""
        buffers = self._buffers
        if buffers is None or buffers[0].shape[0] < num_pairs or buffers[0].dtype != like.dtype:
            shape = (num_pairs, like.shape[1])
            buffers = self._buffers = (like.new_empty(shape), like.new_empty(shape))
        return buffers[0][:num_pairs], buffers[1][:num_pairs]
