"""The paper's even split: the tokens of every expert over all ranks, all experts everywhere.

With D dynamic slots per rank it is the hottest experts, as many as fit, that are everywhere; the
others stay at home. With a slot for every foreign expert it is the even split of the paper.
"""

from __future__ import annotations

from typing import ClassVar

from vllm_balance.kernels.rebalance import Method
from vllm_balance.routing.fetching import FetchingPolicy


class EvenSplitRouting(FetchingPolicy):
    """Spreads the hottest experts over all ranks, whether it pays or not."""

    name: ClassVar[str] = "even_split"
    method: ClassVar[Method] = Method.EVEN_SPLIT
