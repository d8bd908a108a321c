"""How a policy that needs the whole batch's counts gets them: three ways, chosen by the layout.

====================  ==============================================  ======================
way                   when                                            extra collectives
====================  ==============================================  ======================
``replicated``        tensor parallel: every rank holds all tokens    none
``after_gather``      data parallel with vLLM's all-gather dispatch:  none
                      ids are mapped after the gather
``all_reduce``        data parallel otherwise                         one of S * E integers
====================  ==============================================  ======================

On CPU, three or more tensor-parallel ranks, and two that are not known to be alike, take what the
first one's router chose (balancer.py): one more collective, of 2 * T * K integers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from vllm_balance.errors import BalancerError
from vllm_balance.kernels.rebalance import count
from vllm_balance.kernels.record import record_load

Way = Literal["replicated", "after_gather", "all_reduce"]

AllReduce = Callable[[torch.Tensor], torch.Tensor]
"""Sums a tensor over the expert-parallel ranks; may work in place."""


def way_of_exchange(
    *, data_parallel_size: int, gathers_tokens: bool, asked_for: str = "auto"
) -> Way:
    """The way for a layout.

    Args:
        gathers_tokens: the dispatch gives every rank all tokens (vLLM's allgather_reducescatter).
        asked_for: the setting ``exchange``.

    Raises:
        BalancerError: the layout does not have the way that was asked for.
    """
    if data_parallel_size == 1:
        if asked_for != "auto":
            raise BalancerError(
                f"`exchange` asks for {asked_for!r}, but tensor-parallel ranks hold all tokens and "
                f"exchange no counts. Leave `exchange` out, or use --data-parallel-size."
            )
        return "replicated"
    if asked_for == "after_gather" and not gathers_tokens:
        raise BalancerError(
            "`exchange` asks for 'after_gather', but this dispatch does not gather all tokens on "
            "every rank. Use --all2all-backend allgather_reducescatter, or `exchange` 'all_reduce' "
            "or 'auto'."
        )
    if gathers_tokens and asked_for != "all_reduce":
        return "after_gather"
    return "all_reduce"


def counts_per_rank(
    topk_ids_TK: torch.Tensor, *, num_logical: int, rank: int, num_ranks: int, all_reduce: AllReduce
) -> torch.Tensor:
    """(Token, choice) pairs of each expert on each rank, [S, E] int32; one all-reduce.

    Every rank fills its own row, so the sum is a gather of equal size on every rank, whatever the
    number of tokens. Ids (contiguous) outside 0 to E - 1 do not count; a rank without tokens takes
    part.
    """
    counts_SE = torch.zeros((num_ranks, num_logical), dtype=torch.int32, device=topk_ids_TK.device)
    if topk_ids_TK.is_cpu:
        counts_SE[rank] = count(topk_ids_TK, num_logical)
        return all_reduce(counts_SE)
    record_load(topk_ids_TK, num_physical=num_logical, load_P=counts_SE[rank], record_enabled=None)
    return all_reduce(counts_SE)
