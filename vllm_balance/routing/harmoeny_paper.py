"""HarMoEny as published: Algorithm 2 of arXiv 2506.12417, with its ties settled.

Ties go to the lowest source, expert and rank. The paper lets a rank overwrite a slot while the
batch still runs; here a slot holds one expert per batch, so a rank keeps the D experts with most
tokens and the tokens of the others stay at home.
"""

from __future__ import annotations

from typing import ClassVar

from vllm_balance.kernels.rebalance import Method
from vllm_balance.routing.fetching import FetchingPolicy


class HarmoenyPaperRouting(FetchingPolicy):
    """From the busiest to the idlest rank, until the mean or the threshold stops it."""

    name: ClassVar[str] = "harmoeny_paper"
    method: ClassVar[Method] = Method.HARMOENY_PAPER
