"""How far each routing is from the least possible lambda, and how long the choice takes.

``python -m bench.metro_routing [--traces DIR]`` runs the grid of sources x ranks x redundancy x
batch and writes bench/results/metro_routing.jsonl and docs/metro-lambda.svg; ``--only times``
measures the times alone and replaces only their rows. ``python -m bench.tables`` writes the tables.

Placements are vLLM's own EPLB policy, fitted on the first half of a source; batches are random
rows of the second half. Traces are .npz files (``topk_ids`` [tokens, layers, k], or ``counts``
[steps, layers, experts], from which rows are drawn); without ``--traces`` only the synthetic
sources run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bench.metro_stages import medians_us, stage_times_us
from bench.provenance import ROOT, config_hash, provenance, require_all_sources
from tests.cases import draw_topk, popularity
from vllm_balance.kernels.eplb_hash import map_and_record
from vllm_balance.kernels.eplb_hash.reference import map_to_physical
from vllm_balance.kernels.metro import choose, counters_size, parallel_reference, reference, route
from vllm_balance.routing import LayerTables
from vllm_balance.routing.first_copy import FirstCopyRouting
from vllm_balance.types import Placement

RESULTS = ROOT / "bench/results/metro_routing.jsonl"
RANKS = (2, 4, 8, 16, 32, 64)
REDUNDANCY = (1.0625, 1.125, 1.25, 1.5, 2.0)
BATCHES = (8, 32, 64, 256, 1024)
POLICIES = ("even", "first_copy", "greedy", "metro", "metro_gpu")
MEMORY_BOUND = float("inf")
TIMED = ((256, 384, 32, 256, 40.0), (128, 192, 2, 32, 15.0), (128, 192, 8, 32, None),
         (128, 192, 8, 256, None), (64, 96, 8, 32, None))  # fmt: skip
"""Experts, slots, ranks, tokens and the target in microseconds of a time row."""
GRID_REPETITIONS = 20
"""Calls per time at each point of the grid."""
SWEEPS = 15
"""Time rows are measured this often, seconds apart; each figure is the median of its sweeps."""


@dataclass(frozen=True, slots=True)
class Source:
    """Rows of one layer: half to fit a placement, half to draw batches from."""

    name: str
    num_experts: int
    fit_TK: np.ndarray
    draw_TK: np.ndarray


def synthetic(num_experts: int, skew: float, seed: int) -> Source:
    """Zipf routing, top-8."""
    rng = np.random.default_rng(seed)
    ids_TK = draw_topk(8192, 8, popularity(num_experts, skew, rng), rng)
    return Source(f"zipf{skew}-{num_experts}", num_experts, ids_TK[:4096], ids_TK[4096:])


def traced(path: Path, seed: int) -> Iterator[Source]:
    """The middle and the last layer of a trace."""
    data = np.load(path)
    if "topk_ids" in data:
        rows, experts = data["topk_ids"], int(data["num_experts"])
        for layer in sorted({rows.shape[1] // 2, rows.shape[1] - 1}):
            ids_TK = rows[:, layer].astype(np.int32)
            half = len(ids_TK) // 2
            yield Source(path.stem, experts, ids_TK[:half], ids_TK[half:])
    else:
        rng = np.random.default_rng(seed)
        counts_E = data["counts"].sum(0)[data["counts"].shape[1] // 2] + 1.0
        top_k = int(data["top_k"]) if "top_k" in data else 4
        ids_TK = draw_topk(8192, top_k, counts_E / counts_E.sum(), rng)
        yield Source(path.stem, len(counts_E), ids_TK[:4096], ids_TK[4096:])


def eplb_placement(source: Source, num_physical: int, num_ranks: int) -> Placement:
    """Where vLLM's EPLB puts the experts after the first half."""
    from vllm.distributed.eplb.policy.default import DefaultEplbPolicy

    load_E = reference.count(source.fit_TK, source.num_experts, None)
    slots_LP = DefaultEplbPolicy.rebalance_experts(
        torch.from_numpy(load_E)[None].float(), num_physical, 1, 1, num_ranks
    )
    return Placement.from_physical_to_logical(
        slots_LP[0], num_logical=source.num_experts, num_ranks=num_ranks
    )


