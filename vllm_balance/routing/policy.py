"""What a routing policy is, and what it knows of its layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from vllm_balance.types import Demand, Placement, Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTables:
    """Where one layer's experts live and where its routing is recorded.

    The maps are vLLM's own tensors, changed in place when experts are rearranged.
    """

    logical_to_physical_ER: torch.Tensor
    """Slots of each logical expert, [E, R or wider], -1 behind the last replica."""
    num_replicas_E: torch.Tensor
    """Slots of each logical expert, [E]."""
    num_ranks: int
    num_physical: int
    load_P: torch.Tensor | None
    """vLLM's load per physical expert of this pass, int32 [P]; None without EPLB."""
    record_enabled: torch.Tensor | None
    """bool, one element: whether vLLM wants the load of this pass."""
    counters: torch.Tensor
    """int64, laid out by ``kernels/record/layout.py``."""

    @property
    def num_logical(self) -> int:
        """Experts of the model's layer, without replicas."""
        return self.num_replicas_E.shape[0]

    def kernel_arguments(self, num_valid_tokens: torch.Tensor | None) -> dict[str, Any]:
        """Keyword arguments of every kernel that routes and records a batch."""
        return {
            "num_ranks": self.num_ranks,
            "num_physical": self.num_physical,
            "load_P": self.load_P,
            "record_enabled": self.record_enabled,
            "num_valid_tokens": num_valid_tokens,
            "counters": self.counters,
        }

    @property
    def placement(self) -> Placement:
        """The placement as it is now. No host sync; columns up to the most replicas possible."""
        width = min(
            self.logical_to_physical_ER.shape[1],
            self.num_physical - self.num_logical + 1,
        )
        table_ER = self.logical_to_physical_ER[:, :width].to(torch.int32).contiguous()
        experts_ER = torch.arange(table_ER.shape[0], dtype=torch.int32, device=table_ER.device)[
            :, None
        ].expand_as(table_ER)
        content_P1 = table_ER.new_full((self.num_physical + 1,), -1)
        slots_ER = torch.where(table_ER < 0, self.num_physical, table_ER).long()
        content_P1.scatter_(0, slots_ER.flatten(), experts_ER.flatten())
        return Placement(
            physical_to_logical_P=content_P1[: self.num_physical],
            logical_to_physical_ER=table_ER,
            num_replicas_E=self.num_replicas_E.to(torch.int32),
            num_ranks=self.num_ranks,
        )


class RoutingPolicy(Protocol):
    """Which replica serves which tokens. Pure and deterministic, the same on every rank."""

    name: ClassVar[str]
    counts_decide: ClassVar[bool]
    """Whether the choice depends on the token counts of the global batch."""

    def plan(self, demand: Demand, placement: Placement) -> Plan:
        """Tokens for each replica of each expert, without a host sync.

        Called in serving for policies with `counts_decide` where ranks exchange counts and see
        only their own tokens; of the others it says, for tests, what `route` must do.
        """
        ...

    def route(
        self,
        topk_ids_TK: torch.Tensor,
        tables: LayerTables,
        num_valid_tokens: torch.Tensor | None,
    ) -> torch.Tensor:
        """Slot of each pair, [T, K] in the ids' dtype; -1 stays -1. The hot path.

        Adds the batch to ``tables.load_P`` and ``tables.counters``. Rows from
        ``num_valid_tokens`` (int32, one element, or None) on are padding and count nowhere.
        """
        ...
