"""The balanced layers of one worker together: what it does between steps, and what it reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from vllm_balance.balancer import LayerBalancer
from vllm_balance.initial_placement import VLLMS_OWN, Array
from vllm_balance.metrics import total


class FollowsSteps(Protocol):
    """What acts between the steps of a worker."""

    def after_step(self) -> None: ...

    def adopt(self, placement_LP: Array) -> int:
        """Moves the experts there, int32 [L, P]; how many slots have another one."""
        ...

    def forget(self) -> None:
        """Leaves out what was routed since the last step."""
        ...

    def counters_are_zero(self) -> None:
        """To be called when the layers' counters were set to zero."""
        ...

    def status(self) -> dict[str, Any]: ...


@dataclass(slots=True, kw_only=True)
class WorkerBalancer:
    """The balanced layers of one rank."""

    balancer: str
    rank: int
    placement: str = VLLMS_OWN
    """What decided where experts were loaded; "verified" behind it: every rank has checked it."""
    layers: list[LayerBalancer] = field(default_factory=list)
    huge_page_share: float | None = None
    """Of the bytes of expert weights, what lies in huge pages, where the worker asks for them."""
    online: FollowsSteps | None = None
    """What moves experts while serving, if anything does."""

    def after_step(self) -> None:
        """To be called on every rank after every step of the model."""
        if self.online is not None:
            self.online.after_step()

    def start_serving(self) -> None:
        """Forgets profiling and warm-up; to be called on every rank before the first request."""
        self.reset()
        if self.online is not None:
            self.online.forget()

    def reset(self) -> None:
        """Sets all counters to zero; what `online` says counts from the start on."""
        for layer in self.layers:
            layer.reset()
        if self.online is not None:
            self.online.counters_are_zero()

    def status(self, *, per_layer: bool = False) -> dict[str, Any]:
        """What this rank's balancer did since the start or the last reset."""
        layers = [layer.status() for layer in self.layers]
        summed = total([{k: v for k, v in layer.items() if k != "layer"} for layer in layers])
        first = self.layers[0]
        status: dict[str, Any] = {
            "balancer": self.balancer,
            "rank": self.rank,
            "placement": self.placement,
            "num_ranks": first.tables.num_ranks,
            "num_layers": len(layers),
            "num_logical_experts": first.tables.num_logical,
            "num_physical_experts": first.tables.num_physical,
            "exchange": first.way,
            "counts_are_global": first.way != "all_reduce" or first.policy.counts_decide,
            **summed,
            "stepped_aside": first.stepped_aside(summed),
        }
        if self.huge_page_share is not None:
            status["huge_page_share"] = self.huge_page_share
        if self.online is not None:
            status["online"] = self.online.status()
        if per_layer:
            status["layers"] = [
                own | layer.slots() | {"recent_experts_us": layer.recent_experts_us()}
                for own, layer in zip(layers, self.layers, strict=True)
            ]
        return status
