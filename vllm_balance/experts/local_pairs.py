"""Expert parallelism for a kernel that knows only its own experts: compute local pairs, add back.

vLLM's CPU experts take local expert ids and no map, so a rank must hand over exactly the
(token, choice) pairs whose expert it owns. Foreign pairs are never computed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.functional import embedding_bag

from vllm_balance.kernels.local_pairs import select

PairKernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""(output [N, H], hidden states [N, H], weights float32 [N, 1], local ids int32 [N, 1]) -> None."""

RECENT_BATCHES = 1024


class Arrivals(Protocol):
    """Which of this layer's slots still wait for their expert's weights."""

    def pending(self) -> set[int]:
        """Local ids that must not be computed before :meth:`wait`."""
        ...

    def wait(self) -> None:
        """Returns when all are in place. Raises BalancerError if one cannot be."""
        ...

    def computing(self) -> AbstractContextManager[None]:
        """Inside, no slot of the layer is overwritten."""
        ...


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


def select_local_pairs(
    topk_ids_TK: torch.Tensor, topk_weights_TK: torch.Tensor, local_P: torch.Tensor
) -> LocalPairs:
    """The pairs this rank computes; ids are physical, -1 marks a choice that nobody computes."""
    token_N, expert_N, weight_N, first_T = select(
        topk_ids_TK.contiguous(), topk_weights_TK.float().contiguous(), local_P
    )
    return LocalPairs(
        token_N=token_N,
        expert_N1=expert_N.unsqueeze(1),
        weight_N1=weight_N.unsqueeze(1),
        first_T=first_T,
    )


