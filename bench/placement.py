"""Placements in the model: GEM against linear, vLLM's EPLB placement and a lower bound.

    python -m bench.placement --traces DIR     # adds rows to bench/results/placement.jsonl

Nothing here is measured but the search times: scores are times that a cost model gives for batches
drawn from recorded traces. Placements are fitted on one part of a trace and scored on another.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from bench import command, markdown
from bench.provenance import ROOT, provenance
from vllm_balance import traces
from vllm_balance.commands.place import policy_of
from vllm_balance.cost import CostModel
from vllm_balance.placement import Cluster, lower_bound_L, score_L
from vllm_balance.placement.score import Split
from vllm_balance.recording import Phase

RESULTS = ROOT / "bench" / "results" / "placement.jsonl"
COSTS = {
    "tempo": CostModel(a_us=20, b_us=14.8, c_us=20, beta_us=0.0945),
    "cpu-amx": CostModel(
        a_us=0, b_us=627, c_us=0, beta_us=7.1,
        tile_us=178, tile_tokens=32, free_tokens=32, in_turn=True,
    ),
}  # fmt: skip
"""tempo: arXiv 2608.13057 for DeepSeek-V3's shape, fixed times assumed; cpu-amx: one core computes
experts of Qwen3-30B-A3B in turn, fitted to the points of configs/hardware/cpu-amx.profile.json."""
BATCHES = {"decode": 256, "prefill": 2048}
"""Tokens of a batch; at most those of a half of the trace, in prefill half of them."""
RANKS = (2, 4, 8, 16, 64)
SLOWER = (1.0, 1.08, 1.16, 1.28)
STEPS = 64
SEED = 0
Row = dict[str, Any]


def run(
    folder: Annotated[
        Path | None, typer.Option("--traces", help="Folder of .npz files, or one.")
    ] = None,
    growth: Annotated[bool, typer.Option(help="Also time the search for growing layers.")] = False,
) -> None:
    """Score placements on every trace that has a batch of decode for each half, or time the
    search."""
    if folder is None and not growth:
        raise typer.BadParameter("Ask for --traces FOLDER, for --growth, or for both.")
    if growth:
        _write(grow())
    if folder is not None:
        for file in sorted(folder.glob("*.npz")) if folder.is_dir() else [folder]:
            trace = traces.load(file)
            if trace.num_tokens >= 2 * BATCHES["decode"]:
                _write(score_trace(trace))


def score_trace(trace: traces.Trace) -> Iterator[Row]:
    """One row per cost model, kind of batch, number of ranks and slowness of one of them."""
    for kind in BATCHES:
        if kind == "prefill" and trace.topk_ids_TLK is None:
            continue
        first, second = _of_kind(trace, kind).split(SEED)
        batch = _num_tokens(kind, (first, second))
        fit = _batches(first, kind, batch, SEED)
        held_out = _batches(second, kind, batch, SEED + 1)
        for cost_name, cost in COSTS.items():
            for num_ranks in RANKS:
                if trace.num_experts % num_ranks or num_ranks == trace.num_experts:
                    continue
                for slower, slow_rank in _slowed(num_ranks):
                    costs = [cost] * num_ranks
                    costs[slow_rank] = cost.slowed(slower)
                    yield {
                        "table": "traces",
                        "trace": trace.name,
                        "batch": kind,
                        "tokens": batch,
                        "cost": cost_name,
                        "ranks": num_ranks,
                        "slower": slower,
                        "slow_rank": slow_rank,
                        "steps": [len(fit), len(held_out)],
                        **_scores(fit, held_out, Cluster(costs=tuple(costs))),
                    }


def grow() -> Iterator[Row]:
    """Search times of GEM for layers from a seeded skew; the compiler has run before."""
    cases: tuple[tuple[str, int, int, int, int, int, Split], ...] = (
        ("gem", 32, 128, 8, 16, 0, "even"),
        ("gem", 32, 128, 8, 128, 0, "even"),
        ("gem", 32, 128, 8, 256, 0, "even"),
        ("gem", 58, 256, 16, 16, 0, "even"),
        ("gem", 58, 256, 64, 16, 0, "even"),
        ("gem", 58, 256, 64, 128, 0, "even"),
        ("gem_r", 32, 128, 8, 16, 32, "even"),
        ("gem_r", 32, 128, 8, 128, 32, "even"),
        ("gem_r", 32, 128, 8, 256, 32, "even"),
        ("gem_r", 32, 128, 8, 16, 32, "one"),
        ("gem_r", 32, 128, 8, 128, 32, "one"),
    )
    for policy, layers, experts, num_ranks, steps, redundant, split in cases:
        random = np.random.default_rng(SEED)
        weight_LE = random.permuted(np.tile(np.arange(1, experts + 1) ** -0.8, (layers, 1)), axis=1)
        weight_LE /= weight_LE.sum(1, keepdims=True)
        history_NLE, held_out_NLE = (
            random.multinomial(32_768, weight_LE, (steps, layers)) for _ in range(2)
        )
        cost = COSTS["tempo"]
        cluster = Cluster(
            costs=(cost.slowed(1.16), *(cost,) * (num_ranks - 1)), num_redundant=redundant
        )
        policy_of(policy, seed=SEED, split=split).place(history_NLE[:2, :1], cluster)
        yield {
            "table": "growth",
            "policy": policy,
            "redundant": redundant,
            "routing": split,
            "layers": layers,
            "experts": experts,
            "ranks": num_ranks,
            "steps": [steps, steps],
            **_scores(
                history_NLE, held_out_NLE, cluster, ("linear", "eplb", policy), split, repeats=3
            ),
        }


def _slowed(num_ranks: int) -> Iterator[tuple[float, int]]:
    """How much slower which rank is: the first, and of two, as in our servers, either."""
    for slower in SLOWER:
        yield slower, 0
        if num_ranks == 2 and slower > 1.0:
            yield slower, 1


def _of_kind(trace: traces.Trace, kind: str) -> traces.Trace:
    """The tokens of prompts alone for prefill, the generated ones for decode; all if none are."""
    phase = Phase.DECODE if kind == "decode" else Phase.PREFILL
    return trace.of_phase(phase) if phase in trace.phases() else trace


def _num_tokens(kind: str, parts: Sequence[traces.Trace]) -> int:
    """Tokens of a batch: as BATCHES says, or what a part of the trace has; half of that in prefill,
    where all batches would be the same one."""
    had = [part.num_tokens for part in parts if part.topk_ids_TLK is not None]
    return min([BATCHES[kind], *(n if kind == "decode" else n // 2 for n in had)])


def _batches(part: traces.Trace, kind: str, batch: int, seed: int) -> np.ndarray:
    draw = part.steps if kind == "decode" else part.prefill_steps
    return draw(batch, STEPS, seed)


def _scores(
    fit: np.ndarray,
    held_out: np.ndarray,
    cluster: Cluster,
    policies: tuple[str, ...] = ("linear", "eplb", "gem"),
    split: Split = "even",
    repeats: int = 1,
) -> Row:
    """Mean modelled us per batch over all layers, on both parts, and search times."""
    row: Row = {"seed": SEED, "search_s": {}, "fit_us": {}, "held_out_us": {}}
    for name in policies:
        policy = policy_of(name, seed=SEED, split=split)
        found_LP, seconds = _timed(lambda policy=policy: policy.place(fit, cluster), repeats)
        row["search_s"][name] = round(seconds, 4)
        for part, counts in (("fit_us", fit), ("held_out_us", held_out)):
            row[part][name] = float(score_L(counts, found_LP, cluster, split).sum() / len(counts))
    for part, counts in (("fit_us", fit), ("held_out_us", held_out)):
        row[part]["bound"] = float(lower_bound_L(counts, cluster).sum() / len(counts))
    return row


def _timed(place: Callable[[], np.ndarray], repeats: int) -> tuple[np.ndarray, float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        found = place()
        times.append(time.perf_counter() - start)
    return found, statistics.median(times)


def _write(rows: Iterator[Row]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    origin = provenance()
    for row in rows:
        with RESULTS.open("a") as file:
            file.write(json.dumps({**row, **origin}) + "\n")
        shown = {k: v for k, v in row.items() if k not in ("seed", "fit_us", "steps", "tokens")}
        Console().print(shown)


def writer(rows: list[Row]) -> Callable[[str], str]:
    """What goes to each place of docs/placement-results.md, by its name."""
    return lambda name: _table(name, rows)


def _table(name: str, rows: list[Row]) -> str:
    table = "growth" if name == "growth" else "traces"
    own = _newest([row for row in rows if row["table"] == table])
    head, body = TABLES[name](own)
    text = markdown.table(head, body, left=0)
    commits = ", ".join(dict.fromkeys(row["commit"] for row in own))
    note = f"Commits {commits}; {own[-1]['machine']}; seed {own[-1]['seed']}."
    return f"{text}\n\n{note}"


def _newest(rows: list[Row]) -> list[Row]:
    """The last row of each case."""
    keys = ("trace", "batch", "cost", "ranks", "slower", "slow_rank", "layers", "experts", "steps",
            "policy", "routing")  # fmt: skip
    return list({json.dumps([row.get(key) for key in keys]): row for row in rows}.values())


def _gain(rows: list[Row], base: str, part: str = "held_out_us") -> str:
    """Median over rows of GEM's (or gem_r's) time against another's."""
    ratios = [r[part][r.get("policy", "gem")] / r[part][base] - 1 for r in rows]
    return f"{statistics.median(ratios):+.1%}"


