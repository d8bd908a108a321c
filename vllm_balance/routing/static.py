"""One copy of every expert, at its place: vLLM without redundant experts."""

from __future__ import annotations

from typing import ClassVar

from vllm_balance.routing.first_copy import FirstCopyRouting


class StaticRouting(FirstCopyRouting):
    """The only copy of each expert. Same as first_copy, on a placement without replicas."""

    name: ClassVar[str] = "static"
