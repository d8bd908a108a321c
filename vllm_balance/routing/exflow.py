"""ExFlow's placement, from a map by inter-layer affinity: every expert has one copy, and stays."""

from __future__ import annotations

from typing import ClassVar

from vllm_balance.routing.gem import GemRouting


class ExflowRouting(GemRouting):
    """The copy that the map of `vllm-balance place --policy exflow` gives each expert."""

    name: ClassVar[str] = "exflow"
