"""The ranks' counters in the text format that Prometheus scrapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from vllm_balance.types import Outcome

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "vllm_moe_balancer_"
LABELS = ("balancer", "rank")
COUNTERS = {
    "decisions": "Times the policy was asked: layers x steps.",
    "memory_bound_batches": "Batches routed to one replica per active expert, over all layers.",
    "compute_bound_batches": "Batches routed by tokens, over all layers.",
    "empty_batches": "Batches without tokens, over all layers.",
    "max_activated_sum": "Most activated experts on any rank, summed over layers and steps.",
    "max_tokens_sum": "Most (token, expert) pairs on any rank, summed over layers and steps.",
    "activated_sum": "Activated experts of all ranks.",
    "pairs": "(token, expert) pairs of all ranks.",
    "activated_per_rank": "Activated experts of this rank.",
    "tokens_per_rank": "(token, expert) pairs of this rank.",
    "decide_us": "Host time spent deciding.",
    "exchange_us": "Time of exchanges beyond vLLM's own collectives.",
    "exchanged_bytes": "What this rank put into these exchanges.",
    "experts_us": "CPU: time in the experts' kernel.",
    "experts_wrapping_us": "CPU: time around the experts' kernel.",
    "fetches": "Experts fetched for the batch itself.",
    "early_fetches": "Experts fetched by look-ahead.",
    "hits": "Dynamic slots with tokens that held their expert already.",
    "early_hits": "Those of them that look-ahead had fetched.",
    "evictions": "Experts overwritten in dynamic slots.",
    "fetched_bytes": "Weights fetched.",
    "wasted_bytes": "Weights fetched and overwritten without having been computed with.",
    "fetch_wait_us": "Time of the rank's own thread for copies: starting them and waiting.",
    "look_ahead_us": "Time for guesses of what the next layer needs.",
    **{f"{o.name.lower()}_schedules": f"Batches with outcome {o.name.lower()}." for o in Outcome},
    "online_steps": "Steps that online placement saw.",
    "online_decisions": "Decisions of online placement.",
    "online_moves": "Decisions that moved experts.",
    "online_swaps": "Pairs of experts exchanged.",
    "online_deciding_us": "Time of the decisions.",
    "online_moving_us": "Time of the exchanges.",
}
"""Keys of a rank's status, those of its ``online`` with ``online_`` in front, and what they say."""
GAUGES = {
    "num_layers": "Balanced MoE layers.",
    "num_ranks": "Expert-parallel ranks.",
    "num_logical_experts": "Experts of one layer.",
    "num_physical_experts": "Slots of one layer over all ranks.",
    "huge_page_share": "CPU: share of the expert weights in huge pages, 0 to 1.",
    "counts_are_global": "0 if a rank saw only its own tokens and nothing was exchanged.",
    "online_swap_us": "Measured time of one exchange.",
    "online_drift": "Drift of the load since the last move: 0 the same, 1 entirely other experts.",
    "online_slowdown_per_rank": "Measured slowdown of this rank.",
}


OF_ALL_RANKS = ("max_activated_sum", "max_tokens_sum", "activated_sum", "pairs")
"""Counters of whole batches, which a rank that sees only its own tokens does not know."""
ASIDE = ("stepped_aside", "Batches in which the balancer did not do what its name says, by reason.")
"""The one key with several numbers: its family's name and what it says."""


class StatusCollector:
    """What ``GET /moe_balancer`` says, as families of metrics; only what some rank reports."""

    def __init__(self, ranks: list[dict[str, Any]]) -> None:
        self._ranks = [
            rank | {f"online_{key}": value for key, value in rank.get("online", {}).items()}
            for rank in ranks
        ]

    def collect(self) -> Iterator[Metric]:
        """One family per key, one sample per rank, and per reason where it has several."""
        family: CounterMetricFamily | GaugeMetricFamily
        for key, meaning in (COUNTERS | GAUGES).items():
            if key in COUNTERS:
                family = CounterMetricFamily(metric_name(key), meaning, labels=LABELS)
            else:
                family = GaugeMetricFamily(metric_name(key), meaning, labels=LABELS)
            for rank in self._ranks:
                value = _of_rank(rank, key)
                if value is not None:
                    family.add_metric((rank["balancer"], str(rank["rank"])), value)
            if family.samples:
                yield family
        aside = CounterMetricFamily(PREFIX + ASIDE[0], ASIDE[1], labels=(*LABELS, "reason"))
        for rank in self._ranks:
            for reason, batches in rank.get(ASIDE[0], {}).items():
                aside.add_metric((rank["balancer"], str(rank["rank"]), reason), batches)
        if aside.samples:
            yield aside


def metric_name(key: str) -> str:
    """The metric of a key, in base units; a counter's samples end in ``_total`` besides."""
    name = key.removeprefix("num_").removesuffix("_sum")
    if key.endswith("_per_rank"):
        name = f"rank_{name.removesuffix('_per_rank')}"
    if key.endswith("_us"):
        name = f"{name.removesuffix('_us')}_seconds"
    return PREFIX + name


def exposition(ranks: list[dict[str, Any]]) -> bytes:
    """The status of every rank in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(StatusCollector(ranks))
    return generate_latest(registry)


def _of_rank(rank: dict[str, Any], key: str) -> float | None:
    """The value in base units, of a list the rank's own; None where there is none.

    A rank that sees only its own tokens does not know what came to it from others.
    """
    value = rank.get(key)
    if (isinstance(value, list) or key in OF_ALL_RANKS) and not rank.get("counts_are_global", True):
        return None
    if isinstance(value, list):
        value = value[rank["rank"]]
    if value is None:
        return None
    return float(value) / 1e6 if key.endswith("_us") else float(value)