def loads_of(slots_TK: np.ndarray, num_ranks: int, num_physical: int) -> tuple[int, int]:
    """Lambda and the busiest rank's tokens of routed pairs."""
    tokens_SX = np.bincount(slots_TK.ravel(), minlength=num_physical).reshape(num_ranks, -1)
    return int((tokens_SX > 0).sum(1).max()), int(tokens_SX.sum(1).max())


def judge(ids_TK: np.ndarray, placement: Placement) -> dict[str, tuple[int, int]]:
    """(lambda, busiest tokens) of every policy for one batch, and the least lambda."""
    table_ER = placement.logical_to_physical_ER.numpy()
    replicas_E = placement.num_replicas_E.numpy()
    shape = (table_ER, replicas_E, placement.num_ranks, placement.num_physical)
    tokens_E = reference.count(ids_TK, placement.num_logical, None)
    found = {"even": loads_of(map_to_physical(ids_TK, table_ER, replicas_E), *shape[2:])}
    columns = {
        "first_copy": np.where(tokens_E > 0, 0, -1),
        "greedy": reference.greedy_by_id(tokens_E, *shape),
        "metro": choose(torch.from_numpy(tokens_E), placement).numpy(),
        "metro_gpu": parallel_reference.choose(tokens_E, *shape),
    }
    for name, column_E in columns.items():
        activated_S, tokens_S = reference.loads(column_E, tokens_E, table_ER, *shape[2:])
        found[name] = int(activated_S.max()), int(tokens_S.max())
    found["optimal"] = reference.optimal_activated(tokens_E, *shape), 0
    return found


def calls(ids_TK: torch.Tensor, placement: Placement) -> dict[str, Callable[[], object]]:
    """The routings as a layer calls them, with maps as wide as vLLM's."""
    table_ER = placement.logical_to_physical_ER.long()
    arguments = {
        "logical_to_physical_ER": torch.nn.functional.pad(
            table_ER, (0, 1024 - table_ER.shape[1]), value=-1
        ),
        "num_replicas_E": placement.num_replicas_E.long(),
        "num_ranks": placement.num_ranks,
        "num_physical": placement.num_physical,
        "load_P": torch.zeros(placement.num_physical, dtype=torch.int32),
        "record_enabled": torch.tensor(True),
        "num_valid_tokens": torch.tensor(len(ids_TK), dtype=torch.int32),
        "counters": torch.zeros(counters_size(placement.num_ranks), dtype=torch.int64),
    }
    num_valid = arguments["num_valid_tokens"]
    tables = LayerTables(**{key: arguments[key] for key in arguments if key != "num_valid_tokens"})
    return {
        "metro": lambda: route(ids_TK, knee_tokens=MEMORY_BOUND, **arguments),
        "even": lambda: map_and_record(ids_TK, **arguments),
        "first_copy": lambda: FirstCopyRouting().route(ids_TK, tables, num_valid),
    }


def point_times_us(ids_TK: np.ndarray, placement: Placement, repetitions: int) -> dict[str, float]:
    """Medians for one batch: whole calls of metro, even and first_copy; the choice alone of metro
    and of the paper's greedy, both compiled; SciPy's optimum in CPU time."""
    tokens_E = reference.count(ids_TK, placement.num_logical, None)
    maps = placement.logical_to_physical_ER.numpy(), placement.num_replicas_E.numpy()
    flow = {
        "": lambda: reference.optimal_activated(
            tokens_E, *maps, placement.num_ranks, placement.num_physical
        )
    }
    stages_us = stage_times_us(ids_TK, placement, repetitions)
    return medians_us(calls(torch.from_numpy(ids_TK), placement), repetitions) | {
        "metro_choice": stages_us["choose"],
        "greedy_choice": stages_us["greedy"],
        "scipy_optimum": medians_us(flow, 3, clock=time.thread_time_ns)[""],
    }


