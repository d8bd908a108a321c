"""The vocabulary that crosses a stage: where experts live, what a batch asks for, what was decided.

Axis letters, used as name suffixes everywhere in this package:

====  ======================================================
T     tokens on this rank, or of a trace
G     tokens on all ranks
K     choices per token (top-k)
E     logical experts
P     physical experts (slots)
R     replicas of one expert, padded with -1; in the simulator requests
S     ranks
L     MoE layers
D     dynamic slots of a rank
F     source ranks of a batch's tokens
X     rank and dynamic slot together, or values of each rank
H     hidden size; hot experts of a replay
I     inner size of an expert; items of a search
N     steps, rows, pairs or points, as the docstring says
M     moves, starts, parts or simulated steps, likewise
C     requests running at a time; in GPU kernels ranks held at a time; cold experts of a replay
B     bytes, or a block: tokens of a batch, pairs of a GPU kernel
====  ======================================================

A digit is that length: load_S3 has three numbers for each rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where the experts of one layer live. Tensors are int32, or vLLM's own int64, on one device.

    Slots of a rank are consecutive: rank ``s`` owns ``s * P / S`` to ``(s + 1) * P / S - 1``.
    """

    logical_to_physical_ER: torch.Tensor
    """Slots of each logical expert, [E, R], padded with -1 behind the last replica."""
    num_replicas_E: torch.Tensor
    """Number of slots of each logical expert, [E], at least 1."""
    num_ranks: int
    num_physical: int

    @property
    def num_logical(self) -> int:
        return self.num_replicas_E.shape[0]

    @property
    def physical_to_logical_P(self) -> torch.Tensor:
        """Logical expert held by each slot, int32 [P]; -1 for a slot that holds none.

        Made at each call, without a host sync.
        """
        table_ER = self.logical_to_physical_ER
        experts_E = torch.arange(len(table_ER), dtype=torch.int32, device=table_ER.device)
        content_P1 = experts_E.new_full((self.num_physical + 1,), -1)
        slots_ER = torch.where(table_ER < 0, self.num_physical, table_ER).long()
        experts_ER = experts_E[:, None].expand_as(table_ER)
        content_P1.scatter_(0, slots_ER.flatten(), experts_ER.flatten())
        return content_P1[: self.num_physical]

    @property
    def slots_per_rank(self) -> int:
        return self.num_physical // self.num_ranks

    @classmethod
    def from_physical_to_logical(
        cls, physical_to_logical: torch.Tensor, *, num_logical: int, num_ranks: int
    ) -> Placement:
        """Placement with the given content of the slots, replicas in slot order.

        Raises:
            ValueError: the slots do not divide over the ranks, a slot names an expert
                that does not exist, or an expert has no slot.
        """
        slots_P = physical_to_logical.to(torch.int64)
        num_physical = slots_P.shape[0]
        if num_ranks < 1 or num_physical % num_ranks:
            raise ValueError(
                f"{num_physical} physical experts do not divide over {num_ranks} ranks; "
                f"each rank needs the same number of slots."
            )
        if num_physical and (int(slots_P.min()) < 0 or int(slots_P.max()) >= num_logical):
            raise ValueError(
                f"physical_to_logical names experts {int(slots_P.min())} to {int(slots_P.max())}; "
                f"the layer has experts 0 to {num_logical - 1}."
            )
        replicas_E = torch.bincount(slots_P, minlength=num_logical)
        missing = torch.nonzero(replicas_E == 0).flatten().tolist()
        if missing:
            raise ValueError(f"logical experts {missing} have no slot; every expert needs one.")
        order_P = torch.argsort(slots_P, stable=True)
        first_E = torch.cumsum(replicas_E, 0) - replicas_E
        expert_P = slots_P[order_P]
        rank_in_expert_P = torch.arange(num_physical, device=slots_P.device) - first_E[expert_P]
        table_ER = torch.full(
            (num_logical, int(replicas_E.max())), -1, dtype=torch.int32, device=slots_P.device
        )
        table_ER[expert_P, rank_in_expert_P] = order_P.to(torch.int32)
        return cls(
            logical_to_physical_ER=table_ER,
            num_replicas_E=replicas_E.to(torch.int32),
            num_ranks=num_ranks,
            num_physical=num_physical,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What one batch asks of one layer, the same on every rank."""

    tokens_E: torch.Tensor
    """(Token, choice) pairs of each logical expert in the global batch, [E] int32."""
    tokens_SE: torch.Tensor | None = None
    """The same per source rank, [S, E] int32; only where a policy asks for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which replica serves how many tokens of each expert."""

    split_ER: torch.Tensor
    """Tokens given to each replica, [E, R] int32; row e sums to ``tokens_E[e]``, zero where
    ``logical_to_physical_ER`` is -1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicSlots:
    """What the dynamic slots of one layer hold. Rank s owns its E / S home experts, in linear
    order, followed by D dynamic slots: P = E + S * D."""

    num_logical: int
    """E, a multiple of S."""
    content_SD: torch.Tensor
    """Logical expert in each dynamic slot, [S, D] int32, -1 where there is none. A rank holds
    no expert twice and none of its home experts."""
    idle_SD: torch.Tensor
    """Batches since the slot's expert last had tokens there, [S, D] int32."""

    @property
    def num_ranks(self) -> int:
        return self.content_SD.shape[0]

    @property
    def num_dynamic(self) -> int:
        """D, dynamic slots of one rank."""
        return self.content_SD.shape[1]

    @property
    def num_physical(self) -> int:
        return self.num_logical + self.content_SD.numel()

    @classmethod
    def empty(cls, *, num_logical: int, num_ranks: int, num_dynamic: int) -> DynamicSlots:
        """Slots that hold nothing yet.

        Raises:
            ValueError: the experts do not divide over the ranks.
        """
        if num_ranks < 1 or num_logical % num_ranks:
            raise ValueError(
                f"{num_logical} experts do not divide over {num_ranks} ranks; dynamic slots need "
                f"the same number of home experts on each rank."
            )
        shape = (num_ranks, num_dynamic)
        return cls(
            num_logical=num_logical,
            content_SD=torch.full(shape, -1, dtype=torch.int32),
            idle_SD=torch.zeros(shape, dtype=torch.int32),
        )


class Outcome(IntEnum):
    """What a schedule with dynamic slots did with a batch."""

    EMPTY = 0
    """No tokens."""
    MEMORY_BOUND = 1
    """Few tokens per expert: one replica per active expert, among those that are there."""
    BALANCED = 2
    """Stepped aside: the home ranks are as even as the tolerance asks."""
    UNPAID = 3
    """Stepped aside: uneven, but no move is worth a fetch."""
    HELD = 4
    """Tokens moved to replicas that were there already."""
    FETCHED = 5
    """Tokens moved, experts fetched for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """What one batch of one layer does with its dynamic slots, the same on every rank."""

    plan: Plan
    """Split over the replicas of ``placement``, once the fetches are done."""
    fetch_SD: torch.Tensor
    """Logical expert to bring into each dynamic slot for this batch, [S, D] int32, -1 where the
    slot stays as it is."""
    placement: Placement
    """Where experts live once everything is fetched: R = S columns, the home slot first, then
    dynamic slots in rank order."""
    slots: DynamicSlots
    """The state after the batch, which the next one starts from."""
    outcome: Outcome
