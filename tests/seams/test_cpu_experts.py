"""vLLM's own CPU kernels behind the seam: the ranks' sums are the layer with all its experts.

In every number format that is promised, with the matrix units of this processor and without, with
biases, with an activation of gpt-oss, and with replicas.
"""

import pytest
import torch
from moe_configs import moe_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FUSED_MOE_UNQUANTIZED_CONFIG,
    biased_moe_quant_config,
)
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import (
    CPUUnquantizedExperts,
    X86CPUUnquantizedExperts,
)
from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEKernel
from vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep import (
    MoEPrepareAndFinalizeNoDPEPModular,
)

from vllm_balance import seams
from vllm_balance.experts.local_pairs import LocalPairExperts
from vllm_balance.seams.cpu import CPU_SEAMS, EXPERTS

NUM_EXPERTS, TOP_K, HIDDEN, INNER, TOKENS = 8, 3, 64, 96, 50
REPLICAS = torch.tensor([5, 1, 0, 3, 7, 6, 2, 4, 5, 0])
"""The expert in each of ten slots, five on each of two ranks; 0 and 5 have two replicas."""
# Sums over 64 and 96 numbers of about 1, rounded to the format's bits in between.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
KERNELS = [
    (CPUUnquantizedExperts, torch.float32),
    (CPUUnquantizedExperts, torch.bfloat16),
    (CPUUnquantizedExperts, torch.float16),
    (X86CPUUnquantizedExperts, torch.bfloat16),
]


class Layer:
    """Weights in checkpoint order, and kernels over those of some slots."""

    def __init__(self, experts_cls, dtype, activation, *, biased: bool) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

        self.experts_cls, self.dtype, self.activation = experts_cls, dtype, activation
        self.w13, self.w2 = draw(NUM_EXPERTS, 2 * INNER, HIDDEN), draw(NUM_EXPERTS, HIDDEN, INNER)
        self.biases = (draw(NUM_EXPERTS, 2 * INNER), draw(NUM_EXPERTS, HIDDEN)) if biased else None
        self.hidden_TH = draw(TOKENS, HIDDEN) * HIDDEN**0.5
        self.weights_TK = torch.rand(TOKENS, TOP_K, generator=generator)
        self.ids_TK = torch.rand(TOKENS, NUM_EXPERTS, generator=generator).argsort(1)[:, :TOP_K]

    def run(self, slots: torch.Tensor, ids_TK: torch.Tensor, expert_map_P=None) -> torch.Tensor:
        """vLLM's kernel with the experts of these slots: this rank's share of the output."""
        quant_config = FUSED_MOE_UNQUANTIZED_CONFIG
        if self.biases is not None:
            quant_config = biased_moe_quant_config(*(bias[slots] for bias in self.biases))
        config = moe_config(
            slots=len(slots),
            local=len(slots),
            logical=NUM_EXPERTS,
            top_k=TOP_K,
            hidden=HIDDEN,
            inner=INNER,
            dtype=self.dtype,
            activation=self.activation,
        )
        kernel = FusedMoEKernel(
            MoEPrepareAndFinalizeNoDPEPModular(), self.experts_cls(config, quant_config)
        )
        weights = torch.nn.Module()
        weights.w13_weight = torch.nn.Parameter(self.w13[slots], requires_grad=False)
        weights.w2_weight = torch.nn.Parameter(self.w2[slots], requires_grad=False)
        weights.moe_config = config
        kernel.fused_experts.process_weights_after_loading(weights)
        if expert_map_P is not None:
            setattr(kernel.fused_experts, EXPERTS, LocalPairExperts(expert_map_P))
        return kernel.apply(
            self.hidden_TH,
            weights.w13_weight,
            weights.w2_weight,
            topk_ids=ids_TK.int(),
            topk_weights=self.weights_TK,
            activation=self.activation,
            global_num_experts=len(slots) if expert_map_P is None else len(expert_map_P),
            expert_map=expert_map_P,
            apply_router_weight_on_input=False,
        ).float()

    def reference(self) -> torch.Tensor:
        """The layer in float64, rounded nowhere."""
        out_TH = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)
        hidden_TH = self.hidden_TH.double()
        for expert in range(NUM_EXPERTS):
            rows = hidden_TH @ self.w13[expert].double().T
            if self.biases is not None:
                rows += self.biases[0][expert].double()
            rows = activated(rows, self.activation) @ self.w2[expert].double().T
            if self.biases is not None:
                rows += self.biases[1][expert].double()
            out_TH += rows * ((self.ids_TK == expert) * self.weights_TK).sum(1, keepdim=True)
        return out_TH.float()


