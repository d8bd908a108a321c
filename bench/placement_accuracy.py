"""How well the cost model knows this machine: `python -m bench.placement_accuracy --traces DIR`.

Ranks are processes of one core each that run vLLM's own expert kernel. Their curves are fitted as
`vllm-balance profile` does; then batches of recorded traces are measured under several placements,
one step after another and the placements of a step in turn, ROUNDS times there and back, so that a
drift of the machine hits all alike. A placement's time is the sum over steps of the slowest rank's,
the median of the rounds or modelled. Nobody can rank two placements whose rounds do not show which
is faster (Wilcoxon's signed-rank test); such pairs are counted apart. Of the 36 pairs of a batch
two would show it by chance at 5 %, half of them the wrong way round, so that 5 % are what may be
false of all that are taken to show it (Benjamini and Hochberg).
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from scipy.stats import false_discovery_control, wilcoxon

from bench import command, markdown
from bench.provenance import ROOT, provenance
from bench.speed import experts_of
from vllm_balance import traces
from vllm_balance.commands.expert_probe import Probe, probing
from vllm_balance.commands.profile import cores_of, sample
from vllm_balance.commands.rank_curves import curves
from vllm_balance.placement import PLACEMENT, Cluster, score_L
from vllm_balance.seams.device import kernel_isa

Array = np.ndarray[Any, np.dtype[Any]]
Row = dict[str, Any]
RESULTS = ROOT / "bench" / "results" / "placement_accuracy.jsonl"
BATCHES = {"decode": 32, "prefill": 512}
ROUNDS = {"decode": 16, "prefill": 6}
STEPS, RANDOM_PLACEMENTS, RANKS, SEED = 6, 5, 2, 0
FALSE = 0.05
"""Share of the pairs which are taken to show which placement is faster that may not."""
console = Console()


def run(
    folder: Annotated[Path, typer.Option("--traces", help="Folder of .npz files.")],
    dtype: Annotated[str, typer.Option(help="Of weights and tokens.")] = "bfloat16",
) -> None:
    """Measure placements on every trace of token ids."""
    for file in sorted(folder.glob("*.npz")):
        trace = traces.load(file)
        if trace.topk_ids_TLK is None or trace.num_layers < 2:
            continue
        for row in measure(trace, dtype):
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("a") as rows:
                rows.write(json.dumps({**row, **provenance()}) + "\n")
            console.print({k: v for k, v in row.items() if not isinstance(v, dict)})


def measure(trace: traces.Trace, dtype: str) -> Iterator[Row]:
    """One row per kind of batch, from experts of Qwen3-30B-A3B's shape, as many as in the trace."""
    counts = {key: getattr(trace, key) for key in ("name", "num_layers", "num_experts", "top_k")}
    shape = experts_of(dtype, **counts)
    local = trace.num_experts // RANKS
    layer = trace.num_layers // 2
    fitted, held_out = trace.split(SEED)
    with probing(shape, kernel_isa(shape.dtype), cores_of(RANKS), local) as probe:
        fits = curves(sample(probe, local))
        cluster = Cluster(costs=tuple(found.model for found in fits))
        for kind, batch in BATCHES.items():
            draw = {"decode": "steps", "prefill": "prefill_steps"}[kind]
            history_NE = getattr(fitted, draw)(batch, 32, SEED)[:, layer]
            steps_NE = getattr(held_out, draw)(batch, STEPS, SEED + 1)[:, layer]
            slots = _placements(history_NE, cluster)
            slots_KP = np.stack(list(slots.values()))
            times_RNK = _measured(probe, steps_NE, slots_KP, ROUNDS[kind])

            modelled = {
                name: float(score_L(steps_NE[:, None], slots_P[None], cluster)[0])
                for name, slots_P in slots.items()
            }
            yield {
                "trace": trace.name,
                "dtype": dtype,
                "batch": kind,
                "tokens": batch,
                "steps": STEPS,
                "seed": SEED,
                "fit_error": max(found.median_relative_error for found in fits),
                "knee_tokens": [found.model.knee_tokens for found in fits],
                "measured_us": _by_name(slots, np.median(times_RNK, axis=0).sum(0)),
                "rounds_us": _by_name(slots, times_RNK.sum(1).T),
                "modelled_us": modelled,
            }


