"""Balancers with dynamic slots (HarMoEny and its baselines), and what their fetches cost.

The schedule is production's own (`FetchingPolicy.schedule`). A fetched expert's weights come over
the host link of its rank, one expert after the other. A GPU computes the experts that are there
meanwhile (`hidden`); a CPU's core copies and computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_balance.errors import BalancerError
from vllm_balance.fetch_cost import FetchCost
from vllm_balance.kernels.rebalance import Rules
from vllm_balance.routing import FETCHING, FetchingPolicy
from vllm_balance.simulate.hardware import Hardware
from vllm_balance.simulate.models import Model
from vllm_balance.types import Demand, DynamicSlots

Array = np.ndarray[Any, np.dtype[Any]]


def fetch_us(model: Model, hardware: Hardware) -> float:
    """Time to bring one expert from host memory. Raises BalancerError without a host link."""
    if hardware.host is None:
        raise BalancerError(
            f"{hardware.name} describes no host link, over which experts are fetched. Add [host] "
            f"to its file or choose a balancer without dynamic slots."
        )
    return hardware.host.latency.value + model.expert_bytes / hardware.host.bandwidth.per_us


def fetching_policy(
    name: str, model: Model, hardware: Hardware, knee_tokens: float, *, hidden: bool = False
) -> FetchingPolicy:
    """The policy with the threshold that production derives from the same rates: on GPUs it times
    plain products, which are not quantised, in place of the experts' kernel."""
    share = hardware.efficiency
    if hardware.experts == "together":
        peak = hardware.peak(model.wide_number).per_us * share.dense_compute.value
    else:
        peak = hardware.peak(model.expert_number).per_us * share.expert_compute.value
    bytes_per_s = model.expert_bytes / fetch_us(model, hardware) * 1e6
    cost = FetchCost.from_rates(
        num_weights=model.expert_weights,
        bytes_per_weight=model.expert_weight.value,
        flop_per_s=peak * 1e6,
        copy_bytes_per_s=bytes_per_s,
    )
    threshold = cost.threshold_tokens
    return FETCHING[name](
        Rules(
            threshold_tokens=threshold,
            fetch_tokens=0 if hidden else threshold,
            knee_tokens=knee_tokens,
        )
    )


@dataclass(slots=True, kw_only=True)
class FetchingDecider:
    """One balancer with dynamic slots in all simulated layers; the slots keep their contents."""

    policy: FetchingPolicy
    slots_L: list[DynamicSlots]

    @classmethod
    def of(
        cls, policy: FetchingPolicy, num_layers: int, num_experts: int, num_ranks: int, dynamic: int
    ) -> FetchingDecider:
        """With empty slots, `dynamic` of them on each rank."""
        empty = DynamicSlots.empty(
            num_logical=num_experts, num_ranks=num_ranks, num_dynamic=dynamic
        )
        return cls(policy=policy, slots_L=[empty] * num_layers)

    @property
    def num_ranks(self) -> int:
        """Expert-parallel ranks."""
        return self.slots_L[0].num_ranks

    def slots(self, ids_LTK: torch.Tensor) -> tuple[Array, Array]:
        """Pairs of each slot after scheduling a batch, int32 [L, P], and fetches, int [L, S].

        Raises:
            RuntimeError: a token was lost or doubled; the policy is broken.
        """
        state = self.slots_L[0]
        tokens_LP = np.zeros((len(self.slots_L), state.num_physical), np.int32)
        fetched_LS = np.zeros((len(self.slots_L), self.num_ranks), np.int64)
        for layer, ids_TK in enumerate(ids_LTK):
            tokens_E = torch.bincount(ids_TK.flatten(), minlength=state.num_logical).int()
            made = self.policy.schedule(Demand(tokens_E=tokens_E), self.slots_L[layer])
            self.slots_L[layer] = made.slots
            split_ER = made.plan.split_ER.numpy()
            used = split_ER > 0
            table_ER = made.placement.logical_to_physical_ER.numpy()
            np.add.at(tokens_LP[layer], table_ER[used], split_ER[used])
            fetched_LS[layer] = (made.fetch_SD.numpy() >= 0).sum(1)
        pairs = ids_LTK.shape[1] * ids_LTK.shape[2]
        if (tokens_LP.sum(1) != pairs).any():
            raise RuntimeError(
                f"{self.policy.name} scheduled {tokens_LP.sum(1).tolist()} pairs of {pairs}."
            )
        return tokens_LP, fetched_LS


def with_fetches(
    time_LS: Array, activated_LS: Array, fetched_LS: Array, each_us: float, *, hidden: bool = False
) -> Array:
    """Time of each rank with its fetches, [L, S].

    `hidden`: fetches run beside the experts that are there. The fetched ones are computed behind
    the last copy; each takes as long as the rank's mean expert.
    """
    copies_LS = fetched_LS * each_us
    if not hidden:
        return np.asarray(time_LS + copies_LS)
    late_LS = time_LS * fetched_LS / np.maximum(activated_LS, 1)
    return np.asarray(np.maximum(time_LS - late_LS, copies_LS) + late_LS)
