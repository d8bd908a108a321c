"""What the ranks' counters say about a load, in the fields of a row."""

from __future__ import annotations

from typing import Any

from bench.load import Answered
from vllm_balance.measurement import schedules

Ranks = list[dict[str, Any]]
"""The status of every rank, by rank."""
SHARED = ("decisions", "max_activated_sum", "max_tokens_sum", "pairs", "activated_per_rank")


def require_trustworthy(
    name: str, ranks: Ranks, *, min_steps: int, is_skewed_prefill: bool = False
) -> None:
    """Returns if all ranks decided the same, in every layer of at least ``min_steps`` steps.

    Args:
        is_skewed_prefill: the load is what a balancer that fetches is for, so it must not have
            taken all of it for decode.

    Raises:
        RuntimeError: otherwise; the numbers would mean nothing.
    """
    for key in SHARED:
        if any(rank[key] != ranks[0][key] for rank in ranks):
            raise RuntimeError(
                f"{name}: ranks differ in {key}: {[rank[key] for rank in ranks]}; no number from "
                f"this run."
            )
    first = ranks[0]
    needed = min_steps * first["num_layers"]
    if first["pairs"] == 0 or _with_tokens(first) < needed:
        raise RuntimeError(
            f"{name}: the policy ran {_with_tokens(first)} times for {first['pairs']} pairs, but "
            f"this load takes at least {min_steps} steps of {first['num_layers']} layers; no "
            f"number from this run."
        )
    found = schedules(first)
    with_tokens = sum(found.values()) - found.get("empty", 0)
    if is_skewed_prefill and found and found["memory_bound"] == with_tokens:
        raise RuntimeError(
            f"{name}: all {with_tokens} schedules took this skewed prefill for memory-bound and "
            f"moved nothing, so the row would be of a policy that did not run. Send longer prompts "
            f"or lower `knee_tokens`."
        )


def counted(ranks: Ranks) -> dict[str, Any]:
    """Fields of a row: what the policy did and what it cost, in means over steps with tokens;
    data-parallel ranks take others too."""
    first, num_ranks = ranks[0], len(ranks)
    batches = _with_tokens(first)
    steps = batches / first["num_layers"]
    slowest = max(ranks, key=lambda rank: rank["experts_us"])
    decide_us = slowest["decide_us"] + slowest.get("look_ahead_us", 0.0)
    layer_us = slowest["experts_us"] + slowest["experts_wrapping_us"] + decide_us
    return {
        "policy": first["balancer"],
        "placement": first["placement"],
        "online": first.get("online"),
        **{key: first[key] for key in ("num_ranks", "num_layers", "decisions")},
        **{key: first[key] for key in ("num_logical_experts", "num_physical_experts")},
        **{key: first[key] for key in ("memory_bound_batches", "compute_bound_batches")},
        "steps": steps,
        "activated_worst_rank": first["max_activated_sum"] / steps,
        "tokens_worst_rank": first["max_tokens_sum"] / steps,
        "activated_per_rank": [value / steps for value in first["activated_per_rank"]],
        "tokens_per_rank": [value / steps for value in first["tokens_per_rank"]],
        "waiting_share_by_experts": 1
        - sum(first["activated_per_rank"]) / num_ranks / first["max_activated_sum"],
        "waiting_share_by_tokens": 1 - first["pairs"] / num_ranks / first["max_tokens_sum"],
        "experts_us_per_rank": [rank["experts_us"] for rank in ranks],
        "experts_us_per_layer": slowest["experts_us"] / batches,
        "decide_us_per_layer": decide_us / batches,
        "decide_share": decide_us / layer_us,
        "wrapping_share": slowest["experts_wrapping_us"] / layer_us,
    }


def _with_tokens(rank: dict[str, Any]) -> int:
    """Batches that were routed, in all layers."""
    found: int = rank["memory_bound_batches"] + rank["compute_bound_batches"]
    return found


def huge_page_share(ranks: Ranks) -> float | None:
    """Of the expert weights, what lies in huge pages on the rank with the least."""
    return min(
        (rank["huge_page_share"] for rank in ranks if "huge_page_share" in rank), default=None
    )


def samples(answered: Answered) -> list[dict[str, Any]]:
    """Fields of a row's samples: what changed from one look to the next."""
    found, before = [], None
    for at_s, (first, *_) in answered.looks:
        steps = (first["decisions"] - (before["decisions"] if before else 0)) / first["num_layers"]
        if steps > 0:
            found.append(
                {
                    "at_s": round(at_s, 2),
                    "steps": steps,
                    "activated_per_rank": _per_step("activated_per_rank", first, before, steps),
                    "tokens_per_rank": _per_step("tokens_per_rank", first, before, steps),
                }
            )
            before = first
    return found


def _per_step(
    key: str, now: dict[str, Any], before: dict[str, Any] | None, steps: float
) -> list[float]:
    earlier = before[key] if before else [0] * len(now[key])
    return [round((b - a) / steps, 2) for a, b in zip(earlier, now[key], strict=True)]


def heat(answered: Answered) -> list[dict[str, list[int]]]:
    """Fields of a row's layers: the last placement, and the pairs seen on its slots.

    Sums the last batches at every look under that placement.
    """
    _, last = answered.looks[-1]
    layers = []
    for index, layer in enumerate(last[0]["layers"]):
        experts = layer["physical_to_logical"]
        seen = [
            _slot_tokens(ranks, index)
            for _, ranks in answered.looks
            if ranks[0]["layers"][index]["physical_to_logical"] == experts
        ]
        totals = [sum(column) for column in zip(*seen, strict=True)]
        layers.append({"physical_to_logical": experts, "slot_tokens": totals})
    return layers


def _slot_tokens(ranks: Ranks, layer: int) -> list[int]:
    """Pairs of the last batch on each slot; where a rank sees only its own, those of all ranks."""
    seeing = ranks if ranks[0]["exchange"] == "all_reduce" else ranks[:1]
    columns = zip(*(rank["layers"][layer]["slot_tokens"] for rank in seeing), strict=True)
    return [sum(column) for column in columns]