def _placements(history_NE: Array, cluster: Cluster) -> dict[str, Array]:
    """Named placements [P] of one layer without redundancy, and seeded random ones."""
    found = {
        name: PLACEMENT[name]().place(history_NE[:, None], cluster)[0]
        for name in ("linear", "round_robin", "eplb", "gem")
    }
    random = np.random.default_rng(SEED)
    for number in range(RANDOM_PLACEMENTS):
        found[f"random {number}"] = random.permutation(history_NE.shape[1]).astype(np.int32)
    return found


def _measured(probe: Probe, steps_NE: Array, slots_KP: Array, rounds: int) -> Array:
    """The slowest rank's time, us, of each round, step and placement: [R, N, K].

    In every second round the placements come in reverse order.
    """
    times_RNK = np.zeros((rounds, len(steps_NE), len(slots_KP)))
    for step, tokens_E in enumerate(steps_NE):
        on_rank_KSP = tokens_E[slots_KP].reshape(len(slots_KP), RANKS, -1)
        for turn in range(rounds):
            for k in range(len(slots_KP))[:: 1 - 2 * (turn % 2)]:
                batch = [[int(n) for n in tokens if n] or [1] for tokens in on_rank_KSP[k]]
                timings = probe.measure_each(batch, repeats=1)
                times_RNK[turn, step, k] = max(timing.time_us for timing in timings)
    return times_RNK


def _by_name(names: Iterable[str], values_K: Array) -> dict[str, Any]:
    return dict(zip(names, values_K.tolist(), strict=True))


def agreement(rows: list[Row]) -> tuple[int, int, int]:
    """(pairs of placements ranked as measured, pairs that can be ranked, pairs in all)."""
    right = rankable = total = 0
    for row in rows:
        pairs = [*itertools.combinations(row["rounds_us"], 2)]
        longer_MR = np.array(
            [np.subtract(row["rounds_us"][one], row["rounds_us"][other]) for one, other in pairs]
        )
        modelled = row["modelled_us"]
        longer_M = np.array([modelled[one] - modelled[other] for one, other in pairs])
        # Rounds that do not differ at all have no p-value.
        chance_M = [wilcoxon(each).pvalue if each.any() else 1.0 for each in longer_MR]
        shown_M = false_discovery_control(chance_M) < FALSE
        total += len(pairs)
        rankable += int(shown_M.sum())
        agree_M = np.sign(longer_M) == np.sign(np.median(longer_MR, axis=1))
        right += int((agree_M & shown_M).sum())
    return right, rankable, total


def writer(rows: list[Row]) -> Callable[[str], str]:
    """What goes to the place of docs/placement.md, whatever its name: a table for each machine and
    type of weights, the newest first."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in (row for row in reversed(rows) if "rounds_us" in row):
        groups.setdefault((row["machine"], row["dtype"]), []).append(row)
    return lambda _: "\n\n".join(_group(*key, own) for key, own in groups.items())


def _group(machine: str, dtype: str, rows: list[Row]) -> str:
    """The table of rows of one machine and type, the newest first; the newest of each trace counts.

    Without rows of a kind of batch its line is missing; without pairs that can be ranked there is
    no share of them.
    """
    rows = list({(row["trace"], row["batch"]): row for row in reversed(rows)}.values())
    head = ["batch", "fit error", "time error", "ranked as measured", "of pairs", "too close"]
    body = []
    for kind in (*BATCHES, "both"):
        own = [row for row in rows if kind in (row["batch"], "both")]
        if not own:
            continue
        right, rankable, total = agreement(own)
        errors = [
            abs(row["modelled_us"][name] / row["measured_us"][name] - 1)
            for row in own
            for name in row["measured_us"]
        ]
        fits = statistics.median(row["fit_error"] for row in own)
        share = f"{right / rankable:.1%}" if rankable else "-"
        cells = [f"{fits:.1%}", f"{statistics.median(errors):.1%}", share]
        body.append([kind, *cells, str(rankable), str(total - rankable)])
    num_traces = len({row["trace"] for row in rows})
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    origin = f"{num_traces} traces; {dtype}; {machine}; commit {commits}; seed {SEED}."
    return f"{markdown.table(head, body)}\n\nMeasured on {origin}"


if __name__ == "__main__":
    command.main(run)
