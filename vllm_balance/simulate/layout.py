"""How ranks share a model: tensor, data and expert parallelism as vLLM combines them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vllm_balance.errors import BalancerError

Dispatch = Literal["all_gather", "all_to_all"]
"""Data parallel only: every rank gets all tokens, or each rank the pairs of its experts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Experts are divided over all ranks; attention over the tensor-parallel ones."""

    tensor: int = 1
    data: int = 1
    dispatch: Dispatch = "all_gather"
    ranks_per_node: int | None = None
    """Larger or smaller nodes than the hardware file's."""

    def __post_init__(self) -> None:
        if min(self.tensor, self.data) < 1 or self.num_ranks < 2:
            raise BalancerError(
                f"Tensor parallelism {self.tensor} and data parallelism {self.data} make "
                f"{self.num_ranks} ranks; there is something to balance from 2 ranks on."
            )

    @property
    def num_ranks(self) -> int:
        return self.tensor * self.data
