"""What a change in mid-run costs, and how soon it is over."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from pydantic import Field

from vllm_balance.measured_tables import MeasuredTable, Turn, paired
from vllm_balance.own_benchmarks.rows import OwnRow

SETTLED = 5
"""Last bursts of a phase, whose median is where it ends."""
NEAR = 0.05
"""A burst within this of where its phase ends counts as recovered, if all behind it do."""
IN_TURN = " Ratios are of bursts in turn, with quartiles."
HEADINGS = (
    *("phase", "arm", "servers", "first burst ms", "last bursts ms", "against static"),
    *("against gem", "settled after s", "swaps", "moved MiB"),
)


class Burst(OwnRow):
    """Requests that were sent at once to a server, in one of its phases."""

    arm: str
    position: int
    """Place in the order in which servers were started."""
    group: int | None = None
    """Servers of the same group were up together and took turns, burst by burst; None in older
    rows, whose servers ran one after the other."""
    burst: int = 0
    """Number of it in its phase."""
    phase: str
    """What has changed when it begins."""
    at_s: float
    """Since the change; when the burst was sent."""
    e2e_ms: float = Field(gt=0)
    """Median over requests, as the two below."""
    ttft_ms: float
    tpot_ms: float
    swaps: int | None = None
    """Experts that changed places since the change; None where nothing moves them."""
    expert_bytes: int
    """Weights of one expert."""


def table(rows: list[Burst]) -> MeasuredTable:
    """Per phase and arm: latency at the change and at the end, and what recovering took; "-" where
    what to compare with is not measured yet."""
    body = []
    for phase in dict.fromkeys(row.phase for row in rows):
        by_arm = {
            arm: [row for row in rows if (row.phase, row.arm) == (phase, arm)]
            for arm in dict.fromkeys(row.arm for row in rows if row.phase == phase)
        }
        for arm, own in by_arm.items():
            servers = list(by_server(own).values())
            body.append(
                [
                    phase,
                    arm,
                    str(len(servers)),
                    f"{statistics.median(bursts[0].e2e_ms for bursts in servers):.0f}",
                    f"{_end_ms(own):.0f}",
                    *(_against(own, by_arm.get(base, [])) for base in ("static", "gem")),
                    _seconds(statistics.median(map(recovery_s, servers))),
                    *_moved(servers),
                ]
            )
    return rows[-1].table(
        caption="End-to-end latency of a request, medians over requests, bursts and servers."
        + (IN_TURN if any(row.group is not None for row in rows) else ""),
        headings=HEADINGS,
        body=body,
        command="python -m bench.recovery --traces DIR",
        left=2,
    )


def by_server(rows: list[Burst]) -> dict[tuple[str, int], list[Burst]]:
    """The bursts of each server, in order, by its arm and position."""
    servers = dict.fromkeys((row.arm, row.position) for row in rows)
    return {at: [row for row in rows if (row.arm, row.position) == at] for at in servers}


def _last(rows: list[Burst]) -> Iterator[Burst]:
    """The bursts that say where a phase ends, of all servers."""
    for bursts in by_server(rows).values():
        yield from bursts[-SETTLED:]


def _end_ms(rows: list[Burst]) -> float:
    """End-to-end latency at the end of a phase, median over bursts and servers."""
    return statistics.median(row.e2e_ms for row in _last(rows))


def _in_turn(rows: list[Burst]) -> dict[Turn, float]:
    """End-to-end latency of the last bursts, by group and number: those of another arm with the
    same two were beside them."""
    return {(row.group, row.burst): row.e2e_ms for row in _last(rows) if row.group is not None}


def _against(own: list[Burst], base: list[Burst]) -> str:
    """The end of a phase against that of another arm, burst by burst where servers took turns."""
    if not base:
        return "-"
    return paired(_in_turn(own), _in_turn(base), _end_ms(own) / _end_ms(base))


def recovery_s(bursts: list[Burst]) -> float:
    """Seconds from the change to the first burst from which on all are near the end's latency.

    Infinite if the last one is not.
    """
    end_ms = statistics.median(row.e2e_ms for row in bursts[-SETTLED:])
    far = [i for i, row in enumerate(bursts) if row.e2e_ms > (1 + NEAR) * end_ms]
    if not far:
        return 0.0
    behind = bursts[far[-1] + 1 :]
    return behind[0].at_s if behind else math.inf


def _seconds(value: float) -> str:
    return f"{value:.0f}" if math.isfinite(value) else "never"


def _moved(servers: list[list[Burst]]) -> list[str]:
    """Swaps of a phase, and the weights that they moved."""
    counted = [bursts[-1].swaps for bursts in servers]
    swaps = [value for value in counted if value is not None]
    if not swaps:
        return ["-", "-"]
    middle = statistics.median(swaps)
    return [f"{middle:.0f}", f"{2 * middle * servers[0][0].expert_bytes / 2**20:,.0f}"]