class PairBuffers:
    """Inputs and outputs of a rank's pairs, for all its layers: one computes at a time."""

    def __init__(self) -> None:
        self._places_N = torch.arange(0)
        self._inputs_NH: torch.Tensor | None = None
        self._outputs_NH: torch.Tensor | None = None

    def room_for(self, num_pairs: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Two [num_pairs, H] views of buffers that only grow: fresh pages cost more than a copy."""
        inputs_NH, outputs_NH = self._inputs_NH, self._outputs_NH
        if (
            inputs_NH is None
            or outputs_NH is None
            or inputs_NH.shape[0] < num_pairs
            or inputs_NH.shape[1] != like.shape[1]
            or inputs_NH.dtype != like.dtype
        ):
            shape = (num_pairs, like.shape[1])
            inputs_NH = self._inputs_NH = like.new_empty(shape)
            outputs_NH = self._outputs_NH = like.new_empty(shape)
        return inputs_NH[:num_pairs], outputs_NH[:num_pairs]

    def places(self, num_pairs: int) -> torch.Tensor:
        """0 to num_pairs - 1, int64 [num_pairs]."""
        if self._places_N.shape[0] < num_pairs:
            self._places_N = torch.arange(num_pairs)
        return self._places_N[:num_pairs]


class LocalPairExperts:
    """Runs a kernel on the local pairs of a batch and sums them per token."""

    def __init__(self, expert_map_P: torch.Tensor, buffers: PairBuffers | None = None) -> None:
        self._local_P = expert_map_P.to(torch.int32).contiguous()
        self._buffers = PairBuffers() if buffers is None else buffers
        self.arrivals: Arrivals | None = None
        """What tells experts that are still on their way; None: all are always there."""
        self.kernel_ns = 0
        """Time in the kernel, ns."""
        self.wrapping_ns = 0
        """Time around it: choosing, gathering and adding back local pairs, ns."""
        self.recent_ns: deque[int] = deque(maxlen=RECENT_BATCHES)
        """Time of each of the last batches, in the kernel and around it, without waiting, ns."""

    def select(self, topk_ids_TK: torch.Tensor, topk_weights_TK: torch.Tensor) -> LocalPairs:
        """The pairs of a batch that this rank computes."""
        return select_local_pairs(topk_ids_TK, topk_weights_TK, self._local_P)

    def __call__(
        self,
        output_TH: torch.Tensor,
        hidden_states_TH: torch.Tensor,
        topk_weights_TK: torch.Tensor,
        topk_ids_TK: torch.Tensor,
        kernel: PairKernel,
    ) -> None:
        """Writes this rank's share of the layer's output: the weighted sum of its local pairs.

        Each pair is computed once in the input's dtype; a token's pairs are summed in float32.
        Pairs of experts that have not arrived are computed in a second call, behind the others.
        """
        start = time.perf_counter_ns()
        pairs = self.select(topk_ids_TK, topk_weights_TK)
        num_pairs = pairs.token_N.shape[0]
        if num_pairs == 0:
            output_TH.zero_()
            self.recent_ns.append(0)
            return
        outputs_NH = self._buffers.room_for(num_pairs, hidden_states_TH)[1]
        kernel_ns_before = self.kernel_ns
        if self.arrivals is None:
            away_ns = self._compute(hidden_states_TH, pairs, None, 0, num_pairs, kernel)
            row_N = self._buffers.places(num_pairs)
        else:
            row_N, away_ns = self._as_they_arrive(hidden_states_TH, pairs, kernel, self.arrivals)
        output_TH.copy_(embedding_bag(row_N, outputs_NH, pairs.first_T, mode="sum"))
        around_ns = time.perf_counter_ns() - start - away_ns
        self.wrapping_ns += around_ns
        self.recent_ns.append(around_ns + self.kernel_ns - kernel_ns_before)

    def _as_they_arrive(
        self,
        hidden_states_TH: torch.Tensor,
        pairs: LocalPairs,
        kernel: PairKernel,
        arrivals: Arrivals,
    ) -> tuple[torch.Tensor, int]:
        """Computes present experts, waits, computes the others: (row of each pair, time, ns)."""
        num_pairs = pairs.token_N.shape[0]
        order_N, num_present = _present_first(pairs.expert_N1, arrivals.pending())
        away_ns = 0
        with arrivals.computing():
            if num_present:
                away_ns += self._compute(hidden_states_TH, pairs, order_N, 0, num_present, kernel)
            if num_present < num_pairs:
                start = time.perf_counter_ns()
                arrivals.wait()
                away_ns += time.perf_counter_ns() - start
                away_ns += self._compute(
                    hidden_states_TH, pairs, order_N, num_present, num_pairs, kernel
                )
        row_N = self._buffers.places(num_pairs) if order_N is None else order_N.argsort()
        return row_N, away_ns

    def _compute(
        self,
        hidden_states_TH: torch.Tensor,
        pairs: LocalPairs,
        order_N: torch.Tensor | None,
        first: int,
        last: int,
        kernel: PairKernel,
    ) -> int:
        """Computes pairs ``first`` to ``last`` of the order into these rows; time there in ns."""
        inputs_NH, outputs_NH = self._buffers.room_for(last, hidden_states_TH)
        chosen_N = slice(first, last) if order_N is None else order_N[first:last]
        rows_NH = inputs_NH[first:]
        torch.index_select(hidden_states_TH, 0, pairs.token_N[chosen_N], out=rows_NH)
        start = time.perf_counter_ns()
        kernel(outputs_NH[first:], rows_NH, pairs.weight_N1[chosen_N], pairs.expert_N1[chosen_N])
        taken_ns = time.perf_counter_ns() - start
        self.kernel_ns += taken_ns
        return taken_ns

    def reset(self) -> None:
        """Sets the times to zero."""
        self.kernel_ns = self.wrapping_ns = 0
        self.recent_ns.clear()


def _present_first(expert_N1: torch.Tensor, pending: set[int]) -> tuple[torch.Tensor | None, int]:
    """An order with the pairs of present experts in front, and their number.

    None stands for the order as it is, when all are present.
    """
    num_pairs = expert_N1.shape[0]
    if not pending:
        return None, num_pairs
    is_late_N = torch.isin(expert_N1[:, 0], torch.tensor([*pending], dtype=torch.int32))
    order_N = is_late_N.to(torch.uint8).argsort(stable=True)
    return order_N, num_pairs - int(is_late_N.sum())
