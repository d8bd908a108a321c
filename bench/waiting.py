"""How long ranks wait for the slowest one and for fetches, from the status of all ranks."""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_balance.types import Outcome

SCHEDULES = tuple(f"{outcome.name.lower()}_schedules" for outcome in Outcome)
FETCHED = ("fetches", "early_fetches", "early_hits", "hits", "wasted_bytes", "evictions")
FETCHED += SCHEDULES


def shares(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Fields of a row: shares of time that ranks wait, the spread of batches, fetches, schedules.

    The time of each batch is there for the last ones only (`RECENT_BATCHES` of
    `vllm_balance/experts/local_pairs.py`), waiting for fetches and the time of all batches together
    since the reset. So of a longer load the last batches stand for all.

    Args:
        ranks: status with layers of every rank.
    """
    layers_SL = [rank["layers"] for rank in ranks]
    times_SLB = np.array([[layer["recent_experts_us"] for layer in layers] for layers in layers_SL])
    fetch_SL = np.array([[layer.get("fetch_wait_us", 0.0) for layer in row] for row in layers_SL])
    found: dict[str, Any] = {}
    times_SLB = times_SLB[:, :, times_SLB.any((0, 1))]  # Without batches of no tokens.
    if times_SLB.size:
        slowest_B = times_SLB.max(0).sum(0)
        fetch_us = fetch_SL.max(0).sum() * times_SLB.sum() / _all_us(layers_SL)
        whole_us = slowest_B.sum() + fetch_us
        found["waiting_share"] = float(1 - times_SLB.mean(0).sum() / whole_us)
        found["fetch_wait_share"] = float(fetch_us / whole_us)
        found["batch_time_spread"] = float(slowest_B.std() / slowest_B.mean())
    if "fetches" in ranks[0]:
        found["fetching"] = {name: sum(rank[name] for rank in ranks) for name in FETCHED}
    return found


def _all_us(layers_SL: list[list[dict[str, Any]]]) -> float:
    """Time of all batches in the experts and around them, us, summed over ranks and layers."""
    return sum(
        layer["experts_us"] + layer["experts_wrapping_us"] for row in layers_SL for layer in row
    )
