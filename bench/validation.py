"""The simulator against what was measured and what was published: `python -m bench.validation`.

Writes bench/results/validation.jsonl anew (a row holds prediction and reference), the errors that
`vllm-balance plan` shows (configs/validity.toml), and the tables of docs/simulator.md. No constant
is chosen per row: hardware and model files are the ones of the catalogue. Where a paper does not
say something, the same assumption holds for all of its rows (`bench/published.py`).
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import tomllib
from collections.abc import Iterator
from typing import Any

import typer
from rich.console import Console

from bench import markdown, published, real_size_model, validation_tables
from bench.load import Load as Asked
from bench.provenance import ROOT, config_hash, provenance
from vllm_balance.config import FETCHES
from vllm_balance.measurement import Measurement, newest, read_measurements
from vllm_balance.replay_rows import ReplaySettings
from vllm_balance.simulate import Arm, Layout, Load, Outcome, hardware, models, simulate, skewed
from vllm_balance.simulate.sweep import read

RESULTS = ROOT / "bench" / "results" / "validation.jsonl"
PAGE = ROOT / "docs" / "simulator.md"
VALIDITY = ROOT / "configs" / "validity.toml"
RUNS = ("decode", "prefill", "batch", "redundancy", "harmoeny-short")
MACHINE, BASE = "cpu-avx512", "qwen3-30b-a3b"
FAR_APART = 0.03
"""Relative distance from which two measured arms must be ranked right."""
SEED = 1
SHAPE = ("num_experts", "top_k", "hidden", "inner", "num_heads", "num_kv_heads", "head_dim")
SHAPE += ("vocabulary",)
"""What a benchmark's model may have otherwise than BASE."""
Row = dict[str, Any]


def validate(
    docs_only: bool = typer.Option(False, "--docs", help="Only write the tables anew."),
) -> None:
    """Predict everything that is known, and say how far off it was."""
    if not docs_only:
        origin = provenance()
        rows = [*measured_rows(), *({**row, **origin} for row in published.rows(SEED))]
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = read(RESULTS)
    write_validity(rows)
    PAGE.write_text(
        markdown.filled(PAGE, "validation", lambda name: validation_tables.table(name, rows))
    )
    Console().print(f"{len(rows)} points; see {PAGE.relative_to(ROOT)}.")


def measured_rows() -> Iterator[Row]:
    """TPOT and TTFT of every arm of the newest rows of each run, and every pair of arms.

    A run that has no measured rows at present keeps the points that it had.
    """
    for name in RUNS:
        path = ROOT / "bench" / "results" / f"{name}.jsonl"
        if not path.exists():
            Console().print(f"[yellow]{name} was not measured; its old points are kept.[/]")
            yield from (row for row in read(RESULTS) if row.get("run") == name)
            continue
        rows = newest(read_measurements(path))
        settings = settings_of(name, rows[-1].config_hash)
        groups: dict[tuple[str, str], dict[str, list[Measurement]]] = {}
        for row in rows:
            # This machine's file names no link to the host store that experts are fetched over.
            if row.policy not in FETCHES:
                groups.setdefault((row.case, row.load), {}).setdefault(row.arm, []).append(row)
        for (case, load), arms in groups.items():
            if not _changes(settings, load):
                yield from _group(name, settings, (case, load), arms)


def _changes(settings: Row, load: str) -> bool:
    """Whether a load's popular experts change, which the simulator's traffic does not."""
    return "change_every" in settings.get("loads", {}).get(load, {}).get("replay", {})


