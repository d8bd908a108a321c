"""How long ranks wait for the slowest one and for fetches, from the status of all ranks."""

from __future__ import annotations

from typing import Any

import numpy as np

FETCHED = ("fetches", "early_fetches", "early_hits", "hits", "wasted_bytes", "evictions")


def shares(ranks: list[dict[str, Any]], seconds: float, top_k: int) -> dict[str, Any]:
    """Tokens through the model per second, shares of time that ranks wait, spread, and fetches.

    The waiting share is of the time in a layer's experts: 1 - mean / maximum over the ranks, with
    time for fetches counted as waiting, summed over layers and the last batches. The spread is
    the standard deviation of the slowest ranks' time in a batch over its mean.

    Args:
        ranks: status with layers of every rank, of a CPU server.
        seconds: time in which the tokens were computed.
    """
    first = ranks[0]
    layers_SL = [rank["layers"] for rank in ranks]
    times_SLB = np.array([[layer["recent_experts_us"] for layer in layers] for layers in layers_SL])
    fetch_SL = np.array([[layer.get("fetch_wait_us", 0.0) for layer in row] for row in layers_SL])
    slowest_B = times_SLB.max(0).sum(0)
    fetch_us = fetch_SL.max(0).sum()
    whole_us = slowest_B.sum() + fetch_us
    return {
        "model_tokens_per_s": first["pairs"] / first["num_layers"] / top_k / seconds,
        "waiting_share": float(1 - times_SLB.mean(0).sum() / whole_us),
        "fetch_wait_share": float(fetch_us / whole_us),
        "batch_time_spread": float(slowest_B.std() / slowest_B.mean()),
        **{name: sum(rank[name] for rank in ranks) for name in FETCHED if name in first},
    }
