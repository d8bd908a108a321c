"""What the next layer will ask for, guessed before this layer's experts run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Gate = Callable[[torch.Tensor], torch.Tensor]
"""Router logits [T, E] of hidden states [T, H]."""

MAX_ROWS = 512
"""Tokens that one rank looks at: enough to see a hot expert, little beside the layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LookAhead:
    """The next layer's router on this layer's inputs: hidden states change slowly over layers.

    Every rank looks at other tokens, and one all-reduce of E integers makes the guess equal on all.
    """

    gate: Gate
    top_k: int
    num_experts: int
    rank: int
    num_ranks: int
    all_reduce: Callable[[torch.Tensor], torch.Tensor]
    knee_tokens: float
    """Batches with at most this many tokens are memory-bound whatever they ask for: a token is at
    most once on an expert, so none has more, and no mean can be above it. Of larger ones the
    schedule of the guess decides (``kernels.rebalance.Rules.knee_tokens``)."""

    def guess(
        self, hidden_states_TH: torch.Tensor, rows_S: Sequence[int] | None = None
    ) -> torch.Tensor | None:
        """Pairs of each expert in the next layer, int32 [1, E] on the host; None for a
        memory-bound batch.

        A collective, except where it returns None, which depends on the number of tokens only.

        Args:
            hidden_states_TH: of this rank's tokens.
            rows_S: tokens of each rank; None: all ranks have the same ones.
        """
        own = hidden_states_TH.shape[0]
        num_tokens = own if rows_S is None else sum(rows_S)
        if num_tokens <= self.knee_tokens:
            return None
        most = own if rows_S is None else max(rows_S)
        stride, first = max(1, -(-most // MAX_ROWS)), 0
        if rows_S is None:
            stride = max(self.num_ranks, stride)
            first = self.rank % stride
        # One of vLLM's gate kernels takes no strided rows.
        looked_at_NH = hidden_states_TH[first::stride].contiguous()
        ids_NK = self.gate(looked_at_NH).topk(self.top_k, dim=1).indices
        seen_E = torch.bincount(ids_NK.flatten(), minlength=self.num_experts).to(torch.int32)
        total_E = self.all_reduce(seen_E).cpu().to(torch.int64)
        scale = num_tokens * self.top_k / max(1, int(total_E.sum()))
        return (total_E * scale).to(torch.int32)[None]