def _group(
    name: str, settings: Row, variant: tuple[str, str], arms: dict[str, list[Measurement]]
) -> Iterator[Row]:
    """Points of the arms that share a load and a server's variant."""
    case, load_name = variant
    settings = settings | settings.get("cases", {}).get(case, {})
    load = Asked(**settings.get("load", {}) | settings.get("loads", {}).get(load_name, {}))
    metric = "tpot_ms" if load.max_tokens > 8 else "ttft_ms"
    made = {arm: predict(settings, load, arm) for arm in arms}
    found = {arm: _medians(rows, metric) for arm, rows in arms.items()}
    where = {"run": name, "case": case, "load": load_name, **provenance()}
    for arm, outcome in made.items():
        for what, value in _predicted(outcome, metric).items():
            reference = found[arm][what]
            yield {
                "kind": "measured",
                "arm": " ".join(filter(None, (case, load_name, arm))),
                "what": what,
                "reference": reference,
                "predicted": value,
                "error": value / reference - 1,
                **where,
            }
    for first, second in itertools.combinations(arms, 2):
        reference = found[second][metric] / found[first][metric] - 1
        both = [_predicted(made[arm], metric)[metric] for arm in (first, second)]
        predicted = both[1] / both[0] - 1
        yield {
            "kind": "pair",
            "arm": " ".join(filter(None, (case, load_name, f"{second} against {first}"))),
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
    found = {key: statistics.median(getattr(row, key).p50 for row in rows) for key in latencies}
    counts = ("activated_worst_rank", "tokens_worst_rank")
    return found | {key: statistics.median(getattr(row, key) for row in rows) for key in counts}


def _predicted(made: Outcome, metric: str) -> dict[str, float]:
    """What is compared; TPOT only where there are more than a few tokens."""
    found = {"tpot_ms": made.tpot_us / 1e3} if metric == "tpot_ms" else {}
    return {
        **found,
        "ttft_ms": made.ttft_us_at(0.5) / 1e3,
        "activated_worst_rank": float(made.activated_N.mean()),
        "tokens_worst_rank": float(made.pairs_N.mean()),
    }


def settings_of(name: str, digest: str) -> Row:
    """The run file that rows were made with: the present one, or the version with their hash.

    Raises:
        LookupError: no committed version has this hash.
    """
    path = f"configs/runs/{name}.toml"
    git = ["git", "-C", str(ROOT)]
    log = subprocess.run(
        [*git, "log", "--format=%h", "--", path], capture_output=True, text=True, check=True
    )
    texts = [(ROOT / path).read_text()]
    for commit in [*log.stdout.split(), ""]:
        if config_hash(settings := tomllib.loads(texts[-1])) == digest:
            return settings
        shown = subprocess.run([*git, "show", f"{commit}:{path}"], capture_output=True, text=True)
        texts += [shown.stdout] if shown.returncode == 0 else []
    raise LookupError(f"No version of {path} has the hash {digest} of its newest rows.")


def predict(settings: Row, load: Asked, name: str) -> Outcome:
    """The simulation of one arm of a run file on this machine's ranks."""
    machine, profile = hardware.load(MACHINE)
    shape = real_size_model.PRESETS[settings["model"]["preset"]]
    model = models.load(BASE).with_counts(
        num_layers=settings["model"]["num_layers"],
        num_dense_layers=0,
        **{key: getattr(shape, key) for key in SHAPE},
    )
    ranks = settings["serve"]["tensor_parallel"]
    own = settings.get("eplb", {}) | settings["arms"][name]
    extra = own.get("num_redundant_experts", own.get("dynamic_slots", 0) * ranks)
    replay = ReplaySettings(**(load.replay or settings["replay"]), seed=settings["seed"])
    arm = Arm(
        model=model,
        hardware=machine,
        profile=profile,
        layout=Layout(tensor=ranks),
        balancer=own.get("balancer", name),
        redundancy=own.get("redundancy", 1 + extra / shape.num_experts),
        load=Load(
            concurrency=load.at_once,
            prompt_tokens=load.prompt_tokens,
            output_tokens=load.max_tokens,
            token_budget=8192,
            max_steps=1000,
            steady=False,
        ),
    )
    layers = model.num_moe_layers
    return simulate(arm, skewed(replay, model, layers), skewed(replay, model, layers))


def write_validity(rows: list[Row]) -> None:
    """The mean absolute error of all ratios between balancers."""
    errors = [abs(row["error"]) for row in rows if row["kind"] in ("pair", "published ratio")]
    text = VALIDITY.read_text().splitlines()
    numbers = {"points": str(len(errors)), "gain_error": f"{statistics.mean(errors):.3f}"}
    for index, line in enumerate(text):
        name = line.partition(" ")[0]
        if name in numbers:
            text[index] = f'{name} = {{ value = {numbers[name]}, unit = "1", source = "rows" }}'
    VALIDITY.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    typer.run(validate)
