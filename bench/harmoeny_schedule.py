"""How even each schedule makes the ranks, how many experts it fetches for that, and its time.

    python -m bench.harmoeny_schedule --traces DIR      # bench/results/harmoeny_schedule.jsonl
    python -m bench.harmoeny_schedule --only times      # measures only the times anew

No model runs here: tokens are counted, not computed. Placements are fitted on one half of a load,
everything is judged on the other, batch after batch, slots kept from batch to batch.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.harmoeny_loads import BATCH_TOKENS, BATCHES, Load, recorded, skewed
from bench.harmoeny_lookahead import lookahead_rows
from bench.metro_stages import medians_us
from bench.provenance import ROOT, config_hash, provenance, require_all_sources
from vllm_balance.cost import CostModel
from vllm_balance.kernels.rebalance import Eviction, Rules
from vllm_balance.placement import PLACEMENT, TRACED, Cluster
from vllm_balance.placement.score import step_times
from vllm_balance.routing import FETCHING
from vllm_balance.types import Demand, DynamicSlots, Outcome, Schedule

RESULTS = ROOT / "bench/results/harmoeny_schedule.jsonl"
RANKS = (2, 4, 8, 16)
DYNAMIC = (2, 4, 8)
RULES = Rules(threshold_tokens=64, fetch_tokens=64)
"""Of all schedules here: a fetch costs its rank q tokens' time, as in a server. q is near that of
bfloat16 experts on a CPU core with AMX."""
TOKENS = CostModel(a_us=0, b_us=0, c_us=0, beta_us=1)
"""Ranks whose time is their number of tokens."""
TIMED_SLOTS = 4
TIMED = ((64, 2), (128, 2), (128, 4), (128, 8), (256, 16), (512, 64))
"""Experts and ranks of a time row."""
TIMED_RECORDED = (4, 8, 16)
"""Ranks of the time rows of a recorded load, where its experts divide over them."""
SWEEPS = 9
Row = dict[str, Any]


def tokens_per_rank(found: Schedule) -> np.ndarray:
    """Tokens of each rank under a schedule, [S]."""
    placement = found.placement
    table_ER = placement.logical_to_physical_ER.numpy()
    tokens_P = np.bincount(
        np.where(table_ER < 0, 0, table_ER).ravel(),
        weights=np.where(table_ER < 0, 0, found.plan.split_ER.numpy()).ravel(),
        minlength=placement.num_physical,
    )
    return tokens_P.reshape(placement.num_ranks, -1).sum(1)


def demand_of(tokens_E: np.ndarray) -> Demand:
    """The counts as a policy takes them, from a batch that every rank sees."""
    return Demand(tokens_E=torch.from_numpy(tokens_E.astype(np.int32)))


def play(name: str, rules: Rules, load: Load, num_ranks: int, num_dynamic: int) -> Row:
    """All batches under one policy with dynamic slots."""
    policy = FETCHING[name](rules)
    slots = DynamicSlots.empty(
        num_logical=load.num_experts, num_ranks=num_ranks, num_dynamic=num_dynamic
    )
    ratios, fetches, served, outcomes = [], 0, 0, dict.fromkeys(Outcome, 0)
    for tokens_E in load.counts_NE:
        found = policy.schedule(demand_of(tokens_E), slots)
        slots = found.slots
        tokens_S = tokens_per_rank(found)
        ratios.append(tokens_S.max() / tokens_S.mean())
        fetches += int((found.fetch_SD >= 0).sum())
        served += int((found.plan.split_ER[:, 1:] > 0).sum())
        outcomes[found.outcome] += 1
    return {
        **_ratios(np.array(ratios)),
        "fetches_per_rank": round(fetches / len(ratios) / num_ranks, 3),
        "held_share": round(1 - fetches / served, 4) if served else None,
        "outcomes": {outcome.name.lower(): n for outcome, n in outcomes.items() if n},
    }


def stay(tokens_NS: np.ndarray) -> Row:
    """All batches under a placement."""
    return _ratios(tokens_NS.max(1) / tokens_NS.mean(1))


def _ratios(ratio_N: np.ndarray) -> Row:
    return {
        "ratio": round(float(ratio_N.mean()), 4),
        "worst": round(float(ratio_N.max()), 4),
        "std": round(float(ratio_N.std()), 4),
    }


def without_memory(load: Load, num_ranks: int) -> Row:
    """The placements that need no further experts."""
    cluster = Cluster(costs=(TOKENS,) * num_ranks)
    linear_P = PLACEMENT["linear"]().place(load.fit_NE[:, None], cluster)[0]
    found = {"static": stay(step_times(load.counts_NE, linear_P, cluster))}
    if load.trace is not None:
        half, layer = load.trace
        exflow_LP = TRACED["exflow"]().place_trace(half, cluster)
        found["exflow"] = stay(step_times(load.counts_NE, exflow_LP[layer], cluster))
    return found


def quality_row(load: Load, num_ranks: int, num_dynamic: int) -> Row:
    """max / mean tokens of every policy with slots on one load, and what it fetched."""
    cluster = Cluster(costs=(TOKENS,) * num_ranks, num_redundant=num_ranks * num_dynamic)
    row: Row = {
        "kind": "quality",
        "load": load.name,
        "E": load.num_experts,
        "S": num_ranks,
        "D": num_dynamic,
        "top_k": load.top_k,
        "pairs": int(load.counts_NE.sum(1).mean()),
    }
    eplb_P = PLACEMENT["eplb"]().place(load.fit_NE[:, None], cluster)[0]
    row["eplb"] = stay(step_times(load.counts_NE, eplb_P, cluster))
    first = replace(RULES, eviction=Eviction.FIRST)
    for name in FETCHING:
        row[name] = play(name, RULES, load, num_ranks, num_dynamic)
    for name in ("harmoeny", "harmoeny_paper"):  # the paper's eviction
        row[f"{name}, first"] = play(name, first, load, num_ranks, num_dynamic)
    return row


def time_rows(repetitions: int, folder: Path | None, seed: int) -> Iterator[Row]:
    """Whole calls of every schedule from Python, counts given, by sweeps: of the skew model, and of
    the recorded loads in a folder."""
    for num_experts, num_ranks in TIMED:
        for alpha in (0.0, 0.9):
            tokens_SE = _skewed_tokens(num_experts, num_ranks, alpha)
            yield _time_row(tokens_SE, repetitions) | {"alpha": alpha}
    for load in recorded(folder, seed) if folder else ():
        for num_ranks in (ranks for ranks in TIMED_RECORDED if load.num_experts % ranks == 0):
            tokens_SE = load.counts_NE[:num_ranks].astype(np.int32)
            yield _time_row(tokens_SE, repetitions) | {"alpha": None, "load": load.name}


def _skewed_tokens(num_experts: int, num_ranks: int, alpha: float) -> np.ndarray:
    """Pairs of each expert from each rank, int32 [S, E]; the hot experts are on the first rank."""
    rng = np.random.default_rng(num_experts)
    hot = min(10, num_experts // num_ranks)
    weight_E = np.full(num_experts, (1 - alpha) / num_experts)
    weight_E[:hot] += alpha / hot
    return rng.multinomial(BATCH_TOKENS * 4, weight_E, size=num_ranks).astype(np.int32)


def _time_row(tokens_SE: np.ndarray, repetitions: int) -> Row:
    """Median and range over sweeps of one batch, whose pairs come from as many ranks."""
    sweeps = [_sweep(tokens_SE, repetitions) for _ in range(SWEEPS)]
    names = sweeps[0]
    num_ranks, num_experts = tokens_SE.shape
    return {
        "kind": "time",
        "E": num_experts,
        "S": num_ranks,
        "D": TIMED_SLOTS,
        "time_us": {n: round(float(np.median([s[n] for s in sweeps])), 1) for n in names},
        "range_us": {n: [min(s[n] for s in sweeps), max(s[n] for s in sweeps)] for n in names},
        "sweeps": SWEEPS,
        "repetitions": repetitions,
    }


def _sweep(tokens_SE: np.ndarray, repetitions: int) -> dict[str, float]:
    """Median microseconds per call; slots as they are after the batches before."""
    num_ranks, num_experts = tokens_SE.shape
    whole = demand_of(tokens_SE.sum(0))
    by_source = Demand(tokens_E=whole.tokens_E, tokens_SE=torch.from_numpy(tokens_SE))
    runs = {}
    for name in FETCHING:
        policy = FETCHING[name](RULES)
        slots = DynamicSlots.empty(
            num_logical=num_experts, num_ranks=num_ranks, num_dynamic=TIMED_SLOTS
        )
        runs[name] = lambda p=policy, s=slots: p.schedule(whole, s)
        after = policy.schedule(whole, slots).slots
        runs[f"{name}, again"] = lambda p=policy, s=after: p.schedule(whole, s)
        if name == "harmoeny_paper":
            runs[f"{name}, {num_ranks} sources"] = lambda p=policy, s=slots: p.schedule(
                by_source, s
            )
    return medians_us(runs, repetitions)


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """All rows asked for."""
    torch.set_num_threads(1)
    if arguments.only in (None, "times"):
        yield from time_rows(arguments.repetitions, arguments.traces, arguments.seed)
    if arguments.only in (None, "quality"):
        for num_ranks in RANKS:
            loads = list(skewed(num_ranks, arguments.seed))
            loads += recorded(arguments.traces, arguments.seed) if arguments.traces else []
            for load in (one for one in loads if one.num_experts % num_ranks == 0):
                fixed = without_memory(load, num_ranks)
                foreign = load.num_experts - load.num_experts // num_ranks
                for num_dynamic in (slots for slots in DYNAMIC if slots <= foreign):
                    yield fixed | quality_row(load, num_ranks, num_dynamic)
    if arguments.only in (None, "lookahead") and arguments.traces:
        yield from lookahead_rows(arguments.traces, RANKS, DYNAMIC, RULES, arguments.seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=Path, help="folder with recorded routing (.npz)")
    parser.add_argument("--repetitions", type=int, default=200, help="calls per time and sweep")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("times", "quality", "lookahead"))
    arguments = parser.parse_args()
    require_all_sources(RESULTS, "load", arguments.traces)
    settings = {"ranks": RANKS, "dynamic": DYNAMIC, "rules": asdict(RULES),
                "batches": [BATCHES, BATCH_TOKENS], "seed": arguments.seed}  # fmt: skip
    origin = {"seed": arguments.seed, "config_hash": config_hash(settings),
              **provenance("numpy", "scipy")}  # fmt: skip
    kinds = {"times": "time"}.get(arguments.only, arguments.only)
    old = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    kept = [line for line in old if arguments.only and json.loads(line)["kind"] != kinds]
    fresh = [json.dumps(row | origin) for row in measure(arguments)]
    RESULTS.write_text("".join(line + "\n" for line in kept + fresh))


if __name__ == "__main__":
    main()
