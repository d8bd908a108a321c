"""Measured arms of configs/runs beside what the simulator says of them, machine by machine."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import placed, real_size_model, run_files, speed
from bench.load import Load as Asked
from bench.placed import SLOW_RANK, Slowed
from bench.predictions import Recorded, is_profiled, predict, profiled_dtype, rearranges
from bench.provenance import provenance
from bench.validation_tables import TIMES, Variant
from vllm_balance.measured_tables import FEW_TOKENS
from vllm_balance.measurement import Measurement, newest_by_machine, read_measurements
from vllm_balance.simulate import Outcome, hardware
from vllm_balance.simulate.catalogue import names
from vllm_balance.simulate.machine_speed import AS_PROFILED, MachineSpeed

RUNS = (
    "decode",
    "decode-float32",
    "prefill",
    "batch",
    "batch-bfloat16",
    "redundancy",
    "redundancy-bfloat16",
    "layout",
    "layout-bfloat16",
    "skew",
    "skew-bfloat16",
    "harmoeny-short",
    "harmoeny-moe-heavy",
    "harmoeny-moe-heavy-bfloat16",
)
RUNS += ("harmoeny-qwen3", "harmoeny-top1-short", "harmoeny-recorded", "harmoeny-dp", "trace")
RUNS += ("recorded-bfloat16", "slow_rank", "turns-gem", "turns-slow", "turns-slow-bfloat16")
RUNS += ("traffic", "traffic-bfloat16", "harmoeny-varying", "turns-harmoeny")
RUNS += ("turns-qwen3", "one-server-slow", "one-server-slow-bfloat16")
RUNS += ("one-server-decode-bfloat16", "one-server-alike-bfloat16")
FAR_APART = 0.03
"""Relative distance from which two measured arms must be ranked right."""
Row = dict[str, Any]
Arms = dict[str, list[Measurement]]
Described = tuple[str, str]
"""A machine as rows name it, and the dtype of the profile in its hardware file."""


def hardware_names() -> dict[Described, str]:
    """The hardware file of the catalogue that describes each machine in each format.

    Raises:
        ValueError: two files describe the same machine in the same format.
    """
    found: dict[Described, str] = {}
    for name in names("hardware"):
        machine = hardware.load(name)[0].machine
        if machine is None:
            continue
        key = machine, profiled_dtype(name)
        if key in found:
            raise ValueError(
                f"configs/hardware/{found[key]}.toml and {name}.toml both describe the machine "
                f"{machine!r} in {key[1]}. Rows can be checked against one of them: take `machine` "
                f"out of the other."
            )
        found[key] = name
    return found


def points(results: Path, old: list[Row], traces: Path | None) -> Iterator[Row]:
    """TPOT, TTFT and counts of every arm of each run's newest rows on each machine, and every pair
    of arms; kinds "measured" and "pair".

    Where a run has no measured rows of a machine at present, the points in `old` are kept, and say
    so (`kept`): older code predicted them.

    Args:
        traces: folder of the recorded traces; runs that replay one are left out where it is not the
            one of their rows, or not there.
    """
    described = hardware_names()
    for name in RUNS:
        path = results / f"{name}.jsonl"
        measured = newest_by_machine(read_measurements(path)) if path.exists() else {}
        kept = [
            row | {"kept": True}
            for row in old
            if row.get("run") == name and row["machine"] not in measured
        ]
        for machine in dict.fromkeys(row["machine"] for row in kept):
            Console().print(f"[yellow]{name} has no rows of {machine}; its points are kept.[/]")
        for machine, rows in measured.items():
            settings = run_files.with_hash(name, rows[-1].config_hash)
            dtype = settings["model"].get("dtype", "bfloat16")
            if (machine, dtype) in described:
                yield from _of_run(name, settings, rows, described[machine, dtype], traces)
                continue
            Console().print(
                f"[yellow]No hardware file describes {machine} in {dtype}; its rows of {name} are "
                f"left out. Write one with `python -m bench.machine --write NAME`.[/]"
            )
        yield from kept


def _of_run(
    name: str, settings: Row, rows: list[Measurement], machine: str, traces: Path | None
) -> Iterator[Row]:
    groups: dict[Variant, Arms] = {}
    for row in rows:
        variant = Variant(row.case, row.load, row.slow)
        if not rearranges(*_of_variant(settings, variant), row.arm):
            groups.setdefault(variant, {}).setdefault(row.arm, []).append(row)
    with _recorded(settings, rows, traces) as (is_there, files):
        if not is_there:
            Console().print(
                f"[yellow]{name} replayed a trace that is not there (--traces); its rows are left "
                f"out.[/]"
            )
            return
        about = {"hardware": machine, "profiled": is_profiled(settings, machine)}
        for variant, arms in groups.items():
            tables, load = _of_variant(settings, variant)
            speeds = {arm: _speed(own, machine) for arm, own in arms.items()}
            made = {
                arm: predict(tables, load, arm, machine, files, _slowed(tables, own), speeds[arm])
                for arm, own in arms.items()
            }
            yield from (point | about for point in _group(name, variant, arms, made, speeds, load))


@contextmanager
def _recorded(
    settings: Row, rows: list[Measurement], folder: Path | None
) -> Iterator[tuple[bool, Recorded | None]]:
    """Whether what a run replayed is at hand, and the files, if it replayed a trace.

    Early rows do not say which trace theirs was: one of a file with the same name, but the demo
    model's, which is another one on every machine, may be any.
    """
    name = settings["replay"].get("trace")
    if name is None:
        yield True, None
        return
    model = real_size_model.ensure(**settings["model"])
    if name != "demo" and (folder is None or not (folder / name).is_file()):
        yield False, None
        return
    replayed = {row.traffic for row in rows}
    present = placed.traffic(settings, model, folder)
    if replayed != {present} and (replayed != {""} or name == "demo"):
        yield False, None
        return
    with placed.split_files(placed.recorded(settings, folder), model, settings["seed"]) as files:
        yield True, Recorded(*files)


def _of_variant(settings: Row, variant: Variant) -> tuple[Row, Asked]:
    """The tables of a server's variant, and a load on it."""
    tables = settings | settings.get("cases", {}).get(variant.case, {})
    own = tables.get("loads", {}).get(variant.load, {})
    return tables, Asked(**tables.get("load", {}) | own)


