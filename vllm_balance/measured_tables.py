"""Tables from measurements, the same for README.md, docs/ and `vllm-balance report`.

A cell is the median over all repeats of all starts of a server; ratios compare medians within one
run, one case and one load. Of loads that were sent in turn each is compared with its neighbour, and
the ratio is the median of those.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from vllm_balance.measurement import Measurement

BASES = ("static", "eplb")
"""Arms that the others are compared with, where a run has them."""
FEW_TOKENS = 8
"""Output tokens per request up to which a load is about its first token."""
FEW_PAIRS = 3
"""Pairs below which no quartiles are given."""
Value = Callable[[Measurement], float]
Turn = tuple[int | None, int]
"""The round or group of servers that were up together, and the number of the load or burst."""


def waiting(row: Measurement) -> float:
    """Share of the experts' time that an average rank waits: by clocks, or else by experts."""
    measured = row.waiting_share
    return row.waiting_share_by_experts if measured is None else measured


def tokens_per_s(row: Measurement) -> float:
    """That were generated."""
    return row.tokens_per_s


def total_tokens_per_s(row: Measurement) -> float:
    """Those of prompts too."""
    return row.total_tokens_per_s


Column = tuple[str, str, Value]
"""Heading, format and value."""
COUNTED: tuple[Column, ...] = (
    ("experts on the worst rank", ".1f", lambda row: row.activated_worst_rank),
    ("tokens on the worst rank", ".0f", lambda row: row.tokens_worst_rank),
    ("waiting", ".1%", waiting),
    ("deciding us", ".0f", lambda row: row.decide_us_per_layer),
    ("memory GiB", ".1f", lambda row: row.memory_bytes / 2**30),
)
COLUMNS: tuple[Column, ...] = (
    ("TPOT ms", ".1f", lambda row: row.tpot_ms.p50),
    ("p99", ".1f", lambda row: row.tpot_ms.p99),
    ("ITL p99 ms", ".1f", lambda row: row.itl_ms.p99),
    ("TTFT ms", ".0f", lambda row: row.ttft_ms.p50),
    ("tokens/s", ".1f", tokens_per_s),
    *COUNTED,
)
FIRST_TOKEN_COLUMNS: tuple[Column, ...] = (
    ("TTFT ms", ".0f", lambda row: row.ttft_ms.p50),
    ("p99", ".0f", lambda row: row.ttft_ms.p99),
    ("prompt tokens/s", ".0f", total_tokens_per_s),
    *COUNTED,
)
"""Of a run whose loads all have few tokens per request."""


def cores_ms(row: Measurement) -> float:
    """What the machine took for the same batch of experts beside each load, mean over its cores:
    the batch with the most tokens if a load is about first tokens, the one with the fewest else.

    Raises:
        ValueError: the row does not say it.
    """
    pick = max if has_few_tokens(row) else min
    batch = pick(row.machine_speed or (), key=lambda each: each.tokens_each)
    return statistics.mean(batch.time_us) / 1e3


