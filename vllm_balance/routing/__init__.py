"""Routing policies: which replica serves which tokens of this batch. One file per policy."""

from __future__ import annotations

from vllm_balance.routing.eplb import EplbRouting
from vllm_balance.routing.even_split import EvenSplitRouting
from vllm_balance.routing.exflow import ExflowRouting
from vllm_balance.routing.fetching import FetchingPolicy
from vllm_balance.routing.first_copy import FirstCopyRouting
from vllm_balance.routing.gem import GemRouting
from vllm_balance.routing.harmoeny import HarmoenyRouting
from vllm_balance.routing.harmoeny_paper import HarmoenyPaperRouting
from vllm_balance.routing.metro import MetroRouting
from vllm_balance.routing.policy import CountingPolicy, LayerTables, RoutingPolicy
from vllm_balance.routing.shadow import ShadowRouting
from vllm_balance.routing.static import StaticRouting

ROUTING: dict[str, type[RoutingPolicy]] = {
    "static": StaticRouting,
    "eplb": EplbRouting,
    "first_copy": FirstCopyRouting,
    "metro": MetroRouting,
    "gem": GemRouting,
    "exflow": ExflowRouting,
}
"""Every balancer without dynamic slots by the name that ``--moe-balancer`` takes."""

FETCHING: dict[str, type[FetchingPolicy]] = {
    "harmoeny": HarmoenyRouting,
    "harmoeny_paper": HarmoenyPaperRouting,
    "shadow": ShadowRouting,
    "even_split": EvenSplitRouting,
}
"""Every balancer that needs dynamic slots and fetches experts into them, likewise."""


def make_policy(name: str, knee_tokens: float, free_tokens: float | None) -> RoutingPolicy:
    """The policy of a balancer in `ROUTING`; knee and free tokens are of :class:`MetroRouting`."""
    if name == MetroRouting.name:
        return MetroRouting(knee_tokens, free_tokens)
    return ROUTING[name]()


__all__ = [
    "FETCHING",
    "ROUTING",
    "CountingPolicy",
    "FetchingPolicy",
    "LayerTables",
    "RoutingPolicy",
    "make_policy",
]
