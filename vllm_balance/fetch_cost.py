"""When it pays to bring an expert to its tokens: the threshold q of HarMoEny.

An expert is worth a fetch if computing its tokens takes at least as long as copying its weights
(arXiv 2506.12417)::

    q = phi * d_type / (2 * beta)

phi is the device's arithmetic in FLOP/s, d_type the bytes of one weight, beta the copy's bytes/s.
An expert with W weights costs 2 * W operations per token and W * d_type bytes per fetch, so W drops
out: the bound is the same for two matrices and for the three of a gated expert. Where bytes and
operations are not in this ratio (scales that travel along, kernels with a fixed cost per token) the
same question is asked of the expert's own numbers: time of a fetch / time of a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vllm_balance.errors import BalancerError


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchCost:
    """What one expert costs to copy and one of its tokens to compute.

    Raises:
        BalancerError: a number is not positive and finite.
    """

    expert_bytes: int
    """Everything that a fetch copies: weights, and scales or zero points with them."""
    copy_bytes_per_s: float
    """Measured bandwidth from the host store into a slot, while the rank computes nothing else."""
    token_us: float
    """Time to compute one (token, choice) pair where the rank is compute-bound."""

    def __post_init__(self) -> None:
        values = (self.expert_bytes, self.copy_bytes_per_s, self.token_us)
        if not all(math.isfinite(value) and value > 0 for value in values):
            raise BalancerError(
                f"The threshold for fetching an expert needs positive numbers; measured were "
                f"{self.expert_bytes} bytes per expert, {self.copy_bytes_per_s:g} bytes/s and "
                f"{self.token_us:g} us per token. Measure again, or set threshold_tokens."
            )

    @property
    def fetch_us(self) -> float:
        """Time to copy one expert."""
        return self.expert_bytes / self.copy_bytes_per_s * 1e6

    @property
    def threshold_tokens(self) -> int:
        """q: fewest tokens whose computation takes as long as the fetch, at least 1."""
        return max(1, math.ceil(self.fetch_us / self.token_us - 1e-9))

    @classmethod
    def from_rates(
        cls,
        *,
        num_weights: int,
        bytes_per_weight: float,
        flop_per_s: float,
        copy_bytes_per_s: float,
    ) -> FetchCost:
        """From the device's rates, as the paper derives q.

        Args:
            num_weights: weights of one expert, all its matrices.
            bytes_per_weight: d_type, e.g. 2 for bfloat16 or 0.5 for 4 bits.
            flop_per_s: phi, measured on the kernel that computes experts.
            copy_bytes_per_s: beta.
        """
        return cls(
            expert_bytes=math.ceil(num_weights * bytes_per_weight),
            copy_bytes_per_s=copy_bytes_per_s,
            token_us=2e6 * num_weights / flop_per_s if flop_per_s > 0 else math.nan,
        )

    def __str__(self) -> str:
        """The threshold with its inputs, for the log at start."""
        return (
            f"threshold q = {self.threshold_tokens} tokens: a fetch of "
            f"{self.expert_bytes / 2**20:.1f} MiB at {self.copy_bytes_per_s / 1e9:.2f} GB/s takes "
            f"{self.fetch_us:.0f} us, a token {self.token_us:.2f} us"
        )

    def flop_per_s(self, num_weights: int) -> float:
        """phi of an expert with so many weights, as the kernel reaches it."""
        return 2e6 * num_weights / self.token_us
