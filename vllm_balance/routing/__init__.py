"""Routing policies: which replica serves which tokens of this batch. One file per policy."""

from __future__ import annotations

from vllm_balance.routing.eplb import EplbRouting
from vllm_balance.routing.first_copy import FirstCopyRouting
from vllm_balance.routing.gem import GemRouting
from vllm_balance.routing.metro import MetroRouting
from vllm_balance.routing.policy import LayerTables, RoutingPolicy
from vllm_balance.routing.static import StaticRouting

ROUTING: dict[str, type[RoutingPolicy]] = {
    "static": StaticRouting,
    "eplb": EplbRouting,
    "first_copy": FirstCopyRouting,
    "metro": MetroRouting,
    "gem": GemRouting,
}
"""Every balancer by the name that ``--moe-balancer`` takes."""

__all__ = ["ROUTING", "LayerTables", "RoutingPolicy"]
