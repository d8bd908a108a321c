"""Guesses of the next layer's experts: what is sent."""

from bench import look_ahead


def test_every_load_has_prompts_of_its_own():
    loads = look_ahead.prompts(seed=1)
    flat = [prompt for load in loads for prompt in load]
    assert len(loads) == look_ahead.LOADS
    assert {len(load) for load in loads} == {look_ahead.AT_ONCE}
    assert len(set(flat)) == len(flat)
    assert all(len(set(prompt.split())) == 1 for prompt in flat)
