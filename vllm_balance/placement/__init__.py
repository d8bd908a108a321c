"""Placement policies: where experts live. One file per policy."""

from __future__ import annotations

from vllm_balance.placement.eplb import EplbPlacement
from vllm_balance.placement.exflow import ExflowPlacement
from vllm_balance.placement.gem import GemPlacement
from vllm_balance.placement.gem_r import GemReplicaPlacement
from vllm_balance.placement.linear import LinearPlacement
from vllm_balance.placement.policy import Cluster, PlacementPolicy, Progress
from vllm_balance.placement.round_robin import RoundRobinPlacement
from vllm_balance.placement.score import Split, lower_bound_L, score_L

PLACEMENT: dict[str, type[PlacementPolicy]] = {
    "linear": LinearPlacement,
    "round_robin": RoundRobinPlacement,
    "eplb": EplbPlacement,
    "gem": GemPlacement,
    "gem_r": GemReplicaPlacement,
}
"""Every placement from counts by the name that ``vllm-balance place --policy`` takes."""

TRACED: dict[str, type[ExflowPlacement]] = {"exflow": ExflowPlacement}
"""Every placement that needs the ids of each token, likewise."""

__all__ = [
    "PLACEMENT",
    "TRACED",
    "Cluster",
    "PlacementPolicy",
    "Progress",
    "Split",
    "lower_bound_L",
    "score_L",
]
