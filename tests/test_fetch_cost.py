"""The threshold q: the paper's formula, its generalisation, and what it refuses."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_balance.errors import BalancerError
from vllm_balance.fetch_cost import FetchCost
from vllm_balance.model_shape import ModelShape

QWEN = ModelShape(
    name="qwen",
    architecture="Qwen3MoeForCausalLM",
    num_layers=48,
    num_experts=128,
    top_k=8,
    hidden=2048,
    inner=768,
    dtype="bfloat16",
)


@given(
    st.integers(1, 10**9),
    st.sampled_from([0.5, 1, 2, 4]),
    st.floats(1e9, 1e15),
    st.floats(1e8, 1e12),
)
def test_q_is_phi_d_over_two_beta_whatever_the_size_of_the_expert(weights, width, phi, beta):
    cost = FetchCost.from_rates(
        num_weights=2 * weights, bytes_per_weight=width, flop_per_s=phi, copy_bytes_per_s=beta
    )
    exact = phi * width / (2 * beta)
    assert math.isclose(cost.fetch_us / cost.token_us, exact, rel_tol=1e-9)
    assert cost.threshold_tokens == max(1, math.ceil(exact - 1e-9)) or math.isclose(
        exact, round(exact), rel_tol=1e-9
    )


def test_a_v100_with_float32_experts():
    """14 TFLOP/s and 12 GB/s: 14e12 * 4 / 24e9 = 2333.3 tokens."""
    cost = FetchCost.from_rates(
        num_weights=10**7, bytes_per_weight=4, flop_per_s=14e12, copy_bytes_per_s=12e9
    )
    assert cost.threshold_tokens == 2334


def test_the_threshold_is_printed_with_its_inputs():
    weights = 3 * QWEN.hidden * QWEN.inner
    assert weights == 3 * 2048 * 768
    cost = FetchCost(expert_bytes=2 * weights, copy_bytes_per_s=2 * weights * 1e3, token_us=16.0)
    assert cost.fetch_us == 1000 and cost.threshold_tokens == 63
    assert str(cost) == (
        "threshold q = 63 tokens: a fetch of 9.0 MiB at 9.44 GB/s takes 1000 us, a token 16.00 us"
    )
    assert cost.flop_per_s(weights) == pytest.approx(2 * weights / 16e-6)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_what_was_not_measured_is_refused(bad):
    with pytest.raises(BalancerError, match="set threshold_tokens"):
        FetchCost(expert_bytes=100, copy_bytes_per_s=bad, token_us=1.0)
    with pytest.raises(BalancerError, match="positive numbers"):
        FetchCost(expert_bytes=100, copy_bytes_per_s=1e9, token_us=bad)
    with pytest.raises(BalancerError):
        FetchCost.from_rates(
            num_weights=8, bytes_per_weight=2, flop_per_s=0.0, copy_bytes_per_s=1e9
        )
