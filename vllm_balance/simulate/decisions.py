"""What a balancer decides, by asking the same policy objects that production asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_balance.errors import BalancerError
from vllm_balance.kernels.record import counters_size
from vllm_balance.placement import PLACEMENT, TRACED, Cluster, PlacementPolicy
from vllm_balance.placement.eplb import EplbPlacement
from vllm_balance.placement.gem import GemPlacement
from vllm_balance.placement.gem_r import GemReplicaPlacement
from vllm_balance.routing import ROUTING, LayerTables, RoutingPolicy, make_policy
from vllm_balance.traces import Trace
from vllm_balance.types import Placement

Array = np.ndarray[Any, np.dtype[Any]]
_PLACED_BY = {"static": "linear", "gem": "gem", "exflow": "exflow"} | dict.fromkeys(
    ("eplb", "first_copy", "metro"), "eplb"
)
"""Placement policy of each balancer without dynamic slots; gem's without copies."""


def policy_of(balancer: str, knee_tokens: float, free_tokens: float | None = None) -> RoutingPolicy:
    """The routing policy of a balancer, as a worker makes it.

    Args:
        free_tokens: given where experts run in turn.

    Raises:
        BalancerError: there is no balancer of this name.
    """
    if balancer not in ROUTING:
        raise BalancerError(f"There is no balancer {balancer!r}; there are {', '.join(ROUTING)}.")
    return make_policy(balancer, knee_tokens, free_tokens)


def num_redundant(num_experts: int, num_ranks: int, redundancy: float) -> int:
    """Redundant experts for a ratio of physical to logical ones, rounded up to full ranks.

    Production refuses what does not divide, and says which numbers do.
    """
    asked = round((redundancy - 1) * num_experts)
    return asked + -(num_experts + asked) % num_ranks


def placement_policy(balancer: str, redundant: int) -> str:
    """Name in `PLACEMENT` or `TRACED` of where the experts of a balancer without dynamic slots
    live."""
    return "gem_r" if balancer == "gem" and redundant else _PLACED_BY[balancer]


def placements(policy: str, known: Array | Trace, cluster: Cluster) -> list[Placement]:
    """Where each layer's experts live.

    Args:
        known: counts of batches, [N, L, E], for a policy of `PLACEMENT`; a trace of ids for one of
            `TRACED`.
    """
    if isinstance(known, Trace):
        num_experts, slots_LP = known.num_experts, TRACED[policy]().place_trace(known, cluster)
    else:
        num_experts, slots_LP = known.shape[2], _placement(policy).place(known, cluster)
    return [
        Placement.from_physical_to_logical(
            torch.from_numpy(slots_P), num_logical=num_experts, num_ranks=cluster.num_ranks
        )
        for slots_P in slots_LP
    ]


def _placement(policy: str) -> PlacementPolicy:
    """A policy of `PLACEMENT` that places alike on every processor."""
    if policy == "gem":
        return GemPlacement(eplb=_StableEplb())
    if policy == "gem_r":
        return GemReplicaPlacement(eplb=_StableEplb())
    return _StableEplb() if policy == "eplb" else PLACEMENT[policy]()


class _StableEplb(EplbPlacement):
    """Slots of equal load in their order: vLLM sorts loads with numpy, whose order of equal ones
    differs between processors."""

    def _policy(self) -> Any:
        class Stable(super()._policy()):  # type: ignore[misc]
            @classmethod
            def balanced_packing(cls, weight: Array, num_packs: int) -> tuple[Array, Array]:
                if weight.shape[1] > num_packs:
                    return _packed(weight, num_packs)
                alone: tuple[Array, Array] = super().balanced_packing(weight, num_packs)
                return alone

        return Stable


def _packed(load_LP: Array, num_packs: int) -> tuple[Array, Array]:
    """Pack of each slot and its place there, two [L, P]: the largest load first, each into the
    lightest pack that is not full."""
    pack_LP, place_LP = np.empty(load_LP.shape, np.int64), np.empty(load_LP.shape, np.int64)
    room = load_LP.shape[1] // num_packs
    for layer, order_P in enumerate(np.argsort(-load_LP, axis=1, kind="stable")):
        held_S, filled_S = np.zeros(num_packs), np.zeros(num_packs, np.int64)
        for slot in order_P:
            pack = int(held_S.argmin())
            pack_LP[layer, slot], place_LP[layer, slot] = pack, filled_S[pack]
            filled_S[pack] += 1
            held_S[pack] += load_LP[layer, slot] if filled_S[pack] < room else np.inf
    return pack_LP, place_LP


@dataclass(frozen=True, slots=True, kw_only=True)
class Decider:
    """One balancer in all simulated layers."""

    policy: RoutingPolicy
    tables_L: tuple[LayerTables, ...]

    @classmethod
    def of(cls, policy: RoutingPolicy, layers: list[Placement]) -> Decider:
        """The balancer on these placements, with the buffers that production would use."""
        return cls(policy=policy, tables_L=tuple(map(_tables, layers)))

    @property
    def num_ranks(self) -> int:
        return self.tables_L[0].num_ranks

    def slots(self, ids_LTK: torch.Tensor) -> tuple[Array, None]:
        """Pairs of each slot in each layer after routing a batch, int32 [L, P]; no fetches.

        Raises:
            RuntimeError: a token was lost or doubled; the policy is broken.
        """
        tokens_LP = np.empty((len(self.tables_L), self.tables_L[0].num_physical), np.int32)
        for layer, tables in enumerate(self.tables_L):
            assert tables.load_P is not None
            tables.load_P.zero_()
            self.policy.route(ids_LTK[layer], tables, None)
            tokens_LP[layer] = tables.load_P.numpy()
        pairs = ids_LTK.shape[1] * ids_LTK.shape[2]
        if (tokens_LP.sum(1) != pairs).any():
            raise RuntimeError(
                f"{self.policy.name} routed {tokens_LP.sum(1).tolist()} pairs of {pairs}."
            )
        return tokens_LP, None


def _tables(placement: Placement) -> LayerTables:
    return LayerTables(
        logical_to_physical_ER=placement.logical_to_physical_ER,
        num_replicas_E=placement.num_replicas_E,
        num_ranks=placement.num_ranks,
        num_physical=placement.num_physical,
        load_P=torch.zeros(placement.num_physical, dtype=torch.int32),
        record_enabled=None,
        counters=torch.zeros(counters_size(placement.num_ranks), dtype=torch.int64),
    )
