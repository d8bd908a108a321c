"""FasterMoE's shadowing: hot experts on all ranks for this batch, if the model says that it pays.

Experts are tried from the hottest down. One is replicated on every rank, and its tokens are split
evenly, if that lowers the modelled time of the slowest rank: its tokens plus q for every expert it
must fetch (the broadcast is not hidden). The first that does not lower it ends the search, as in
FasterMoE (PPoPP 2022), which compares the busiest expert's time instead of the busiest rank's.
"""

from __future__ import annotations

from typing import ClassVar

from vllm_balance.kernels.rebalance import Method
from vllm_balance.routing.fetching import FetchingPolicy


class ShadowRouting(FetchingPolicy):
    """Replicates the hottest experts everywhere, as many as pay and fit."""

    name: ClassVar[str] = "shadow"
    method: ClassVar[Method] = Method.SHADOW
