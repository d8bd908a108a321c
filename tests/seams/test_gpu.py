"""vLLM's modular kernel with dynamic slots, as on a GPU: fetched experts behind those there.

All of vLLM's own code around its Triton kernel runs here; for the kernel itself, which needs a GPU,
stands a loop that does what it promises with an expert map.
"""

from types import SimpleNamespace

import pytest
import torch
from moe_configs import moe_config
from vllm.model_executor.layers.fused_moe import modular_kernel
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FUSED_MOE_UNQUANTIZED_CONFIG,
    FusedMoEQuantConfig,
)
from vllm.model_executor.layers.fused_moe.experts.marlin_moe import MarlinExperts
from vllm.model_executor.layers.fused_moe.experts.triton_moe import (
    TritonExperts,
    TritonWNA16Experts,
)
from vllm.model_executor.layers.fused_moe.prepare_finalize.naive_dp_ep import (
    MoEPrepareAndFinalizeNaiveDPEPModular,
)
from vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep import (
    MoEPrepareAndFinalizeNoDPEPModular,
)

from vllm_balance import seams
from vllm_balance.balancer import new_counters
from vllm_balance.config import BalancerConfig
from vllm_balance.experts.dynamic_slots import LayerSlots
from vllm_balance.experts.prefetch import Copy, SyncPrefetch
from vllm_balance.kernels.rebalance import Rules
from vllm_balance.routing import FETCHING, LayerTables
from vllm_balance.seams import slots as slots_seam
from vllm_balance.seams.gpu import ARRIVALS, GPU_SEAMS, computes_as_they_arrive
from vllm_balance.seams.slots import ModelSlots
from vllm_balance.slot_balancer import SlotBalancer
from vllm_balance.types import DynamicSlots

NUM_EXPERTS, NUM_RANKS, NUM_DYNAMIC, TOP_K, HIDDEN, INNER, TOKENS = 8, 2, 2, 2, 16, 12, 40
NUM_HOME = NUM_EXPERTS // NUM_RANKS
PER_RANK = NUM_HOME + NUM_DYNAMIC
NUM_PHYSICAL = NUM_RANKS * PER_RANK
BATCHES = 2 * NUM_RANKS * NUM_HOME
CONFIG = moe_config(
    slots=NUM_PHYSICAL,
    local=PER_RANK,
    logical=NUM_EXPERTS,
    top_k=TOP_K,
    hidden=HIDDEN,
    inner=INNER,
)


class LatePrefetch(SyncPrefetch):
    """A copying stream: what is started arrives when it is waited for."""

    def __init__(self, run) -> None:
        super().__init__(run)
        self.started: list[Copy] = []
        self.waits = 0

    def start(self, copies) -> None:
        self.started += copies

    def pending(self, layer: int) -> set[int]:
        return {copy.slot for copy in self.started}

    def wait(self, layer: int) -> None:
        self.waits += 1
        super().start(self.started)
        self.started = []


