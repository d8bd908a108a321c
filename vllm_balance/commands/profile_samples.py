"""Which batches a profile measures, how often in a round, and what may describe them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from vllm_balance.commands import expert_probe
from vllm_balance.commands.rank_curves import ROUNDS
from vllm_balance.cost import FORMS, GROUPED, PLAIN, Form
from vllm_balance.profiles import Point

AROUND_KNEE = (0.5, 0.7, 1.0, 1.4, 2.0, 4.0)
"""Further samples, as multiples of the knee found."""
TILED = 16
"""Experts of the samples on both sides of where a grouped kernel may begin another tile."""
LONGEST, HURRIED = 100.0, 60.0
"""Seconds that the least number of rounds may take by what the first samples say; and those to stay
within where they would take longer, as the start of large experts does too."""
FEWEST = 8
"""Batches beside the first ones that are measured in any case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """How far samples go on one kind of device."""

    coarse: tuple[int, ...]
    """Tokens per expert of the first samples, which find the knee."""
    most_tokens: int
    """Pairs of the largest sample on one rank."""
    highest_knee: int
    forms: tuple[Form, ...]
    """Of curves that a kernel may have there."""


ON_CORES = Extent(coarse=(1, 4, 16, 64), most_tokens=6144, highest_knee=128, forms=FORMS)
ON_GPU = Extent(
    coarse=(1, 16, 128, 512), most_tokens=65_536, highest_knee=1024, forms=(PLAIN, *GROUPED)
)
"""A knee near 160 tokens is expected (`vllm_balance.cost.GPU_KNEE_TOKENS`), and experts overlap."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstGuess:
    """What the first samples, evenly loaded ones, say of the time of others."""

    expert_us: float
    """Of an expert with a token or few."""
    token_us: float

    @classmethod
    def of(cls, points: Sequence[Point]) -> Self:
        """From the first level and the last slope of samples in order of their tokens."""
        first, last, before = points[0], points[-1], points[-2]
        slope = (last.time_us - before.time_us) / (sum(last.tokens_E) - sum(before.tokens_E))
        return cls(expert_us=first.time_us / len(first.tokens_E), token_us=max(slope, 1e-6))

    @property
    def knee(self) -> float:
        """Tokens per expert, at least 1."""
        return max(1.0, self.expert_us / self.token_us)

    def once_s(self, tokens_E: Sequence[int]) -> float:
        """Of a batch computed once: at most, as nothing is taken to hide behind anything."""
        further = sum(tokens_E) - len(tokens_E)
        return (self.expert_us * len(tokens_E) + self.token_us * further) / 1e6

    def repeats(self, tokens_E: Sequence[int], hurried: bool) -> int | None:
        """How often a batch is timed; None: as often as the probe does."""
        return 1 if hurried and self.once_s(tokens_E) > expert_probe.SECONDS else None

    def rounds_s(self, batches: Sequence[Sequence[int]], hurried: bool) -> float:
        """Of the least number of rounds."""
        total = 0.0
        for tokens_E in batches:
            once = self.once_s(tokens_E)
            several = min(expert_probe.MAX_REPEATS * once, expert_probe.SECONDS)
            usual = max(expert_probe.MIN_REPEATS * once, several)
            total += once if self.repeats(tokens_E, hurried) else usual
        return ROUNDS[0] * total


def within_time(
    guess: FirstGuess, first: Sequence[list[int]], wanted: Sequence[list[int]]
) -> tuple[list[list[int]], bool]:
    """The batches to measure, and whether the long ones are timed once per round only.

    They are if LONGEST does not suffice; the longest of `wanted` are left out as far as even then
    HURRIED does not.
    """
    batches = [*first, *wanted]
    if guess.rounds_s(batches, False) <= LONGEST:
        return batches, False
    by_time = sorted(wanted, key=guess.once_s)
    while len(by_time) > FEWEST and guess.rounds_s([*first, *by_time], True) > HURRIED:
        by_time.pop()
    return [*first, *(tokens_E for tokens_E in wanted if tokens_E in by_time)], True


def grid(local: int, knee: float, extent: Extent = ON_CORES) -> list[list[int]]:
    """Batches, as tokens of each activated expert, around a knee and on both sides of tiles; each
    once, none of the first samples, none above what the extent allows.
    """
    knee = min(knee, extent.highest_knee)
    around = sorted({max(1, round(knee * factor)) for factor in AROUND_KNEE} - set(extent.coarse))
    batches = [[n] * local for n in around]
    for activated in sorted({max(1, local // 2), max(1, local // 4), max(1, local // 16)}):
        counts = sorted({1, *(max(1, round(knee * factor)) for factor in (0.5, 1.0, 2.0, 8.0))})
        batches += [[n] * activated for n in counts]
    for tile in (tile for tile, *_ in GROUPED if tile):
        batches += [[n] * min(local, TILED) for n in (tile, tile + 1)]
    for mean in sorted({max(2.0, knee / 2), max(3.0, 2 * knee), max(4.0, 4 * knee)}):
        for activated in {local, max(1, local // 2)}:
            weight = 1 / np.arange(1, activated + 1)
            tokens = np.maximum(1, np.round(mean * activated * weight / weight.sum()))
            batches.append(tokens.astype(int).tolist())
    known = {(n,) * local for n in extent.coarse}
    new = [batch for batch in dict.fromkeys(map(tuple, batches)) if batch not in known]
    return [list(batch) for batch in new if sum(batch) <= extent.most_tokens]
