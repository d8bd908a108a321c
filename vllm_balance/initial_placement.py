"""Where experts live when the model is loaded, whatever it was decided by."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from vllm_balance.errors import BalancerError
from vllm_balance.maps import PlacementMap

Array = np.ndarray[Any, np.dtype[Any]]


VLLMS_OWN = "vLLM's own"
HOME = "home experts"
"""That of balancers that fetch: dynamic slots start empty."""
EVERY_LAYER = -1
"""Index of a row that holds for every layer."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InitialPlacement:
    """The expert of every slot of every MoE layer at load time."""

    origin: str
    """What decided it, for people, e.g. ``gem map``."""
    layers: tuple[int, ...]
    """Index in the model of each row, counting dense layers; or EVERY_LAYER alone."""
    placement_LP: Array
    """Logical expert of each slot, int32 [L, P]; -1 is a slot that starts empty."""
    checksum: str
    """Hexadecimal; equal on all ranks if they load the same placement."""

    @classmethod
    def of(cls, origin: str, layers: tuple[int, ...], placement_LP: Array) -> Self:
        """A placement with the checksum of its content.

        Raises:
            ValueError: not one row for each layer.
        """
        placement_LP = np.ascontiguousarray(placement_LP, dtype=np.int32)
        if placement_LP.ndim != 2 or len(placement_LP) != len(layers):
            raise ValueError(f"{len(layers)} layers and a placement of {placement_LP.shape}")
        content = repr((layers, placement_LP.shape)).encode() + placement_LP.tobytes()
        return cls(
            origin=origin,
            layers=layers,
            placement_LP=placement_LP,
            checksum=hashlib.sha256(content).hexdigest(),
        )

    @classmethod
    def of_map(cls, found: PlacementMap, layers: tuple[int, ...]) -> Self:
        """These layers of a map, with the checksum of the file. They must be in it (`require`)."""
        return cls(
            origin=f"{found.policy} map",
            layers=layers,
            placement_LP=found.placement_LP(layers),
            checksum=found.checksum,
        )

    @classmethod
    def vllms_own(cls, num_experts: int, redundant: int) -> Self:
        """vLLM's own, in every layer: the experts in order, the first ones again behind them."""
        slots_P = np.arange(num_experts + redundant) % num_experts
        return cls.of(VLLMS_OWN, (EVERY_LAYER,), slots_P[None])

    @property
    def remedy(self) -> str:
        """What to do where weights cannot be loaded by it, the start of a sentence."""
        remedies = {
            VLLMS_OWN: "Use --moe-balancer static",
            HOME: "Use a --moe-balancer that fetches no experts",
        }
        return remedies.get(self.origin, "Omit `map`")

    @property
    def num_physical(self) -> int:
        """Slots of each layer."""
        return int(self.placement_LP.shape[1])

    def slots_P(self, layer: int) -> Array:
        """Logical expert of each slot of the layer with this index in the model, int32 [P].

        Raises:
            BalancerError: the layer has no row.
        """
        if self.layers == (EVERY_LAYER,):
            layer = EVERY_LAYER
        if layer not in self.layers:
            raise BalancerError(
                f"The initial placement ({self.origin}) has no entry for layer {layer} of the "
                f"model; it has {', '.join(map(str, self.layers))}."
            )
        row: Array = self.placement_LP[self.layers.index(layer)]
        return row


def tables(slots_P: Array, num_experts: int) -> tuple[Array, Array]:
    """Slots of each expert, int64 [E, R] padded with -1, and their number, int64 [E].

    Args:
        slots_P: expert of each slot, [P]; slots with -1 hold none.
    """
    by_expert_N = np.argsort(slots_P, kind="stable")[np.count_nonzero(slots_P < 0) :]
    expert_N = slots_P[by_expert_N]
    num_replicas_E = np.bincount(expert_N, minlength=num_experts)
    first_E = np.cumsum(num_replicas_E) - num_replicas_E
    table_ER = np.full((num_experts, int(num_replicas_E.max())), -1, dtype=np.int64)
    table_ER[expert_N, np.arange(len(expert_N)) - first_E[expert_N]] = by_expert_N
    return table_ER, num_replicas_E.astype(np.int64)
