"""Tables of docs/simulator-results.md from the rows of bench/results/validation.jsonl."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from bench import markdown
from vllm_balance.measurement import slowed

Row = dict[str, Any]
TIMES = {"tpot_ms": "TPOT ms", "ttft_ms": "TTFT ms"}
PARTS = ("measured", "predicted", "error")
AIM = 0.1
"""Error that the project asked for."""
COUNTS = {
    "activated_worst_rank": "experts on the worst rank",
    "tokens_worst_rank": "tokens on the worst rank",
}


class Variant(NamedTuple):
    """What arms that are compared have in common."""

    case: str
    load: str
    slow: float
    """What one rank was asked to be slower by."""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.case, self.load, slowed(self.slow))))


def table(name: str, rows: list[Row]) -> str:
    """One table of docs/simulator-results.md."""
    if name == "summary":
        return _summary(rows)
    if name == "runs":
        return _runs(rows)
    if name == "measured":
        groups = _grouped(rows, "measured", lambda row: row["arm"])
        head = ["hardware", "run", "arm", "slower than profiled"]
        head += [f"{what}: {part}" for what in TIMES.values() for part in PARTS]
        head += [f"{what}: error" for what in COUNTS.values()]
        body = [[*key, *_measured(group)] for key, group in groups.items()]
        return markdown.table(head, body, left=3)
    if name == "pairs":
        groups = _grouped(rows, "pair", lambda row: str(_variant(row)) or "-")
        head = ["hardware", "run", "load", "pairs", "more than 3 % apart", "ranked right"]
        head += ["wrong: measured, predicted"]
        body = [[*key, *_ranked(group)] for key, group in groups.items()]
        return markdown.table(head, body, left=3)
    own = [row for row in rows if row["kind"].startswith("published") and row["paper"] == name]
    head = ["what", "published", "predicted", "remark"]
    body = [
        [row["what"], row["published"], f"{row['predicted']:{row['format']}}", row["remark"]]
        for row in own
    ]
    return markdown.table(head, body, left=1)


def _summary(rows: list[Row]) -> str:
    """Per hardware file, how many lines are within the aim, of how many the measured time itself is
    known as well, and how many pairs are in the right order; points of older code are left out."""
    own = _present(rows)
    body = []
    for name in sorted({row["hardware"] for row in own}):
        here = [row for row in own if row["hardware"] == name]
        cells = [
            cell
            for what in TIMES
            for cell in (_near(_errors(here, what)), _near(_errors(here, what, "apart")))
        ]
        body.append([name, *cells, _in_order(here)])
    heads = [
        f"{what.removesuffix(' ms')} {how} {AIM:.0%}"
        for what in TIMES.values()
        for how in ("within", "measured to")
    ]
    return markdown.table(["hardware", *heads, "pairs in order"], body)


def _runs(rows: list[Row]) -> str:
    """The same for each run on each hardware, with the middle and the ends of the errors."""
    own = _present(rows)
    body = []
    for key in sorted({(row["hardware"], row["run"]) for row in own}):
        here = [row for row in own if (row["hardware"], row["run"]) == key]
        cells = []
        for what in TIMES:
            errors = _errors(here, what)
            cells += [_near(errors), _middle_and_ends(errors)] if errors else ["-", "-"]
        body.append([*key, *cells, _in_order(here)])
    heads = [
        head
        for what in TIMES.values()
        for head in (f"{what.removesuffix(' ms')} within {AIM:.0%}", "error: median (range)")
    ]
    return markdown.table(["hardware", "run", *heads, "pairs in order"], body, left=2)


def _present(rows: list[Row]) -> list[Row]:
    """Measured points and pairs that the present code predicted."""
    return [row for row in rows if row["kind"] in ("measured", "pair") and not row.get("kept")]


def _errors(rows: list[Row], what: str, of: str = "error") -> list[float]:
    """Of the lines that have this time; `of` "apart" how well it is measured, if it is known."""
    own = [row[of] for row in rows if (row["kind"], row["what"]) == ("measured", what)]
    return [error for error in own if error is not None]


def _near(errors: list[float]) -> str:
    return f"{sum(abs(error) <= AIM for error in errors)} of {len(errors)}"


def _middle_and_ends(errors: list[float]) -> str:
    return f"{statistics.median(errors):+.0%} ({min(errors):+.0%} to {max(errors):+.0%})"


def _in_order(rows: list[Row]) -> str:
    """Pairs of arms that are far enough apart, and were ranked right."""
    ranked = [row["ranked"] for row in rows if row["kind"] == "pair" and row["far_apart"]]
    return f"{sum(ranked)} of {len(ranked)}" if ranked else "-"


def _grouped(
    rows: list[Row], kind: str, last: Callable[[Row], str]
) -> dict[tuple[str, str, str], list[Row]]:
    """Rows of a kind by hardware file, run and what `last` says, sorted by the first two."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    own = [row for row in rows if row["kind"] == kind]
    for row in sorted(own, key=lambda row: (row["hardware"], row["run"])):
        groups.setdefault((row["hardware"], row["run"], last(row)), []).append(row)
    return groups


def _measured(group: list[Row]) -> list[str]:
    """Times with their errors, and errors of counts, of one arm; a dash for what it has not."""
    found = {row["what"]: row for row in group}
    cells = [_longer(group[0].get("longer"))]
    for what in TIMES:
        row = found.get(what)
        cells += (
            [f"{row['reference']:.1f}", f"{row['predicted']:.1f}", f"{row['error']:+.1%}"]
            if row
            else ["-"] * len(PARTS)
        )
    return cells + [f"{found[what]['error']:+.1%}" for what in COUNTS]


def _longer(longer: list[float] | None) -> str:
    """By how much experts took on the machine, with one token and with many."""
    return "-" if longer is None else ", ".join(f"{each - 1:+.0%}" for each in longer)


def _variant(row: Row) -> Variant:
    """Of a point, which older code may have written."""
    return Variant(row.get("case", ""), row.get("load", ""), row.get("slow", 1.0))


def _ranked(group: list[Row]) -> list[str]:
    """How many pairs of arms there are and were ranked right, and which were not."""
    apart = [row for row in group if row["far_apart"]]
    wrong = [
        f"{row['arm'].removeprefix(str(_variant(row))).strip()} "
        f"{row['reference']:+.1%}, {row['predicted']:+.1%}"
        for row in apart
        if not row["ranked"]
    ]
    right = len(apart) - len(wrong)
    return [str(len(group)), str(len(apart)), str(right), "; ".join(wrong) or "-"]
