"""Tables of docs/harmoeny-results.md from the rows of bench/results/harmoeny_schedule.jsonl."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bench import markdown

POLICIES = ("static", "exflow", "eplb", "shadow", "even_split", "harmoeny_paper", "harmoeny")
FETCHERS = ("shadow", "even_split", "harmoeny_paper", "harmoeny")
FEW, MANY = 4, 8
"""Dynamic slots per rank that the tables of loads show."""
WITH_MANY = ("eplb", "harmoeny")
SKEWS = ("alpha 0", "alpha 0.9 on 1, new every 4", "alpha 0.5 on 10, new every 4",
         "alpha 0.9 on 10, steady", "alpha 0.9 on 10, new every 4")  # fmt: skip
"""Loads of the skew model that its table shows; all are in the rows."""
PREDICTORS = ("none", "last batch", "average", "affinity")
Row = dict[str, Any]


def _mean(rows: list[Row], policy: str, key: str) -> str:
    values = [row[policy][key] for row in rows if policy in row]
    return f"{np.mean(values):.2f}" if values else "-"


def _is_skew(row: Row) -> bool:
    return row["load"].startswith("alpha")


def ratio_table(rows: list[Row]) -> str:
    """Busiest rank / mean per load and number of ranks, few slots and many."""
    few = [row for row in rows if row["D"] == FEW]
    many = markdown.grouped((row for row in rows if row["D"] == MANY), "load", "S")
    body = [
        [
            load,
            str(ranks),
            *(_mean(group, policy, "ratio") for policy in POLICIES),
            *(_mean(many[load, ranks], policy, "ratio") for policy in WITH_MANY),
        ]
        for (load, ranks), group in markdown.grouped(few, "load", "S").items()
    ]
    heads = [f"`{policy}`" for policy in POLICIES]
    heads += [f"`{policy}`, {MANY} slots" for policy in WITH_MANY]
    return f"{FEW} slots per rank, where nothing else is said.\n\n" + markdown.table(
        ["load", "ranks", *heads], body
    )


def fetch_table(rows: list[Row]) -> str:
    """Experts fetched per rank and batch, mean over loads."""
    body = [
        [kind, str(slots), *(_mean(group, policy, "fetches_per_rank") for policy in FETCHERS)]
        for kind, chosen in (
            ("skew, steady", [r for r in rows if _is_skew(r) and "steady" in r["load"]]),
            ("skew, new every 4", [r for r in rows if "every 4" in r["load"]]),
            ("skew, new every 1", [r for r in rows if "every 1" in r["load"]]),
            ("alpha 0", [r for r in rows if r["load"] == "alpha 0"]),
            ("traces", [r for r in rows if not _is_skew(r)]),
        )
        for (slots,), group in markdown.grouped(chosen, "D").items()
    ]
    return markdown.table(["load", "slots", *(f"`{name}`" for name in FETCHERS)], body)


def eviction_table(rows: list[Row]) -> str:
    """Share of the foreign experts in use that were in a slot already."""
    body = []
    for kind, is_chosen in (("skew", _is_skew), ("traces", lambda row: not _is_skew(row))):
        for (slots,), group in markdown.grouped(filter(is_chosen, rows), "D").items():
            cells = []
            for name in ("harmoeny", "harmoeny, first", "harmoeny_paper", "harmoeny_paper, first"):
                shares = [row[name]["held_share"] for row in group]
                cells.append(f"{np.mean([s for s in shares if s is not None]):.1%}")
            body.append([kind, str(slots), *cells])
    heads = ["load", "slots", "`harmoeny`, LRU", "first free", "`harmoeny_paper`, LRU",
             "first free"]  # fmt: skip
    return markdown.table(heads, body)


def aside_table(rows: list[Row]) -> str:
    """How `harmoeny` treated the batches."""
    outcomes = ("balanced", "unpaid", "held", "fetched")
    body = []
    shown = [row for row in rows if not _is_skew(row) or row["load"] in SKEWS]
    for (load,), group in markdown.grouped(shown, "load").items():
        counts = [sum(r["harmoeny"]["outcomes"].get(o, 0) for r in group) for o in outcomes]
        body.append([load, *(f"{count / sum(counts):.0%}" for count in counts)])
    return markdown.table(["load", *outcomes], body)


def time_table(rows: list[Row]) -> str:
    """Median microseconds of a whole call."""
    names = ("harmoeny", "harmoeny, again", "harmoeny_paper", "sources", "shadow", "even_split")
    body = []
    for row in rows:
        times = dict(row["time_us"])
        times["sources"] = times[f"harmoeny_paper, {row['S']} sources"]
        shape = [str(row["E"]), str(row["S"]), row.get("load") or str(row["alpha"])]
        body.append([*shape, *(f"{times[name]:.0f}" for name in names)])
    heads = ["experts", "ranks", "alpha or trace", "`harmoeny`, empty slots",
             "`harmoeny`, kept slots", "`harmoeny_paper`", "the same, a source per rank",
             "`shadow`", "`even_split`"]  # fmt: skip
    return markdown.table(heads, body, left=0)


def lookahead_table(rows: list[Row]) -> str:
    """Per predictor: experts in time, and experts fetched in vain per expert in use."""
    body = []
    shown = [row for row in rows if row["D"] < MANY]
    for (load, slots), group in markdown.grouped(shown, "load", "D").items():
        cells = []
        for name in PREDICTORS:
            total = {
                key: sum(row[name][key] for row in group) for key in ("wanted", "late", "wasted")
            }
            wanted = max(total["wanted"], 1)
            cells.append(f"{1 - total['late'] / wanted:.0%}")
            if name != "none":
                cells.append(f"{total['wasted'] / wanted:.2f}")
        body.append([load, str(slots), *cells])
    heads = ["trace", "slots", "kept"]
    heads += [head for name in PREDICTORS[1:] for head in (name, "wasted")]
    return markdown.table(heads, body)


def provenance(rows: list[Row]) -> str:
    """Where the numbers are from."""
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    return (
        f"Commits {commits}; {rows[-1]['machine']}; seed {rows[-1]['seed']}; "
        f"`python -m bench.harmoeny_schedule --traces DIR`."
    )


def writer(rows: list[Row]) -> Callable[[str], str]:
    """What goes to each place of docs/harmoeny-results.md, by its name."""
    quality = [row for row in rows if row["kind"] == "quality"]
    times = [row for row in rows if row["kind"] == "time"]
    ahead = [row for row in rows if row["kind"] == "lookahead"]
    tables = {
        "skew": lambda: ratio_table([row for row in quality if row["load"] in SKEWS]),
        "traces": lambda: ratio_table([row for row in quality if not _is_skew(row)]),
        "fetches": lambda: fetch_table(quality),
        "eviction": lambda: eviction_table(quality),
        "aside": lambda: aside_table(quality),
        "times": lambda: time_table(times),
        "lookahead": lambda: lookahead_table(ahead),
        "provenance": lambda: provenance(rows),
    }
    return lambda name: tables[name]()
