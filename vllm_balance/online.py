"""Experts that follow traffic and speeds while the server runs: the state of online GEM."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from vllm_balance.balancer import LayerBalancer
from vllm_balance.cost import CostModel
from vllm_balance.errors import BalancerError
from vllm_balance.exchange import Way
from vllm_balance.placement.online import (
    PARTS,
    Decision,
    OnlineSettings,
    certain_slowdown_S,
    decide,
    drift,
)
from vllm_balance.placement.policy import Array, Cluster

KEPT_DECISIONS = 50
"""Decisions that the status shows."""


class Ranks(Protocol):
    """What the ranks must do together; every rank calls the same at the same time."""

    def gather(self, own: Array) -> Array:
        """The arrays of all ranks, stacked in the order of ranks."""
        ...

    def from_first(self, decision: Decision | None) -> Decision:
        """What the first rank passes."""
        ...

    def move(self, placement_LP: Array) -> None:
        """Moves weights and tables to a placement."""
        ...


@dataclass(slots=True, kw_only=True)
class Window:
    """The recent steps as one rank saw them; a ring of N rows."""

    history_NLE: Array
    """Pairs of each logical expert, the same on all ranks."""
    own_NLP: Array
    """Pairs of each slot of this rank."""
    kernel_us_NL: Array
    """Time that this rank spent in its experts."""
    steps: int = 0
    """Steps ever put in."""

    def add(self, load_LE: Array, own_LP: Array, kernel_us_L: Array) -> None:
        row = self.steps % len(self.history_NLE)
        self.history_NLE[row], self.own_NLP[row] = load_LE, own_LP
        self.kernel_us_NL[row] = kernel_us_L
        self.steps += 1

    @property
    def filled(self) -> int:
        return min(self.steps, len(self.history_NLE))

    def in_order(self) -> Array:
        """The history, oldest step first, [N, L, E]."""
        if self.filled < len(self.history_NLE):
            return self.history_NLE[: self.filled]
        return np.roll(self.history_NLE, -(self.steps % len(self.history_NLE)), axis=0)

    def slowdown_M(self, cost: CostModel) -> Array:
        """Time in the experts over what the profile's curve says of the same work, in each of
        PARTS parts of the window, [M].

        A rank that was taken off its core for a while in some steps counts with them: all others
        wait for it in those steps. A part without work has the slowdown of the whole window, and
        that is 1 without any.
        """
        own_NLP = self.own_NLP[: self.filled]
        modelled_NL = cost.time_us(
            (own_NLP > 0).sum(2), own_NLP.sum(2), cost.further(own_NLP).sum(2)
        )
        measured_NL = np.where(modelled_NL > 0, self.kernel_us_NL[: self.filled], 0.0)
        modelled_us_M, measured_us_M = (
            np.array([part.sum() for part in np.array_split(times_NL, PARTS)])
            for times_NL in (modelled_NL, measured_NL)
        )
        modelled_us, measured_us = modelled_us_M.sum(), measured_us_M.sum()
        whole = measured_us / modelled_us if modelled_us and measured_us else 1.0
        worked_M = (modelled_us_M > 0) & (measured_us_M > 0)
        return np.where(worked_M, measured_us_M / np.where(worked_M, modelled_us_M, 1.0), whole)


class OnlinePlacement:
    """Records every step; every `interval` steps decides, with all ranks, whether to move."""

    def __init__(
        self,
        *,
        settings: OnlineSettings,
        costs: Sequence[CostModel],
        layers: list[LayerBalancer],
        load_LP: torch.Tensor,
        placement_LP: Array,
        ranks: Ranks,
        swap_us: float,
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`load_LP` is what the layers' routing adds to, int32; `swap_us` a measured swap."""
        self._settings, self._costs, self._ranks = settings, tuple(costs), ranks
        self._layers, self._load_LP, self._report = layers, load_LP, report
        self._set_placement(placement_LP)
        self._rank, self._slots_per_rank = layers[0].rank, placement_LP.shape[1] // len(self._costs)
        num_layers, num_slots = placement_LP.shape
        self._window = Window(
            history_NLE=np.zeros((settings.window, num_layers, num_slots), np.int32),
            own_NLP=np.zeros((settings.window, num_layers, self._slots_per_rank), np.int32),
            kernel_us_NL=np.zeros((settings.window, num_layers)),
        )
        self._kernel_ns_L = [0] * num_layers
        self._reference_LE: Array | None = None
        self._swap_us = swap_us
        self._totals = {"decisions": 0, "moves": 0, "swaps": 0}
        self._time_us = {"deciding": 0.0, "moving": 0.0}
        self._slowdown_S = [1.0] * len(self._costs)
        self._drift = 0.0
        self._recent: deque[dict[str, Any]] = deque(maxlen=KEPT_DECISIONS)

    def _set_placement(self, placement_LP: Array) -> None:
        """Notes where experts are: `_expert_of_LP` is the same as an index."""
        self.placement_LP, self._expert_of_LP = placement_LP, placement_LP.astype(np.int64)

    def after_step(self) -> None:
        """Takes the step's load in; every rank calls it after every step.

        Steps in which nothing was routed are skipped.
        """
        kernel_us_L = self._kernel_us_of_step()
        load_LP = self._load_LP.numpy()
        if not load_LP.any():
            return
        load_LE = np.zeros_like(load_LP)
        np.put_along_axis(load_LE, self._expert_of_LP, load_LP, axis=1)
        rank, slots = self._rank, self._slots_per_rank
        self._window.add(load_LE, load_LP[:, rank * slots : (rank + 1) * slots], kernel_us_L)
        self._load_LP.zero_()
        if self._window.steps % self._settings.interval == 0:
            self._evaluate()

    def adopt(self, placement_LP: Array) -> int:
        """Moves the experts to a placement that came from outside; decisions go on from there.

        Every rank calls it between the same two steps. Returns how many slots have another expert.
        """
        changed = int(np.count_nonzero(placement_LP != self.placement_LP))
        self._ranks.move(placement_LP)
        self._set_placement(placement_LP)
        return changed

    def forget(self) -> None:
        """Leaves out what was routed since the last step: dummy batches are no traffic."""
        self._load_LP.zero_()
        self._kernel_us_of_step()

    def counters_are_zero(self) -> None:
        """The layers count from zero again; what is counted here goes on."""
        self._kernel_ns_L = [0] * len(self._layers)

    def _kernel_us_of_step(self) -> Array:
        """Time in each layer's experts since the last call, microseconds [L]."""
        now_L = [layer.experts.kernel_ns if layer.experts else 0 for layer in self._layers]
        spent = [now - before for now, before in zip(now_L, self._kernel_ns_L, strict=True)]
        self._kernel_ns_L = now_L
        return np.array(spent) / 1e3

    def _evaluate(self) -> None:
        start = time.perf_counter()
        own_M = self._window.slowdown_M(self._costs[self._rank])
        # Every rank judges the same numbers, and so the speeds in its status are the same.
        found_SX = self._ranks.gather(np.array([self._swap_us, *own_M]))
        swap_us = float(found_SX[:, 0].max())
        self._slowdown_S = certain_slowdown_S(found_SX[:, 1:].T).tolist()
        history_NLE = self._window.in_order()
        load_LE = history_NLE.sum(0, dtype=np.int64)
        if self._reference_LE is None:
            self._reference_LE = load_LE
        self._drift = drift(self._reference_LE, load_LE)
        decision = None
        if self._rank == 0:
            costs = [c.slowed(f) for c, f in zip(self._costs, self._slowdown_S, strict=True)]
            cluster = Cluster(costs=tuple(costs))
            turn = self._totals["decisions"]
            decision = decide(
                history_NLE, self.placement_LP, cluster, self._settings, swap_us, turn
            )
        decision = self._ranks.from_first(decision)
        self._time_us["deciding"] += (time.perf_counter() - start) * 1e6
        self._totals["decisions"] += 1
        if decision.swaps:
            self._move(decision, load_LE)
        self._remember(decision, swap_us)

    def _move(self, decision: Decision, load_LE: Array) -> None:
        start = time.perf_counter()
        placement_LP = decision.placement(self.placement_LP)
        self._ranks.move(placement_LP)
        self._set_placement(placement_LP)
        spent_us = (time.perf_counter() - start) * 1e6
        self._swap_us = (self._swap_us + spent_us / len(decision.swaps)) / 2
        self._time_us["moving"] += spent_us
        self._totals["moves"] += 1
        self._totals["swaps"] += len(decision.swaps)
        self._reference_LE = load_LE

    def _remember(self, decision: Decision, swap_us: float) -> None:
        entry = {
            "step": self._window.steps,
            "swaps": len(decision.swaps),
            "layers": sorted({swap.layer for swap in decision.swaps}),
            **{key: value for key, value in asdict(decision).items() if key != "swaps"},
            "swap_us": swap_us,
            "drift": self._drift,
            "slowdown_per_rank": self._slowdown_S,
        }
        self._recent.append(entry)
        if decision.swaps:
            self._report(
                f"Online placement, step {entry['step']}: {entry['swaps']} swaps, modelled gain "
                f"{decision.gain_us / max(decision.step_us, 1e-9):.1%} of the layers searched, "
                f"drift {self._drift:.2f}, slowdown of the ranks "
                f"{', '.join(f'{s:.2f}' for s in self._slowdown_S)}."
            )

    def status(self) -> dict[str, Any]:
        """What was decided and moved since the start, and the last decisions."""
        return {
            "steps": self._window.steps,
            **self._totals,
            "deciding_us": self._time_us["deciding"],
            "moving_us": self._time_us["moving"],
            "swap_us": self._swap_us,
            "drift": self._drift,
            "slowdown_per_rank": self._slowdown_S,
            "recent": list(self._recent),
        }


def require_whole_batch(way: Way) -> None:
    """Raises BalancerError if a rank sees only its own tokens in this way of exchange."""
    if way == "all_reduce":
        raise BalancerError(
            "`online` records the load of the whole batch, and with this layout every rank sees "
            "only its own tokens. Use tensor parallelism, or data parallelism with vLLM's "
            "all-gather dispatch and `exchange` = auto; or leave `online` out."
        )


def record_load_into(layer: LayerBalancer, load_P: torch.Tensor) -> None:
    """Makes the layer's routing add each batch to `load_P` (int32 [P]) instead of vLLM's load."""
    always = torch.ones((), dtype=torch.bool, device=load_P.device)
    layer.tables = replace(layer.tables, load_P=load_P, record_enabled=always)
