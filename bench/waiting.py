"""How long ranks wait for the slowest one and for fetches, from the status of all ranks."""

from __future__ import annotations

from typing import Any

FETCHED = ("fetches", "early_fetches", "early_hits", "hits", "wasted_bytes", "evictions")


def shares(ranks: list[dict[str, Any]], seconds: float, top_k: int) -> dict[str, Any]:
    """Tokens through the model per second, shares of time that ranks wait, and fetches.

    The waiting share is of the time in a layer's experts: 1 - mean / maximum over the ranks, with
    time for fetches counted as waiting, summed over layers and the last batches.

    Args:
        ranks: status with layers of every rank, of a CPU server.
        seconds: time in which the tokens were computed.
    """
    first = ranks[0]
    busy_us = fetch_us = slowest_us = 0.0
    for layers in zip(*(rank["layers"] for rank in ranks), strict=True):
        for of_ranks in zip(*(layer["recent_experts_us"] for layer in layers), strict=True):
            busy_us += sum(of_ranks) / len(ranks)
            slowest_us += max(of_ranks)
        fetch_us += max(layer.get("fetch_wait_us", 0.0) for layer in layers)
    whole_us = slowest_us + fetch_us
    return {
        "model_tokens_per_s": first["pairs"] / first["num_layers"] / top_k / seconds,
        "waiting_share": 1 - busy_us / whole_us,
        "fetch_wait_share": fetch_us / whole_us,
        **{name: sum(rank[name] for rank in ranks) for name in FETCHED if name in first},
    }