def grid_row(source: Source, num_ranks: int, redundancy: float, num_tokens: int, draws: int,
             repetitions: int, rng: np.random.Generator) -> dict:  # fmt: skip
    """One row: a source, a placement and a batch size, over ``draws`` batches."""
    num_physical = -(-round(source.num_experts * redundancy) // num_ranks) * num_ranks
    placement = eplb_placement(source, num_physical, num_ranks)
    batches = [
        source.draw_TK[rng.integers(len(source.draw_TK), size=num_tokens)] for _ in range(draws)
    ]
    found = [judge(ids_TK, placement) for ids_TK in batches]
    best = np.array([one["optimal"][0] for one in found])
    row: dict = {"kind": "grid", "source": source.name, "E": source.num_experts,
                 "P": num_physical, "S": num_ranks, "redundancy": redundancy,
                 "batch_tokens": num_tokens, "draws": draws,
                 "optimal_lambda": round(float(best.mean()), 3)}  # fmt: skip
    for policy in POLICIES:
        activated, tokens = np.array([one[policy] for one in found]).T
        row[policy] = {
            "lambda": round(float(activated.mean()), 3),
            "worst_ratio": round(float((activated / best).max()), 3),
            "optimal_batches": int((activated == best).sum()),
            "worst_excess": int((activated - best).max()),
            "busiest_tokens": round(float(tokens.mean()), 3),
        }
    row["time_us"] = point_times_us(batches[0], placement, repetitions)
    return row


def time_row(num_experts: int, num_physical: int, num_ranks: int, num_tokens: int,
             target_us: float | None, repetitions: int) -> dict:  # fmt: skip
    """One sweep: times of whole calls, of each stage inside the kernel and of other choices."""
    source = synthetic(num_experts, 0.8, num_experts)
    placement = eplb_placement(source, num_physical, num_ranks)
    ids_TK = source.draw_TK[:num_tokens]
    tokens_E = reference.count(ids_TK, num_experts, None)
    maps = placement.logical_to_physical_ER.numpy(), placement.num_replicas_E.numpy()
    whole_us = medians_us(calls(torch.from_numpy(ids_TK), placement), repetitions)
    stages_us = stage_times_us(ids_TK, placement, repetitions)
    greedy_us = stages_us.pop("greedy")
    flow_repetitions = max(repetitions // 10, 20)
    flow_us = medians_us(
        {"": lambda: reference.optimal_activated(tokens_E, *maps, num_ranks, num_physical)},
        flow_repetitions,
        clock=time.thread_time_ns,  # milliseconds: other work interrupts most calls
    )
    return {
        "kind": "time", "E": num_experts, "P": num_physical, "S": num_ranks,
        "batch_tokens": num_tokens, "top_k": ids_TK.shape[1], "target_us": target_us,
        "metro_us": whole_us["metro"], "vllm_hash_us": whole_us["even"],
        "first_copy_us": whole_us["first_copy"], "stages_us": stages_us,
        "greedy_choice_us": greedy_us, "scipy_optimum_us": flow_us[""],
        "repetitions": repetitions, "scipy_repetitions": flow_repetitions, "seed": num_experts,
    }  # fmt: skip


def time_rows(repetitions: int) -> list[dict]:
    """All time rows, with their origin."""
    torch.set_num_threads(1)
    settings = {"shapes": TIMED, "sweeps": SWEEPS, "repetitions": repetitions}
    origin = {"config_hash": config_hash(settings), **provenance("numpy", "scipy")}
    sweeps = [[time_row(*shape, repetitions) for shape in TIMED] for _ in range(SWEEPS)]
    return [median_row(rows) | origin for rows in zip(*sweeps, strict=True)]


def median_row(rows: Sequence[dict]) -> dict:
    """The sweeps of one shape as one row: medians, and the range over sweeps."""
    found = rows[0] | {"sweeps": len(rows), "range_us": {}}
    for key in ("metro_us", "vllm_hash_us", "first_copy_us", "greedy_choice_us",
                "scipy_optimum_us"):  # fmt: skip
        values = [row[key] for row in rows]
        found[key] = round(float(np.median(values)), 2)
        found["range_us"][key] = [min(values), max(values)]
    found["stages_us"] = {
        stage: round(float(np.median([row["stages_us"][stage] for row in rows])), 2)
        for stage in rows[0]["stages_us"]
    }
    return found


def replace_times(repetitions: int) -> None:
    """Measures the time rows and leaves all other committed lines as they are."""
    times = "".join(json.dumps(row) + "\n" for row in time_rows(repetitions))
    lines = RESULTS.read_text().splitlines(keepends=True)
    others = [line for line in lines if json.loads(line)["kind"] != "time"]
    RESULTS.write_text(times + "".join(others))


def replace_grid_times(arguments: argparse.Namespace) -> None:
    """Measures the times of every point of the grid anew and leaves its other figures."""
    torch.set_num_threads(1)
    sources = {source.name: source for source in all_sources(arguments)}
    rng = np.random.default_rng(arguments.seed)
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    origin = {"time_commit": provenance()["commit"]}
    for row in rows:
        if row["kind"] != "grid":
            continue
        source = sources[row["source"]]
        placement = eplb_placement(source, row["P"], row["S"])
        batch_TK = source.draw_TK[rng.integers(len(source.draw_TK), size=row["batch_tokens"])]
        row["time_us"] = point_times_us(batch_TK, placement, GRID_REPETITIONS)
        row |= origin
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))