CORES: Column = ("cores ms", ".0f", cores_ms)
CORES_NOTE = (
    " cores: how long the machine took for the same few experts, timed beside each load while no "
    "server ran."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredTable:
    """A table with what it says about itself."""

    title: str
    caption: str
    headings: list[str]
    body: list[list[str]]
    origin: str
    """Machine and commit."""
    command: str
    """Makes the rows."""
    left: int = 1
    """Columns of text; the others are numbers."""


def table_of(
    rows: list[Measurement],
    *,
    caption: str,
    headings: list[str],
    body: list[list[str]],
    arguments: str = "",
) -> MeasuredTable:
    """A table of one run, with the title, origin and command of its rows.

    Args:
        arguments: what the command takes beside the run file.
    """
    return MeasuredTable(
        title=rows[0].title,
        caption=caption,
        headings=headings,
        body=body,
        origin=origin(rows),
        command=f"python -m bench.run configs/runs/{rows[-1].run}.toml{arguments}",
    )


def slow_table(rows: list[Measurement]) -> MeasuredTable:
    """End-to-end latency by case, load and slowdown of one rank, each arm against the bases.

    "-" where an arm was not measured yet.
    """
    arms = list(dict.fromkeys(row.arm for row in rows))
    pairs = [(a, b) for b in BASES for a in arms if b in arms and a not in BASES]
    has_cases = any(row.case for row in rows)
    body = []
    for key in dict.fromkeys(map(_slowed_load, rows)):
        here = [row for row in rows if _slowed_load(row) == key]
        own = {arm: [row for row in here if row.arm == arm] for arm in arms}
        case, load, slow = key
        cells = [case] if has_cases else []
        cells += [load, f"{slow - 1:+.0%}", f"{here[0].slow_shown - 1:+.1%}"]
        cells += [f"{median(own[arm], _e2e_ms):.0f}" if own[arm] else "-" for arm in arms]
        body.append(cells + [ratio(own[arm], own[base], _e2e_ms) for arm, base in pairs])
    headings = ["case"] if has_cases else []
    headings += ["load", "asked", "shown", *(f"{arm} ms" for arm in arms)]
    return table_of(
        rows,
        caption=f"End-to-end latency of a request, medians.{in_turn(rows)}",
        headings=headings + [f"{arm} against {base}" for arm, base in pairs],
        body=body,
        arguments=" --traces DIR",
    )


def _slowed_load(row: Measurement) -> tuple[str, str, float]:
    return row.case, row.load, row.slow


def arms_table(rows: list[Measurement]) -> MeasuredTable:
    """One line for each case, load and arm."""
    groups = grouped(rows)
    varied = [
        (heading, place)
        for place, heading in enumerate(("case", "load"))
        if any(key[place] for key in groups)
    ]
    bases = [base for base in BASES if any(arm.split(" ")[0] == base for _, _, arm in groups)]
    columns = FIRST_TOKEN_COLUMNS if all(map(has_few_tokens, rows)) else COLUMNS
    watched = all(row.machine_speed for row in rows)
    columns += (CORES,) if watched else ()
    body = []
    for key, own in groups.items():
        cells = [key[place] for _, place in varied] + [key[2]]
        cells += [ratio(own, _of_base(groups, key, base), _time_ms) for base in bases]
        cells.append(_range(own, _time_ms))
        body.append(cells + [format(median(own, value), spec) for _, spec, value in columns])
    headings = [*(heading for heading, _ in varied), "arm"]
    headings += [f"{_compared(rows)} against {base}" for base in bases]
    headings.append(f"{_compared(rows)} ms, lowest to highest")
    return table_of(
        rows,
        caption=f"Medians of {measurements(groups.values())} per line.{in_turn(rows)}"
        f"{CORES_NOTE if watched else ''}{_in_small_pages(rows)}",
        headings=headings + [heading for heading, _, _ in columns],
        body=body,
    )


def _of_base(
    groups: dict[tuple[str, str, str], list[Measurement]], key: tuple[str, str, str], base: str
) -> list[Measurement]:
    """Rows of the base that an arm is compared with: of `metro 1.5`, `eplb 1.5` before `eplb`."""
    case, load, arm = key
    _, _, variant = arm.partition(" ")
    return groups.get((case, load, f"{base} {variant}")) or groups.get((case, load, base), [])


def grouped(rows: Iterable[Measurement]) -> dict[tuple[str, str, str], list[Measurement]]:
    """Rows by (case, load, arm): arms together, in the order in which they were first measured."""
    rows = list(rows)
    keys = dict.fromkeys(
        (row.case, load, arm)
        for row in rows
        for load in dict.fromkeys(r.load_name for r in rows)
        for arm in dict.fromkeys(r.arm for r in rows)
    )
    found = {key: [r for r in rows if (r.case, r.load_name, r.arm) == key] for key in keys}
    return {key: own for key, own in found.items() if own}


def median(rows: Iterable[Measurement], value: Value) -> float:
    """Over rows."""
    return statistics.median(value(row) for row in rows)


def origin(rows: list[Measurement]) -> str:
    """Where the numbers come from."""
    last = rows[-1]
    commits = ", ".join(dict.fromkeys(row.commit for row in rows))
    return f"Measured on {last.machine}; commit {commits}"


def ratio(own: list[Measurement], theirs: list[Measurement], value: Value) -> str:
    """Against a base in the same case and load; of loads in turn with quartiles.

    "-" if either was not measured.
    """
    if not own or not theirs:
        return "-"
    found, bases = (
        {turn: value(row) for turn, row in _in_turn(of).items()} for of in (own, theirs)
    )
    return paired(found, bases, median(own, value) / median(theirs, value))


def paired(own: Mapping[Turn, float], bases: Mapping[Turn, float], of_medians: float) -> str:
    """By how much values differ from those in the same turn, with quartiles.

    Args:
        of_medians: the ratio that is said where few turns have both.
    """
    ratios = [value / bases[turn] - 1 for turn, value in own.items() if turn in bases]
    if len(ratios) < FEW_PAIRS:
        return f"{of_medians - 1:+.1%}"
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{middle:+.1%} ({100 * low:+.1f} to {100 * high:+.1f})"


def _in_turn(rows: list[Measurement]) -> dict[Turn, Measurement]:
    """Rows of an arm that were measured in turn, by the round of its server and the repeat of the
    load: those of another arm with the same two were measured beside them."""
    positions = sorted({row.position for row in rows})
    return {(positions.index(row.position), row.repeat): row for row in rows if row.in_turns}


def _range(rows: list[Measurement], value: Value) -> str:
    """Of single measurements: what their median hides."""
    found = [value(row) for row in rows]
    return f"{min(found):.0f} to {max(found):.0f}"


def has_few_tokens(row: Measurement) -> bool:
    """Whether a load is about first tokens."""
    return row.output_tokens <= FEW_TOKENS


def _time_ms(row: Measurement) -> float:
    """What a load is about: time per token, or the first token where there are few."""
    return row.ttft_ms.p50 if has_few_tokens(row) else row.tpot_ms.p50


def _e2e_ms(row: Measurement) -> float:
    return row.e2e_ms.p50


def in_turn(rows: list[Measurement]) -> str:
    """What a caption says of ratios."""
    if not rows[0].in_turns:
        return ""
    rounds = max(len({row.position for row in own}) for own in grouped(rows).values())
    servers = "one server" if rounds == 1 else f"{rounds} servers"
    if rows[0].one_server:
        return f" Ratios are of loads in turn on {servers}, its experts moved in between."
    return f" Ratios are of loads in turn on {servers} of each arm, with quartiles."


def _in_small_pages(rows: list[Measurement]) -> str:
    """A warning if some server had to read expert weights in small pages."""
    least = min((row.huge_page_share for row in rows if row.huge_page_share is not None), default=1)
    if least > 0.99:
        return ""
    return f" Only {least:.0%} of the expert weights lay in huge pages in one of the servers."


def _compared(rows: list[Measurement]) -> str:
    names = {"TTFT" if has_few_tokens(row) else "TPOT" for row in rows}
    return " or ".join(sorted(names, reverse=True))


def measurements(groups: Iterable[list[Measurement]]) -> str:
    counts = sorted({len(own) for own in groups})
    least = f"{counts[0]} " if len(counts) == 1 else f"{counts[0]} to {counts[-1]} "
    return least + ("measurement" if counts[-1] == 1 else "measurements")
