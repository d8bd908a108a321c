"""Steps of a load: every token once, none over the budget, closed forms of single requests."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_balance.errors import BalancerError
from vllm_balance.simulate.serving import schedule
from vllm_balance.simulate.steady import cycle_steps
from vllm_balance.simulate.steps import Load


def load(**changes):
    asked = {
        "concurrency": 1, "prompt_tokens": 5, "output_tokens": 3, "token_budget": 8,
        "max_steps": 100, "steady": False,
    }  # fmt: skip
    return Load(**{**asked, **changes})


def mean(steps, name):
    """Over the steps of the load."""
    return float(np.average(getattr(steps, name), weights=steps.times_N))


def total(steps, name):
    return float((getattr(steps, name) * steps.times_N).sum())


def test_one_request():
    steps = schedule(load())
    assert steps.prefill_N.tolist() == [5, 0, 0]
    assert steps.decode_N.tolist() == [0, 1, 1]
    assert steps.sampled_N.tolist() == [1, 1, 1]
    # Token i looks at itself and the i tokens before it.
    assert steps.attended_N.tolist() == [1 + 2 + 3 + 4 + 5, 6, 7]
    assert steps.reads_N.tolist() == [5, 6, 7]
    assert (steps.arrived_R.tolist(), steps.first_R.tolist()) == ([0], [0])
    assert steps.times_N.tolist() == [1, 1, 1]


@pytest.mark.parametrize("steady", [False, True])
def test_an_engine_computes_a_long_prompt_alone_within_its_own_budget(steady):
    """20 tokens on one of 4 engines with 8 each: three steps, though 32 tokens would fit."""
    steps = schedule(load(prompt_tokens=20, output_tokens=1, token_budget=32, engines=4,
                          steady=steady))  # fmt: skip
    assert sorted(set(steps.prefill_N.tolist())) == [4, 8]
    assert steps.engine_prefill_N.tolist() == steps.prefill_N.tolist()
    assert cycle_steps(load(prompt_tokens=20, output_tokens=1, token_budget=32, engines=4)) == 3


def test_prompts_are_dealt_to_engines_whole_and_the_fullest_one_counts():
    """Five prompts on two engines: the first has a step to itself, then two on each."""
    steps = schedule(load(concurrency=5, output_tokens=2, token_budget=64, engines=2))
    assert steps.prefill_N.tolist() == [5, 20, 0]
    assert steps.engine_prefill_N.tolist() == [5, 10, 0]
    assert steps.decode_N.tolist() == [0, 1, 4]
    assert steps.prompt_attended_N.tolist() == [15, 30, 0]
    # The first request decodes beside two prompts on its engine; then each engine has two.
    assert steps.attended_N.tolist() == [15, 36, 12]
    assert steps.reads_N.tolist() == [5, 16, 12]


@settings(max_examples=60)
@given(
    st.integers(1, 8), st.integers(1, 40), st.integers(1, 60), st.integers(1, 30),
    st.integers(1, 40), st.integers(0, 9),
)  # fmt: skip
def test_no_engine_computes_more_than_its_own_budget(
    engines, concurrency, prompt, output, spare, seed
):
    """Decoding requests are dealt evenly."""
    budget = -(-concurrency // engines) + spare
    asked = load(concurrency=concurrency, prompt_tokens=prompt, output_tokens=output,
                 token_budget=budget * engines, engines=engines, steady=True,
                 max_steps=10**4)  # fmt: skip
    steps = schedule(asked, seed=seed)
    own_N = steps.engine_prefill_N + np.ceil(steps.decode_N / engines)
    assert own_N.max() <= budget
    assert (steps.engine_prefill_N <= steps.prefill_N).all()
    assert (steps.engine_prefill_N * engines >= steps.prefill_N).all()
    assert (steps.arrived_R <= steps.first_R).all() and len(steps.first_R)


def test_prompts_that_an_engine_has_no_room_for_wait_for_the_next_step():
    """Each of 8 engines takes one prompt of 7,300 tokens and a part of a second."""
    asked = load(concurrency=64, prompt_tokens=7300, output_tokens=1, token_budget=8 * 8192,
                 engines=8, steady=True)  # fmt: skip
    steps = schedule(asked)
    assert steps.engine_prefill_N.max() == 8192


def test_a_window_bounds_what_is_looked_at():
    steps = schedule(load(), window=2)
    assert steps.window_attended_N.tolist() == [1 + 2 + 2 + 2 + 2, 2, 2]
    assert steps.window_reads_N.tolist() == [5, 2, 2]
    assert steps.attended_N.tolist() == [15, 6, 7]


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


def test_a_request_that_follows_another_finds_the_next_step_running():
    """The first ends with step 2; step 3 is the second's, and the third is taken in step 4."""
    steps = schedule(load(concurrency=2, requests=3, prompt_tokens=2, token_budget=64))
    assert steps.prefill_N.tolist() == [2, 2, 0, 0, 2, 0, 0]
    assert steps.decode_N.tolist() == [0, 1, 2, 1, 0, 1, 1]
    assert (steps.arrived_R.tolist(), steps.first_R.tolist()) == ([0, 0, 3], [0, 1, 4])


