"""Steps of a load: every token once, none over the budget, closed forms of single requests."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_balance.errors import BalancerError
from vllm_balance.simulate.serving import Load, schedule


def load(**changes):
    asked = {
        "concurrency": 1, "prompt_tokens": 5, "output_tokens": 3, "token_budget": 8,
        "max_steps": 100, "steady": False,
    }  # fmt: skip
    return Load(**{**asked, **changes})


def test_one_request():
    steps = schedule(load())
    assert steps.prefill_N.tolist() == [5, 0, 0]
    assert steps.decode_N.tolist() == [0, 1, 1]
    assert steps.sampled_N.tolist() == [1, 1, 1]
    # Token i looks at itself and the i tokens before it.
    assert steps.looks_N.tolist() == [1 + 2 + 3 + 4 + 5, 6, 7]
    assert steps.reads_N.tolist() == [5, 6, 7]
    assert (steps.arrived_R, steps.first_R, steps.last_R) == ([0], [0], [2])


def test_a_window_bounds_what_is_looked_at():
    steps = schedule(load(), window=2)
    assert steps.narrow_looks_N.tolist() == [1 + 2 + 2 + 2 + 2, 2, 2]
    assert steps.narrow_reads_N.tolist() == [5, 2, 2]
    assert steps.looks_N.tolist() == [15, 6, 7]


def test_a_long_prompt_is_cut_and_decoding_goes_first():
    steps = schedule(load(concurrency=2, prompt_tokens=6, output_tokens=4, token_budget=6))
    assert steps.prefill_N.tolist() == [6, 5, 1, 0, 0, 0]
    assert steps.decode_N.tolist() == [0, 1, 1, 2, 1, 1]


def test_the_first_request_of_a_burst_has_a_step_to_itself_and_the_others_wait_for_its_end():
    steps = schedule(load(concurrency=3, prompt_tokens=2, output_tokens=3, token_budget=64))
    assert steps.prefill_N.tolist() == [2, 4, 0, 0]
    assert steps.decode_N.tolist() == [0, 1, 3, 2]
    assert steps.arrived_R.tolist() == [0, 0, 0]
    assert steps.first_R.tolist() == [0, 1, 1]


@given(
    st.integers(1, 40),
    st.integers(1, 60),
    st.integers(1, 30),
    st.integers(0, 64),
    st.integers(0, 9),
)
def test_no_token_is_lost(concurrency, prompt, output, spare, seed):
    asked = load(
        concurrency=concurrency, prompt_tokens=prompt, output_tokens=output,
        token_budget=concurrency + spare, max_steps=10**6,
    )  # fmt: skip
    steps = schedule(asked, seed=seed)
    assert steps.prefill_N.sum() == concurrency * prompt
    assert steps.decode_N.sum() == concurrency * (output - 1)
    assert steps.sampled_N.sum() == concurrency * output
    assert steps.tokens_N.max() <= asked.token_budget
    assert len(steps.arrived_R) == concurrency
    every = prompt + output - 1
    assert steps.looks_N.sum() == concurrency * every * (every + 1) // 2


@given(st.integers(1, 30), st.integers(1, 40), st.integers(2, 30), st.integers(0, 5))
def test_a_steady_load_keeps_all_requests_in_flight(concurrency, prompt, output, seed):
    asked = load(
        concurrency=concurrency, prompt_tokens=prompt, output_tokens=output, steady=True,
        token_budget=2 * concurrency + prompt, max_steps=50,
    )  # fmt: skip
    steps = schedule(asked, seed=seed)
    assert len(steps.decode_N) == 50
    assert (steps.tokens_N <= asked.token_budget).all()
    assert (steps.tokens_N > 0).all()
    counted = steps.first_R >= 0
    assert (steps.arrived_R[counted] <= steps.first_R[counted]).all()
    assert (steps.first_R <= steps.last_R).all()


def test_steady_decoding_is_fed_at_the_rate_it_ends():
    steps = schedule(
        load(concurrency=512, prompt_tokens=64, output_tokens=128, token_budget=2048,
             max_steps=600, steady=True)
    )  # fmt: skip
    assert np.mean(steps.prefill_N / steps.decode_N) == pytest.approx(64 / 127, rel=0.05)


def test_impossible_loads_are_refused():
    with pytest.raises(BalancerError, match="at least one request"):
        load(output_tokens=0)
    with pytest.raises(BalancerError, match="raise the token budget"):
        load(concurrency=9)
