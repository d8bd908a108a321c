"""What a routing policy is, and what it knows of its layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch

from vllm_balance.types import Demand, Placement, Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTables:
    """Where one layer's experts live and where its routing is recorded. All on one device.

    The maps are vLLM's own tensors, changed in place when experts are rearranged. A balancer with
    dynamic slots has maps of its own and takes only sizes, load and counters from here.
    """

    logical_to_physical_ER: torch.Tensor
    """Slots of each logical expert, int32 or int64 [E, R or wider], -1 behind the last replica."""
    num_replicas_E: torch.Tensor
    """Number of slots of each logical expert, int32 or int64 [E]."""
    num_ranks: int
    """S, ranks of the expert-parallel group."""
    num_physical: int
    """P, slots on all ranks, a multiple of S."""
    load_P: torch.Tensor | None
    """Pairs per slot are added here, int32 [P]: vLLM's load of this pass with its EPLB, what
    `online` counts where that moves experts, None where nobody asks."""
    record_enabled: torch.Tensor | None
    """bool, one element: whether ``load_P`` wants this pass; None: every pass."""
    counters: torch.Tensor
    """int64 [counters_size(S)], laid out by ``kernels/record/layout.py``."""
    most_padded: int | None = None
    """Rows up to which a batch may be padded, by a CUDA graph. None: larger ones too, as one that
    was gathered has the rows of idle ranks."""
    placement: Placement = field(init=False, repr=False, compare=False)
    """Views of the maps, as they are at any time; columns up to the most replicas possible."""
    ones_E: torch.Tensor = field(init=False, repr=False, compare=False)
    """Number of replicas if only the first of each expert counts, as ``num_replicas_E``."""

    def __post_init__(self) -> None:
        width = min(self.logical_to_physical_ER.shape[1], self.num_physical - self.num_logical + 1)
        placement = Placement(
            logical_to_physical_ER=self.logical_to_physical_ER[:, :width],
            num_replicas_E=self.num_replicas_E,
            num_ranks=self.num_ranks,
            num_physical=self.num_physical,
        )
        object.__setattr__(self, "placement", placement)
        object.__setattr__(self, "ones_E", torch.ones_like(self.num_replicas_E))

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


class RoutingPolicy(Protocol):
    """Which replica serves which tokens. Pure and deterministic, the same on every rank."""

    name: ClassVar[str]
    counts_decide: ClassVar[bool]
    """Whether the choice depends on the token counts of the global batch."""

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


class CountingPolicy(RoutingPolicy, Protocol):
    """A policy with `counts_decide`, which also decides where ranks see only their own tokens."""

    def plan(self, demand: Demand, placement: Placement) -> Plan:
        """Tokens for each replica of each expert, without a host sync: as `route` decides."""
        ...
