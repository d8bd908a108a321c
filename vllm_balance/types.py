"""The vocabulary that crosses a stage: where experts live, what a batch asks for, what was decided.

Axis letters, used as name suffixes everywhere in this package:

====  ==========================================================
T     tokens on this rank                G  tokens on all ranks
K     choices per token (top-k)          E  logical experts
P     physical experts (slots)           R  replicas of one expert, padded with -1
S     ranks                              L  MoE layers
D     hidden size                        F  inner size of an expert
====  ==========================================================
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where the experts of one layer live. All tensors are int32 on one device.

    Slots of a rank are consecutive: rank ``s`` owns ``s * P / S`` to ``(s + 1) * P / S - 1``.
    """

    physical_to_logical_P: torch.Tensor
    """Logical expert held by each slot, [P]."""
    logical_to_physical_ER: torch.Tensor
    """Slots of each logical expert, [E, R], padded with -1 behind the last replica."""
    num_replicas_E: torch.Tensor
    """Number of slots of each logical expert, [E], at least 1."""
    num_ranks: int

    @property
    def num_logical(self) -> int:
        return self.num_replicas_E.shape[0]

    @property
    def num_physical(self) -> int:
        return self.physical_to_logical_P.shape[0]

    @property
    def slots_per_rank(self) -> int:
        return self.num_physical // self.num_ranks

    @property
    def physical_to_rank_P(self) -> torch.Tensor:
        """Rank that owns each slot, [P] int32."""
        slots = torch.arange(
            self.num_physical, dtype=torch.int32, device=self.physical_to_logical_P.device
        )
        return slots // self.slots_per_rank

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
            physical_to_logical_P=slots_P.to(torch.int32),
            logical_to_physical_ER=table_ER,
            num_replicas_E=replicas_E.to(torch.int32),
            num_ranks=num_ranks,
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