def all_sources(arguments: argparse.Namespace) -> list[Source]:
    """The synthetic skews and every trace of the folder."""
    sources = [synthetic(experts, 0.8, arguments.seed) for experts in (128, 256)]
    for path in sorted(arguments.traces.glob("*.npz")) if arguments.traces else []:
        sources += list(traced(path, arguments.seed))
    return sources


def run(arguments: argparse.Namespace) -> None:
    """Writes all rows, in place of those that are there when the last one is measured."""
    require_all_sources(RESULTS, "source", arguments.traces)
    torch.set_num_threads(1)
    sources = all_sources(arguments)
    settings = {"sources": [source.name for source in sources], "ranks": RANKS,
                "redundancy": REDUNDANCY, "batches": BATCHES, "draws": arguments.draws,
                "seed": arguments.seed}  # fmt: skip
    origin = {"seed": arguments.seed, "config_hash": config_hash(settings),
              **provenance("numpy", "scipy")}  # fmt: skip
    rng = np.random.default_rng(arguments.seed)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    fresh = RESULTS.with_suffix(".jsonl.new")
    with fresh.open("w") as file:
        for row in time_rows(arguments.repetitions):
            file.write(json.dumps(row) + "\n")
        for source in sources:
            started = time.monotonic()
            for num_ranks in RANKS:
                for redundancy in REDUNDANCY:
                    for num_tokens in BATCHES:
                        row = grid_row(source, num_ranks, redundancy, num_tokens, arguments.draws,
                                       GRID_REPETITIONS, rng)  # fmt: skip
                        file.write(json.dumps(row | origin) + "\n")
            print(f"{source.name}: {time.monotonic() - started:.0f} s", flush=True)
    fresh.replace(RESULTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=Path, help="folder with recorded routing (.npz)")
    parser.add_argument("--draws", type=int, default=3, help="batches per point of the grid")
    parser.add_argument("--repetitions", type=int, default=1000, help="calls per time and sweep")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", choices=("times", "grid-times"), help="measure and replace only these"
    )
    arguments = parser.parse_args()
    if arguments.only == "times":
        replace_times(arguments.repetitions)
    elif arguments.only == "grid-times":
        replace_grid_times(arguments)
    else:
        run(arguments)
    from bench.metro_tables import plot

    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    plot([row for row in rows if row["kind"] == "grid"])


if __name__ == "__main__":
    main()