class Rank:
    """One rank's weights, vLLM's kernel over them, and what balances it."""

    def __init__(self, rank: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.w1_EIH = torch.randn(NUM_EXPERTS, 2 * INNER, HIDDEN, generator=generator)
        self.w2_EHI = torch.randn(NUM_EXPERTS, HIDDEN, INNER, generator=generator)
        home = slice(rank * NUM_HOME, (rank + 1) * NUM_HOME)
        self.w1, self.w2 = (
            torch.cat([whole[home], whole.new_full((NUM_DYNAMIC, *whole.shape[1:]), torch.nan)])
            for whole in (self.w1_EIH, self.w2_EHI)
        )
        self.expert_map_P = torch.full((NUM_PHYSICAL,), -1, dtype=torch.int32)
        self.expert_map_P[rank * PER_RANK : (rank + 1) * PER_RANK] = torch.arange(
            PER_RANK, dtype=torch.int32
        )
        self.kernel = modular_kernel.FusedMoEKernel(
            MoEPrepareAndFinalizeNoDPEPModular(),
            TritonExperts(CONFIG, FUSED_MOE_UNQUANTIZED_CONFIG),
        )
        self.kernel.fused_experts.apply = self.compute
        self.calls = 0
        self.prefetch = LatePrefetch(self.copy)
        dynamic = LayerSlots(
            layer=0,
            rank=rank,
            state=DynamicSlots.empty(
                num_logical=NUM_EXPERTS, num_ranks=NUM_RANKS, num_dynamic=NUM_DYNAMIC
            ),
            prefetch=self.prefetch,
            expert_bytes=1,
        )
        rules = Rules(threshold_tokens=4, fetch_tokens=0, knee_tokens=1.0)
        self.balancer = SlotBalancer(
            layer_name="layer",
            policy=FETCHING["harmoeny"](rules),
            tables=tables(),
            way="replicated",
            rank=rank,
            all_reduce=lambda tensor: tensor,
            dynamic=dynamic,
        )
        shared = object.__new__(ModelSlots)
        shared._runners = [self.runner()]
        shared._config = BalancerConfig(name="harmoeny")
        shared.connect([self.balancer], 1.0)

    def runner(self, **changes):
        """vLLM's runner, as far as this is about it."""
        method = SimpleNamespace(moe_kernel=self.kernel)
        experts = {"quant_method": method, "expert_map": self.expert_map_P, **changes}
        return SimpleNamespace(routed_experts=SimpleNamespace(**experts))

    def copy(self, copy: Copy) -> None:
        self.w1[copy.slot], self.w2[copy.slot] = self.w1_EIH[copy.expert], self.w2_EHI[copy.expert]

    def compute(self, *, output, hidden_states, w1, w2, topk_weights, topk_ids, expert_map, **_):
        """What vLLM's Triton experts write: the weighted sum over the experts in the map."""
        self.calls += 1
        local_TK = expert_map[topk_ids]
        output.zero_()
        for local in range(len(w1)):
            share_T = ((local_TK == local) * topk_weights).sum(1)
            rows_N = share_T.nonzero()[:, 0]
            rows_NH = mlp(hidden_states[rows_N], w1[local], w2[local])
            output[rows_N] += rows_NH * share_T[rows_N, None]

    def forward(self, hidden_TH, weights_TK, ids_TK) -> torch.Tensor:
        physical_TK = self.balancer.in_router(ids_TK, None)
        return self.kernel.apply(
            hidden_TH,
            self.w1,
            self.w2,
            topk_ids=physical_TK,
            topk_weights=weights_TK,
            activation=MoEActivation.SILU,
            global_num_experts=NUM_PHYSICAL,
            expert_map=self.expert_map_P,
            apply_router_weight_on_input=False,
        )


def mlp(rows_NH, w1_IH, w2_HI) -> torch.Tensor:
    gate, up = (rows_NH @ w1_IH.T).chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up @ w2_HI.T


def tables() -> LayerTables:
    return LayerTables(
        logical_to_physical_ER=torch.arange(NUM_EXPERTS)[:, None],
        num_replicas_E=torch.ones(NUM_EXPERTS, dtype=torch.int64),
        num_ranks=NUM_RANKS,
        num_physical=NUM_PHYSICAL,
        load_P=torch.zeros(NUM_PHYSICAL, dtype=torch.int32),
        record_enabled=torch.tensor(True),
        counters=new_counters(NUM_RANKS, torch.device("cpu")),
    )


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens that all use one expert, in each batch another of the ranks in turn, and any other."""
    generator = torch.Generator().manual_seed(seed)
    rank, turn = seed % NUM_RANKS, seed // NUM_RANKS
    hot = torch.full((TOKENS,), rank * NUM_HOME + turn % NUM_HOME)
    other = (hot + torch.randint(1, NUM_EXPERTS, (TOKENS,), generator=generator)) % NUM_EXPERTS
    hidden_TH = torch.randn(TOKENS, HIDDEN, generator=generator)
    weights_TK = torch.rand(TOKENS, TOP_K, generator=generator)
    return hidden_TH, weights_TK, torch.stack([hot, other], dim=1)


def dense(rank: Rank, hidden_TH, weights_TK, ids_TK) -> torch.Tensor:
    every_TEH = torch.stack(
        [mlp(hidden_TH, *pair) for pair in zip(rank.w1_EIH, rank.w2_EHI, strict=True)], dim=1
    )
    chosen_TKH = every_TEH[torch.arange(TOKENS)[:, None], ids_TK]
    return (chosen_TKH * weights_TK[..., None]).sum(1)


def test_ranks_add_up_to_the_dense_layer_while_slots_thrash():
    seams.install(GPU_SEAMS)
    ranks = [Rank(rank) for rank in range(NUM_RANKS)]
    for seed in range(BATCHES):
        of_batch = batch(seed)
        outputs = [rank.forward(*of_batch) for rank in ranks]
        assert torch.allclose(sum(outputs), dense(ranks[0], *of_batch), rtol=1e-4, atol=1e-4)
    for rank in ranks:
        counted = rank.balancer.dynamic.counted
        assert counted["fetches"] >= NUM_HOME and counted["evictions"] >= NUM_HOME - NUM_DYNAMIC
        # Two calls where something was under way, and each was waited for once.
        assert rank.calls == BATCHES + rank.prefetch.waits
        assert NUM_HOME <= rank.prefetch.waits <= counted["fetches"]


def test_without_the_seam_the_layer_would_compute_what_has_not_arrived():
    """The test above could fail."""
    ranks = [Rank(rank) for rank in range(NUM_RANKS)]
    assert any(rank.forward(*batch(0)).isnan().any() for rank in ranks)


def test_layers_whose_experts_wait_are_told_nothing():
    rank = Rank(0)
    assert getattr(rank.kernel.fused_experts, ARRIVALS) is rank.balancer.dynamic
    assert rank.balancer.experts_wait and computes_as_they_arrive(rank.runner())
    gathered = object.__new__(MoEPrepareAndFinalizeNaiveDPEPModular)
    rank.kernel.impl.prepare_finalize = gathered
    assert computes_as_they_arrive(rank.runner())
    rank.kernel.impl.prepare_finalize = SimpleNamespace()
    assert not computes_as_they_arrive(rank.runner()), "a dispatch that counts"


@pytest.mark.parametrize("experts", [MarlinExperts, TritonWNA16Experts])
def test_other_experts_wait_and_it_is_said(experts, monkeypatch):
    said = []
    monkeypatch.setattr(slots_seam, "_say", said.append)
    rank = Rank(0)
    shared = object.__new__(ModelSlots)
    shared._on_cpu, shared._runners = False, [rank.runner()]
    shared._config = BalancerConfig(name="harmoeny", threshold_tokens=9)
    as_set = "MoE balancer harmoeny: threshold q = 9 tokens, as set."
    assert shared.rules(1.0).fetch_tokens == 0 and said == [as_set]
    rank.kernel.impl.fused_experts = object.__new__(experts)
    assert shared.rules(1.0).fetch_tokens == 9
    text = said[-1]
    assert f"experts of 1 layers ({experts.__name__})" in text and "--moe-backend triton" in text
    said.clear()
    shared._config = BalancerConfig(name="harmoeny", threshold_tokens=9, prefetch="sync")
    rank.kernel.impl.fused_experts = object.__new__(TritonExperts)
    assert shared.rules(1.0).fetch_tokens == 9 and said == [as_set]


@pytest.mark.parametrize(
    ("quantised", "together"),
    [
        ({}, True),
        ({"per_act_token_quant": True}, False),
        ({"block_shape": [128, 128]}, False),
        ({"a2_scale": torch.ones(1)}, False),
    ],
)
def test_experts_whose_scale_depends_on_all_rows_are_computed_at_once(quantised, together):
    """FP8 with one dynamic scale per tensor: that of some experts' rows is another."""
    rank = Rank(0)
    scales = {"w1_scale": torch.ones(1), "w2_scale": torch.ones(1)}
    config = FusedMoEQuantConfig.make(torch.float8_e4m3fn, **scales, **quantised)
    rank.kernel.impl.fused_experts = TritonExperts(CONFIG, config)
    assert computes_as_they_arrive(rank.runner()) is not together


def test_a_layer_without_a_modular_kernel_or_map_waits():
    rank = Rank(0)
    assert not computes_as_they_arrive(rank.runner(expert_map=None))
    assert not computes_as_they_arrive(rank.runner(quant_method=SimpleNamespace(moe_kernel=None)))
