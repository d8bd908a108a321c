"""What a placement policy is, and what it knows of the deployment."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from vllm_balance.cost import CostModel
from vllm_balance.errors import BalancerError

Array = np.ndarray[Any, np.dtype[Any]]
Progress = Callable[[int], None]
"""Called with a layer's position whenever the placement of that layer is ready."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The ranks that experts are placed on."""

    costs: tuple[CostModel, ...]
    """Measured curve of each rank; its length is the number of ranks."""
    num_redundant: int = 0
    """Physical experts beyond the logical ones, over all ranks."""
    num_nodes: int = 1
    num_groups: int = 1
    """Of consecutive experts, each of which vLLM's EPLB keeps on one node, if nodes can have
    equally many."""

    @property
    def num_ranks(self) -> int:
        return len(self.costs)

    def num_physical(self, num_experts: int) -> int:
        """Slots of a layer.

        Raises:
            BalancerError: they do not divide over the ranks.
        """
        num_physical = num_experts + self.num_redundant
        if self.num_ranks < 1 or num_physical % self.num_ranks:
            short = -num_physical % max(self.num_ranks, 1)
            raise BalancerError(
                f"{num_experts} experts and {self.num_redundant} redundant ones make "
                f"{num_physical} slots, which do not divide over {self.num_ranks} ranks. Use "
                f"{self.num_redundant + short} redundant experts, or another number of ranks."
            )
        return num_physical


class PlacementPolicy(Protocol):
    """Where experts live. Pure: the same arguments give the same placement."""

    name: ClassVar[str]

    def place(
        self, history_NLE: Array, cluster: Cluster, progress: Progress | None = None
    ) -> Array:
        """Logical expert of each slot, int32 [L, P]; slots of a rank are consecutive.

        Args:
            history_NLE: pairs of each expert in each recorded step, integers [N, L, E], N >= 1.
            cluster: the ranks' curves, and how many redundant experts they hold together.
            progress: called with each layer's position when it is ready.

        Raises:
            BalancerError: the slots do not divide over the ranks, or the policy cannot use
                redundant experts.
        """
        ...


def place_layers(
    place_layer: Callable[[int], Array], num_layers: int, progress: Progress | None
) -> Array:
    """The rows of all layers, int32 [L, P], computed on all cores that this process may use."""

    def placed(layer: int) -> Array:
        row_P = place_layer(layer)
        if progress is not None:
            progress(layer)
        return row_P

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        return np.stack(list(threads.map(placed, range(num_layers))))


def check_history(history_NLE: Array) -> None:
    """Raises BalancerError if the history is not [N, L, E] of counts with at least one step."""
    if history_NLE.ndim != 3 or 0 in history_NLE.shape or history_NLE.dtype.kind not in "iu":
        raise BalancerError(
            f"The history has the shape {history_NLE.shape} and dtype {history_NLE.dtype}; needed "
            f"are integers [steps, layers, experts] and at least one step."
        )
    if history_NLE.min() < 0:
        raise BalancerError("The history holds a negative count.")


def refuse_redundant(cluster: Cluster, name: str) -> None:
    """Raises BalancerError if redundant experts were asked of a policy without replicas."""
    if cluster.num_redundant:
        raise BalancerError(
            f"Placement {name} keeps one copy of each expert, but {cluster.num_redundant} "
            f"redundant experts were asked for. Use gem_r or eplb, or 0 redundant experts."
        )