def test_requests_one_at_a_time_wait_for_nobody():
    steps = schedule(load(requests=5, output_tokens=1))
    assert steps.prefill_N.tolist() == [5] * 5
    assert steps.arrived_R.tolist() == steps.first_R.tolist() == [0, 1, 2, 3, 4]


def test_prompts_of_two_engines_that_hold_one_each_alternate():
    """As measured with data parallelism: each waits for the other engine's step and then its own,
    and no step has two."""
    steps = schedule(load(concurrency=2, requests=12, prompt_tokens=500, output_tokens=1,
                          token_budget=4096, engines=2))  # fmt: skip
    assert steps.prefill_N.tolist() == steps.engine_prefill_N.tolist() == [500] * 12
    assert steps.first_R.tolist() == list(range(12))
    assert steps.arrived_R.tolist() == [0, *range(11)]


def loop_by_hand(asked, seed):
    """(decode, prefill) tokens of each step and (arrived, first) step of each request, by a client
    and engines that keep lists of single requests."""
    lengths = iter(zip(*(each.tolist() for each in asked.lengths(np.random.default_rng(seed))),
                       strict=True))  # fmt: skip
    engines = [[] for _ in range(asked.engines)]
    every, rows = [], []
    while True:
        now, busy = len(rows), any(engines)
        for _ in range(asked.concurrency - sum(map(len, engines))):
            if (each := next(lengths, None)) is not None:
                prompt, output = each
                request = {"left": prompt, "out": output, "came": now, "first": None,
                           "wait": busy}  # fmt: skip
                busy = True
                every.append(request)
                min(engines, key=len).append(request)
        if not any(engines):
            return rows, [(each["came"], each["first"]) for each in every]
        row = [0, 0]
        for requests in engines:
            room = asked.engine_budget - sum(not each["left"] for each in requests)
            for each in requests:
                if not each["left"]:
                    each["out"] -= 1
                    row[0] += 1
                elif each["came"] < now or not each["wait"]:
                    taken = min(max(room, 0), each["left"])
                    room -= taken
                    each["left"] -= taken
                    row[1] += taken
                    if not each["left"]:
                        each["first"] = now
                        each["out"] -= 1
            requests[:] = [each for each in requests if each["out"]]
        rows.append(tuple(row))


