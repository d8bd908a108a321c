"""What a policy with dynamic slots is: it moves tokens and says which experts to fetch for them."""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_balance.kernels.rebalance import Method, Rules, schedule
from vllm_balance.types import Demand, DynamicSlots, Schedule


class FetchingPolicy:
    """One schedule per batch and layer. Pure and deterministic, the same on every rank.

    The tokens of a schedule are put into slots by ``kernels.assign``: ``plan.split_ER`` over
    ``placement.logical_to_physical_ER``, by occurrence in the global batch.
    """

    name: ClassVar[str]
    method: ClassVar[Method]
    counts_decide: ClassVar[bool] = True

    def __init__(self, rules: Rules) -> None:
        self.rules = rules

    def schedule(self, demand: Demand, slots: DynamicSlots) -> Schedule:
        """The split, the fetches and the slots after the batch.

        Counts per source rank are used where they are given; where every rank sees all tokens,
        the batch is one source. Raises ValueError as ``kernels.rebalance.schedule`` does.
        """
        tokens_FE = demand.tokens_SE if demand.tokens_SE is not None else demand.tokens_E[None]
        return schedule(tokens_FE.to(torch.int32).contiguous(), slots, self.rules, self.method)
