"""The dynamic slots of one layer on one rank: what they hold, what is on its way, what it cost."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from vllm_balance.experts.prefetch import Copy, Prefetch
from vllm_balance.types import DynamicSlots, Outcome, Schedule


@dataclass(slots=True, kw_only=True)
class LayerSlots:
    """Follows the schedules of one layer: the same state on all ranks, copies on this one.

    Home experts are rows 0 to E / S - 1 of the layer's tensors, dynamic slots the rows behind.
    """

    layer: int
    rank: int
    state: DynamicSlots
    """What all ranks' slots hold once the started copies are in place."""
    prefetch: Prefetch
    expert_bytes: int
    counted: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    waiting_ns: int = 0
    """Time of the rank's own thread for copies: starting them, and waiting for their end."""
    _unused: dict[int, bool] = field(default_factory=dict)
    """Slots fetched and not computed with since; whether a guess fetched them."""
    _in_use: set[int] = field(default_factory=set)
    """Local slots with tokens of the batch that was scheduled last."""
    _computing: bool = False

    def follow(self, schedule: Schedule, *, is_guess: bool = False) -> None:
        """Takes over the state after a schedule and starts this rank's fetches.

        Args:
            is_guess: the counts were predicted; a batch with the true ones follows, so slots are
                fetched into and grow no older.

        Raises:
            RuntimeError: the layer's experts are being computed at this moment.
        """
        if self._computing:
            raise RuntimeError(f"layer {self.layer}: a slot would change while it computes.")
        fetch_D = schedule.fetch_SD[self.rank].tolist()
        fetched = {slot: expert for slot, expert in enumerate(fetch_D) if expert >= 0}
        held_D = self.state.content_SD[self.rank].tolist()
        self.state = self._guessed(schedule) if is_guess else schedule.slots
        self._count_fetches(fetched, held_D, is_guess)
        if not is_guess:
            self.outcomes[schedule.outcome] += 1
            self._count_uses(fetched)
        if fetched:
            start = time.perf_counter_ns()
            self.prefetch.start(
                [
                    Copy(layer=self.layer, expert=expert, slot=self.num_home + slot)
                    for slot, expert in fetched.items()
                ]
            )
            self.waiting_ns += time.perf_counter_ns() - start

    @property
    def num_home(self) -> int:
        """Home experts of this rank."""
        return self.state.num_logical // self.state.num_ranks

    def pending(self) -> set[int]:
        """Local slots with tokens that must not be computed before :meth:`wait`: what a guess
        fetched for nothing is not waited for."""
        return self.prefetch.pending(self.layer) & self._in_use

    def wait(self) -> None:
        """Returns when all copies are in place. Raises BalancerError if one failed."""
        start = time.perf_counter_ns()
        self.prefetch.wait(self.layer)
        self.waiting_ns += time.perf_counter_ns() - start

    @contextmanager
    def computing(self) -> Iterator[None]:
        """While the layer's experts compute, no slot of it may be overwritten."""
        self._computing = True
        try:
            yield
        finally:
            self._computing = False

    def reset(self) -> None:
        """Sets the counters to zero; slots and copies stay."""
        self.waiting_ns = 0
        self.counted.clear()
        self.outcomes.clear()

    def status(self) -> dict[str, Any]:
        """This rank's counters of this layer; see docs/harmoeny.md."""
        return {
            "fetch_wait_us": self.waiting_ns / 1e3,
            **{name: self.counted[name] for name in COUNTERS},
            **{f"{outcome.name.lower()}_schedules": self.outcomes[outcome] for outcome in Outcome},
        }

    def _guessed(self, schedule: Schedule) -> DynamicSlots:
        """The slots with what a guess fetches: only a batch makes the others older or used."""
        idle_SD = torch.where(schedule.fetch_SD >= 0, 0, self.state.idle_SD)
        return replace(self.state, content_SD=schedule.slots.content_SD, idle_SD=idle_SD)

    def _count_fetches(self, fetched: dict[int, int], held_D: list[int], is_guess: bool) -> None:
        counted = self.counted
        kind = "early_fetches" if is_guess else "fetches"
        counted[kind] += len(fetched)
        counted["fetched_bytes"] += len(fetched) * self.expert_bytes
        for slot in fetched:
            counted["evictions"] += held_D[slot] >= 0
            if slot in self._unused:
                counted["wasted_bytes"] += self.expert_bytes
            self._unused[slot] = is_guess

    def _count_uses(self, fetched: dict[int, int]) -> None:
        """Notes the slots with tokens; one that was not fetched for them is a hit."""
        content_D = self.state.content_SD[self.rank].tolist()
        idle_D = self.state.idle_SD[self.rank].tolist()
        self._in_use = set()
        for slot, (expert, idle) in enumerate(zip(content_D, idle_D, strict=True)):
            if expert >= 0 and idle == 0:
                self._in_use.add(self.num_home + slot)
                self.counted["hits"] += slot not in fetched
                self.counted["early_hits"] += self._unused.pop(slot, False)


COUNTERS = (
    "fetches",
    "early_fetches",
    "fetched_bytes",
    "wasted_bytes",
    "hits",
    "early_hits",
    "evictions",
)