LOOPS = st.builds(
    lambda concurrency, more, engines, spare, **asked: load(
        concurrency=concurrency, requests=concurrency + more, engines=engines, max_steps=10**6,
        token_budget=engines * (-(-concurrency // engines) + spare), **asked),
    concurrency=st.integers(1, 20), more=st.integers(0, 40), engines=st.integers(1, 4),
    spare=st.integers(1, 64), prompt_tokens=st.integers(1, 60), output_tokens=st.integers(1, 20),
    length_spread=st.sampled_from([0.0, 0.5, 0.9]),
)  # fmt: skip


@settings(max_examples=100)
@given(LOOPS, st.integers(0, 9))
def test_a_loop_is_what_a_client_and_engines_of_single_requests_do(asked, seed):
    steps = schedule(asked, seed=seed)
    rows, requests = loop_by_hand(asked, seed)
    assert list(zip(steps.decode_N, steps.prefill_N, strict=True)) == rows
    assert sorted(zip(steps.arrived_R, steps.first_R, strict=True)) == sorted(requests)


@settings(max_examples=100)
@given(LOOPS, st.integers(0, 9))
def test_no_token_is_lost_and_no_limit_exceeded(asked, seed):
    steps = schedule(asked, seed=seed)
    prompt_R, output_R = asked.lengths(np.random.default_rng(seed))
    assert steps.prefill_N.sum() == prompt_R.sum()
    assert steps.decode_N.sum() == (output_R - 1).sum()
    assert steps.sampled_N.sum() == output_R.sum()
    assert steps.tokens_N.max() <= asked.token_budget
    assert len(steps.arrived_R) == asked.requests
    assert (steps.decode_N + (steps.prefill_N > 0)).max() <= asked.concurrency
    if asked.engines == 1:
        every_R = prompt_R + output_R - 1
        assert steps.attended_N.sum() == (every_R * (every_R + 1) // 2).sum()
    if not asked.length_spread:
        step_M = np.arange(len(steps.decode_N))[:, None]
        in_flight_MR = (steps.arrived_R <= step_M) & (step_M < steps.first_R + asked.output_tokens)
        assert in_flight_MR.sum(1).max() == asked.concurrency


def test_lengths_are_whole_numbers_from_both_ends_of_their_range():
    spread = load(requests=2000, prompt_tokens=5, output_tokens=2, length_spread=0.5)
    prompt_R, output_R = spread.lengths(np.random.default_rng(1))
    assert set(prompt_R.tolist()) == set(range(2, 9)) and set(output_R.tolist()) == {1, 2, 3}
    prompt_R, output_R = load(requests=9).lengths(np.random.default_rng(1))
    assert prompt_R.tolist() == [5] * 9 and output_R.tolist() == [3] * 9


def one_by_one(asked, num_steps, seed):
    """Mean (decode, prefill, looks) over the second half of so many steps, by a scheduler that
    keeps every request, begun with all prompts at once."""
    random = np.random.default_rng(seed)
    prompt, done = asked.prompt_tokens, asked.prompt_tokens + asked.output_tokens - 1
    computed = random.integers(0, done, asked.concurrency).tolist()
    queue = [i for i, tokens in enumerate(computed) if tokens < prompt]
    rows = []
    for _ in range(num_steps):
        decoding = [i for i, tokens in enumerate(computed) if tokens >= prompt]
        room, looks, prefill = asked.token_budget - len(decoding), 0, 0
        for i in decoding:
            computed[i] += 1
            looks += computed[i]
        while room and queue:
            taken = min(room, prompt - computed[queue[0]])
            looks += sum(range(computed[queue[0]] + 1, computed[queue[0]] + taken + 1))
            computed[queue[0]] += taken
            room, prefill = room - taken, prefill + taken
            if computed[queue[0]] == prompt:
                queue.pop(0)
        for i, tokens in enumerate(computed):
            if tokens == done:
                computed[i] = 0
                queue.append(i)
        rows.append((len(decoding), prefill, looks))
    return np.mean(rows[num_steps // 2 :], axis=0)


@pytest.mark.parametrize(
    ("concurrency", "prompt", "output", "budget"),
    [(20, 40, 10, 30), (20, 5, 40, 200), (8, 30, 2, 25), (12, 16, 16, 28), (3, 50, 20, 16)],
)
def test_the_steady_state_is_where_a_scheduler_of_single_requests_ends_up(
    concurrency, prompt, output, budget
):
    asked = load(concurrency=concurrency, prompt_tokens=prompt, output_tokens=output,
                 token_budget=budget, steady=True)  # fmt: skip
    expected = one_by_one(asked, 2000, seed=1)
    steps = schedule(asked)
    found = [mean(steps, name) for name in ("decode_N", "prefill_N", "attended_N")]
    assert found == pytest.approx(expected, rel=0.05)


def test_where_prompts_take_the_budget_most_requests_wait():
    """Of 8192 tokens in and 256 out a request needs 8447 of 2048 a step."""
    asked = load(concurrency=256, prompt_tokens=8192, output_tokens=256, token_budget=2048,
                 max_steps=16, steady=True)  # fmt: skip
    steps = schedule(asked)
    assert mean(steps, "sampled_N") == pytest.approx(2048 / 8447 * 256, rel=0.01)
    assert mean(steps, "tokens_N") == pytest.approx(2048)
    # By Little's law: a request takes as long as all go around; it decodes in 256 of the steps.
    waits_R = steps.first_R - steps.arrived_R
    assert waits_R.mean() + 256 == pytest.approx(256 * 8447 / 2048, rel=0.02)
    assert (steps.arrived_R < 0).any() and (steps.first_R >= 0).all()


def test_few_steps_stand_for_the_rare_ones_with_prompts_too():
    asked = load(concurrency=16, prompt_tokens=1024, output_tokens=1024, token_budget=16384,
                 max_steps=16, steady=True)  # fmt: skip
    steps = schedule(asked)
    assert len(steps.decode_N) <= 16 and len(steps.like_M) == cycle_steps(asked) == 1024
    assert total(steps, "prefill_N") == 16 * 1024
    assert total(steps, "decode_N") == 16 * 1023
    assert (steps.prefill_N > 0).any() and (steps.prefill_N == 0).any()
    assert steps.prefill_N[steps.prefill_N > 0].min() >= 1024


def test_answers_of_one_token_come_at_the_rate_of_prompts():
    asked = load(concurrency=64, prompt_tokens=1024, output_tokens=1, token_budget=2048,
                 max_steps=16, steady=True)  # fmt: skip
    steps = schedule(asked)
    assert set(steps.prefill_N) == {2048} and set(steps.decode_N) == {0}
    assert set(steps.sampled_N) == {2}


@settings(max_examples=50)
@given(
    st.integers(1, 30),
    st.integers(1, 40),
    st.integers(2, 30),
    st.integers(1, 80),
    st.integers(1, 20),
    st.integers(0, 5),
)
def test_a_cycle_with_room_for_all_holds_every_token_once(
    concurrency, prompt, output, window, most, seed
):
    asked = load(
        concurrency=concurrency, prompt_tokens=prompt, output_tokens=output, steady=True,
        token_budget=(concurrency + 1) * (prompt + 1), max_steps=most,
    )  # fmt: skip
    steps = schedule(asked, window=window, seed=seed)
    assert len(steps.decode_N) <= most
    assert len(steps.like_M) == output
    every = np.arange(1, prompt + output)
    assert total(steps, "prefill_N") == pytest.approx(concurrency * prompt)
    assert total(steps, "decode_N") == pytest.approx(concurrency * (output - 1))
    assert total(steps, "sampled_N") == pytest.approx(concurrency * output)
    assert total(steps, "attended_N") == pytest.approx(concurrency * every.sum())
    near = np.minimum(every, window).sum()
    assert total(steps, "window_attended_N") == pytest.approx(concurrency * near)
    assert len(steps.first_R) == concurrency and (steps.first_R == steps.arrived_R).all()


@given(st.integers(1, 30), st.integers(1, 40), st.integers(1, 30), st.integers(1, 50))
def test_no_step_of_a_steady_load_is_empty_or_over_the_budget(concurrency, prompt, output, spare):
    asked = load(concurrency=concurrency, prompt_tokens=prompt, output_tokens=output, steady=True,
                 token_budget=concurrency + spare, max_steps=12)  # fmt: skip
    steps = schedule(asked)
    assert (steps.tokens_N <= asked.token_budget + 1e-9).all() and (steps.tokens_N > 0).all()
    whole_N2 = steps.whole_N2
    assert (whole_N2 >= 0).all() and (whole_N2.sum(1) <= asked.token_budget).all()
    assert steps.times_N.sum() == len(steps.like_M) and (steps.times_N > 0).all()
    assert (steps.arrived_R <= steps.first_R).all()


def test_a_seed_decides_where_requests_are():
    asked = load(concurrency=40, prompt_tokens=64, output_tokens=128, token_budget=256,
                 max_steps=600, steady=True)  # fmt: skip
    once, again, other = (schedule(asked, seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(once.like_M, again.like_M)
    assert np.array_equal(once.decode_N, again.decode_N)
    assert not np.array_equal(once.arrived_R, other.arrived_R)


def test_impossible_loads_are_refused():
    with pytest.raises(BalancerError, match="at least one request"):
        load(output_tokens=0)
    with pytest.raises(BalancerError, match="raise the token budget"):
        load(concurrency=9)
    with pytest.raises(BalancerError, match="2 requests in flight were asked for, and 1 in all"):
        load(concurrency=2, requests=1)
    with pytest.raises(BalancerError, match="from 0 to below 1; got 1"):
        load(length_spread=1.0)
    for changes in ({"requests": 9}, {"length_spread": 0.5}):
        with pytest.raises(BalancerError, match="A steady load has no end"):
            load(steady=True, **changes)