def _speeds(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    head = ["batch", "cost", "ranks", "one rank slower by", "against linear", "against eplb",
            "worst against eplb", "above the bound", "traces"]  # fmt: skip
    body = []
    for case in sorted({(r["batch"], r["cost"], r["ranks"], r["slower"]) for r in rows}):
        own = [r for r in rows if (r["batch"], r["cost"], r["ranks"], r["slower"]) == case]
        worst = max(r["held_out_us"]["gem"] / r["held_out_us"]["eplb"] - 1 for r in own)
        gains = [_gain(own, base) for base in ("linear", "eplb")]
        cells = [*case[:3], f"{case[3] - 1:.0%}", *gains, f"{worst:+.1%}", _gain(own, "bound")]
        body.append([*map(str, cells), str(len({r["trace"] for r in own}))])
    return head, body


def _two_ranks(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """What GEM gains over linear placement on two ranks, and what the bound leaves it to gain."""
    head = ["batch", "cost", "one rank slower by", "against linear", "at best",
            "the bound against linear", "at best", "cases"]  # fmt: skip
    own = [r for r in rows if r["ranks"] == 2 and r["slower"] > 1.0]
    cases = sorted({(r["batch"], r["cost"], r["slower"]) for r in own})
    body = []
    for case in [*cases, None]:
        of_case = [r for r in own if case in (None, (r["batch"], r["cost"], r["slower"]))]
        names = ("all", "", "") if case is None else (*case[:2], f"{case[2] - 1:.0%}")
        gains = []
        for name in ("gem", "bound"):
            times = [r["held_out_us"] for r in of_case]
            ratios = [time_us[name] / time_us["linear"] - 1 for time_us in times]
            gains += [f"{statistics.mean(ratios):+.1%}", f"{min(ratios):+.1%}"]
        body.append([*names, *gains, str(len(of_case))])
    return head, body


def _traces(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    head = ["trace", "batch", "against linear", "against eplb", "above the bound",
            "above the bound where fitted"]  # fmt: skip
    body = []
    for case in sorted({(r["trace"], r["batch"]) for r in rows}):
        own = [r for r in rows if (r["trace"], r["batch"]) == case and r["slower"] == 1.16]
        gains = [_gain(own, base) for base in ("linear", "eplb", "bound")]
        body.append([*case, *gains, _gain(own, "bound", "fit_us")])
    return head, body


def _growth(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    keys = ("policy", "layers", "experts", "redundant", "routing", "ranks")
    head = [*keys, "steps", "search, s", "against linear", "against eplb", "above the bound"]
    body = []
    for row in rows:
        gains = [_gain([row], base) for base in ("linear", "eplb", "bound")]
        seconds = f"{row['search_s'][row['policy']]:.1f}"
        body.append([*(str(row[key]) for key in keys), str(row["steps"][0]), seconds, *gains])
    return head, body


TABLES: dict[str, Callable[[list[Row]], tuple[list[str], list[list[str]]]]] = {
    "speeds": _speeds,
    "two_ranks": _two_ranks,
    "traces": _traces,
    "growth": _growth,
}


if __name__ == "__main__":
    command.main(run)