def _slowed(tables: Row, rows: list[Measurement]) -> Slowed:
    """The slow rank of an arm's rows, with the factor that its kernels showed."""
    factor = statistics.median(row.slow_shown for row in rows)
    return Slowed(tables.get("slow_rank", SLOW_RANK), factor)


def _group(
    name: str,
    variant: Variant,
    arms: Arms,
    made: dict[str, Outcome],
    speeds: dict[str, MachineSpeed],
    load: Asked,
) -> Iterator[Row]:
    """Points of the arms that share a load and a server's variant."""
    metric = "tpot_ms" if load.max_tokens > FEW_TOKENS else "ttft_ms"
    found = {arm: _medians(rows, metric) for arm, rows in arms.items()}
    machine = next(iter(arms.values()))[0].machine
    where = {"run": name, **variant._asdict(), **provenance(), "machine": machine}
    for arm, outcome in made.items():
        for what, value in _predicted(outcome, metric).items():
            reference = found[arm][what]
            yield {
                "kind": "measured",
                "arm": f"{variant} {arm}".strip(),
                "what": what,
                "reference": reference,
                "predicted": value,
                "error": value / reference - 1,
                "apart": _apart([_value(row, what) for row in arms[arm]]),
                "longer": None if speeds[arm] == AS_PROFILED else speeds[arm].longer_K,
                **where,
            }
    for first, second in itertools.combinations(arms, 2):
        reference = found[second][metric] / found[first][metric] - 1
        both = [_predicted(made[arm], metric)[metric] for arm in (first, second)]
        predicted = both[1] / both[0] - 1
        yield {
            "kind": "pair",
            "arm": f"{variant} {second} against {first}".strip(),
            "what": metric,
            "reference": reference,
            "predicted": predicted,
            "error": predicted - reference,
            "far_apart": abs(reference) > FAR_APART,
            "ranked": (reference > 0) == (predicted > 0),
            **where,
        }


def _medians(rows: list[Measurement], metric: str) -> dict[str, float]:
    """Medians over the rows of an arm, named as `_predicted` names them."""
    latencies = ("ttft_ms",) if metric == "ttft_ms" else ("tpot_ms", "ttft_ms")
    names = (*latencies, "activated_worst_rank", "tokens_worst_rank")
    return {name: statistics.median(_value(row, name) for row in rows) for name in names}


def _value(row: Measurement, name: str) -> float:
    """Of a latency its median over requests."""
    found = getattr(row, name)
    return float(found.p50 if name in TIMES else found)


def _apart(values: list[float]) -> float | None:
    """How well the median of values is known: half the distance of the medians of their first and
    second half, which has the spread that the median of all has, over their mean. None of one."""
    half = len(values) // 2
    if not half:
        return None
    first, second = statistics.median(values[:half]), statistics.median(values[-half:])
    return abs(second - first) / (second + first)


def _speed(rows: list[Measurement], machine: str) -> MachineSpeed:
    """What the rows of an arm say of it; as profiled if they do not."""
    looks = [row.machine_speed for row in rows if row.machine_speed is not None]
    profile = hardware.load(machine)[1] if looks else None
    return AS_PROFILED if profile is None else speed.against(looks, profile)


def _predicted(made: Outcome, metric: str) -> dict[str, float]:
    """What is compared, medians over requests; TPOT only where there are more than a few tokens."""
    found = {"tpot_ms": made.tpot_us_at(0.5) / 1e3} if metric == "tpot_ms" else {}
    return {
        **found,
        "ttft_ms": made.ttft_us_at(0.5) / 1e3,
        "activated_worst_rank": float(made.activated_N.mean()),
        "tokens_worst_rank": float(made.pairs_N.mean()),
    }
