"""Fetched experts behind those that are there, for kernels that take an expert map, as GPUs' do.

Such a kernel skips the pairs whose expert the map does not have. So a batch some of whose experts
are still on their way is computed in two calls with a map each, and the results are added: copies
run beside the first call (HarMoEny, arXiv 2506.12417, section 3.4).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_balance.experts.local_pairs import Arrivals

MappedKernel = Callable[[torch.Tensor], torch.Tensor]
"""Computes a batch [T, H] with an expert map int [P], local ids or -1: for each token, the weighted
sum over the choices that the map has. The output may lie in memory that the next call reuses."""


def as_they_arrive(
    arrivals: Arrivals, expert_map_P: torch.Tensor, kernel: MappedKernel
) -> torch.Tensor:
    """What one call of the kernel with the whole map returns, behind the copies of a layer.

    Waiting makes the computing stream wait, not the host.

    Args:
        expert_map_P: the local id of each physical expert, -1 for those of other ranks.
    """
    with arrivals.computing():
        pending = arrivals.pending()
        if not pending:
            return kernel(expert_map_P)
        is_late_P = torch.zeros_like(expert_map_P, dtype=torch.bool)
        for slot in pending:  # A tensor of them would be a copy that the host waits for.
            is_late_P |= expert_map_P == slot
        present_TH = kernel(expert_map_P.masked_fill(is_late_P, -1)).clone()
        arrivals.wait()
        # Into the memory of the second output: with some dispatches it must be that of all ranks.
        return kernel(expert_map_P.masked_fill(~is_late_P, -1)).add_(present_TH)
