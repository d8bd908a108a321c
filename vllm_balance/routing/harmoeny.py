"""HarMoEny (arXiv 2506.12417) with another schedule: few large moves, fetches only where they pay.

Replicas that are in a slot already are used first, and the batch is left alone where the home ranks
are even or no move is worth a fetch. docs/harmoeny.md has the algorithm.
"""

from __future__ import annotations

from typing import ClassVar

from vllm_balance.kernels.rebalance import Method
from vllm_balance.routing.fetching import FetchingPolicy


class HarmoenyRouting(FetchingPolicy):
    """Least load of the busiest rank within the slots, with few fetches."""

    name: ClassVar[str] = "harmoeny"
    method: ClassVar[Method] = Method.HARMOENY