def activated(rows: torch.Tensor, activation: MoEActivation) -> torch.Tensor:
    if activation is MoEActivation.SILU:
        gate, up = rows.chunk(2, dim=1)
        return torch.nn.functional.silu(gate) * up
    gate, up = rows[:, ::2].clamp(max=7.0), rows[:, 1::2].clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def on_ranks(layer: Layer) -> list[torch.Tensor]:
    """Each of two ranks' shares; experts with two replicas are used by token in turn."""
    place_E = [(expert == REPLICAS).nonzero()[:, 0] for expert in range(NUM_EXPERTS)]
    table_ER = torch.stack([slots[[0, -1]] for slots in place_E])
    physical_TK = table_ER[layer.ids_TK, torch.arange(TOKENS)[:, None] % 2]
    per_rank = len(REPLICAS) // 2
    shares = []
    for rank in range(2):
        own = slice(rank * per_rank, (rank + 1) * per_rank)
        expert_map_P = torch.full((len(REPLICAS),), -1, dtype=torch.int32)
        expert_map_P[own] = torch.arange(per_rank, dtype=torch.int32)
        shares.append(layer.run(REPLICAS[own], physical_TK, expert_map_P))
    return shares


@pytest.mark.parametrize("form", ["silu", "silu with biases", "gpt-oss"])
@pytest.mark.parametrize(
    ("experts_cls", "dtype"), KERNELS, ids=lambda value: getattr(value, "isa", str(value))
)
def test_ranks_add_up_to_the_layer(experts_cls, dtype, form):
    if not experts_cls._supports_current_device():
        pytest.skip("this processor has no AMX")
    if experts_cls is X86CPUUnquantizedExperts:
        assert torch.cpu._init_amx(), "Linux lets no process use AMX that did not ask"
    activation = MoEActivation.SWIGLUOAI if form == "gpt-oss" else MoEActivation.SILU
    layer = Layer(experts_cls, dtype, activation, biased=form != "silu")
    expected_TH = layer.reference()
    stock_TH = layer.run(torch.arange(NUM_EXPERTS), layer.ids_TK)
    assert (stock_TH - expected_TH).abs().max() < TOLERANCE[dtype] * expected_TH.abs().max()
    seams.install(CPU_SEAMS)
    shares = on_ranks(layer)
    assert all(share.abs().max() > 0 for share in shares)
    assert (sum(shares) - expected_TH).abs().max() < TOLERANCE[dtype] * expected_TH.abs().max()


def test_without_the_seam_ranks_read_foreign_ids_as_their_own():
    """What is mended; and the test above could fail."""
    layer = Layer(CPUUnquantizedExperts, torch.float32, MoEActivation.SILU, biased=False)
    ids_TK = layer.ids_TK % (NUM_EXPERTS // 2)
    expert_map_P = torch.tensor([-1] * 4 + [0, 1, 2, 3], dtype=torch.int32)
    foreign_TH = layer.run(torch.arange(4, 8), ids_TK, expert_map_P)
    assert foreign_TH.abs().max() > 0
    seams.install(CPU_SEAMS)
    assert (layer.run(torch.arange(4, 8), ids_TK, expert_map_P) == 0).all()
