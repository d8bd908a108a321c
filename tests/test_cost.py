"""Fitting finds the curve again, also under noise and outliers, and refuses what it cannot use."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau

from vllm_balance.cost import (
    IN_TURN,
    PLAIN,
    CostModel,
    fit,
    free_of,
    knee_of,
)
from vllm_balance.errors import BalancerError

TRUE = CostModel(a_us=100, b_us=600, c_us=300, beta_us=20)
TURNS = CostModel(
    a_us=30, b_us=400, c_us=0, beta_us=0, tile_us=100, tile_tokens=1, free_tokens=2, in_turn=True
)
"""One core, whose experts hide two tokens each behind their own weights."""
GRID = [np.full(g, n) for g in (2, 8, 32) for n in (1, 4, 16, 24, 32, 48, 96, 192)]


def times(model: CostModel) -> np.ndarray:
    return np.array([model.of_experts(tokens_E) for tokens_E in GRID])


def test_time_is_the_larger_piece_and_an_idle_rank_costs_nothing():
    assert TRUE.of_experts(np.array([1, 0, 1])) == 100 + 2 * 600
    assert TRUE.of_experts(np.array([100, 100])) == 300 + 20 * 200
    assert TRUE.of_experts(np.array([0, 0])) == 0
    assert TRUE.knee_tokens == 30


def test_tiles_beyond_the_first_cost_extra():
    model = CostModel(a_us=1, b_us=10, c_us=0, beta_us=0.01, tile_us=3, tile_tokens=16)
    assert model.of_experts(np.array([16, 1])) == 21
    assert model.of_experts(np.array([17, 33])) == 21 + 3 * 3


def test_experts_in_turn_hide_nothing_behind_each_other():
    """Eight tokens for one of two experts cost what they cost, although the mean is below 4.5."""
    assert TURNS.of_experts(np.array([8, 1])) == 30 + 2 * 400 + 6 * 100
    assert TURNS.of_experts(np.array([2, 2])) == 30 + 2 * 400
    assert TURNS.further(np.array([0.5, 2.5, 10.0])).tolist() == [0, 0.5, 8]
    assert (TURNS.token_us, TURNS.knee_tokens) == (100, 4)
    assert knee_of([TURNS, TURNS.slowed(1.5)]) == pytest.approx(4)


def test_tokens_that_streaming_hides_cost_a_little_all_the_same():
    """Two batches that differ in nothing else are told apart. Of many tokens the first one's 420 us
    are enough for 10 * 80 + 20 of the 100 us that each takes."""
    some = replace(TURNS, beta_us=20, tile_us=80, free_tokens=10)
    assert some.of_experts(np.array([8, 1])) == 30 + 2 * 400 + 9 * 20
    assert some.of_experts(np.array([7, 1])) == 30 + 2 * 400 + 8 * 20
    assert some.of_experts(np.array([12, 1])) == 30 + 2 * 400 + 13 * 20 + 2 * 80
    assert (some.token_us, some.knee_tokens) == (100, 4.2)
    assert knee_of([some]) == pytest.approx(4.2) and free_of([some]) == pytest.approx(8.2)
    many = np.array([1000])
    assert some.of_experts(many) == pytest.approx(30 + 100 * (4.2 + 1000 - 8.2))


def test_tiles_in_turn_are_half_used_on_average():
    """Two tiles of 16 tokens for 900 us each beyond the first: what 7.5 tokens less would take."""
    tiled = replace(TURNS, beta_us=20, tile_us=900, tile_tokens=16, free_tokens=16)
    assert tiled.of_experts(np.array([40])) == 30 + 400 + 40 * 20 + 2 * 900
    assert tiled.of_experts(np.array([32, 33])) == 30 + 2 * 400 + 65 * 20 + 3 * 900
    token_us = 20 + 900 / 16
    assert free_of([tiled]) == pytest.approx((20 + 8.5 * 900 / 16) / token_us)
    linear = [tiled.knee_tokens + n - tiled.hidden_tokens for n in range(1601, 1617)]
    exact = [tiled.of_experts(np.array([n])) - 30 for n in range(1601, 1617)]
    assert np.mean(exact) == pytest.approx(token_us * np.mean(linear))


def test_free_tokens_are_those_of_ranks_that_all_compute_in_turn():
    other = replace(TURNS, free_tokens=5)
    assert free_of([TURNS]) == 2 and free_of([TURNS, other]) == 3.5
    tiled = replace(TRUE, tile_us=1.0, tile_tokens=16)
    for overlapping in (TRUE, tiled):
        assert free_of([overlapping]) is None and free_of([TURNS, overlapping]) is None


def test_a_slower_rank_takes_longer_everywhere():
    slow = TRUE.slowed(1.28)
    assert np.allclose(times(slow), 1.28 * times(TRUE), rtol=1e-12)


def test_exact_points_give_the_exact_curve():
    found = fit(GRID, times(TRUE), forms=(PLAIN,))
    assert np.allclose(times(found.model), times(TRUE), rtol=1e-3)
    assert found.model.knee_tokens == pytest.approx(30, rel=0.01)
    assert found.r2 > 0.9999
    assert len(found.residual_us_N) == len(GRID)


@pytest.mark.parametrize("seed", range(3))
def test_noise_and_outliers_move_the_curve_little(seed):
    random = np.random.default_rng(seed)
    noisy = times(TRUE) * np.exp(random.normal(0, 0.04, len(GRID)))
    noisy[random.permutation(len(GRID))[:4]] *= 2.5
    found = fit(GRID, noisy, forms=(PLAIN,))
    assert np.median(np.abs(times(found.model) / times(TRUE) - 1)) < 0.05
    assert found.median_relative_error < 0.08
    # 93 % of the pairs in the right order.
    assert kendalltau(times(found.model), times(TRUE)).statistic > 2 * 0.93 - 1


def test_the_tile_term_is_found_where_it_matters_and_left_out_elsewhere():
    tiled = CostModel(a_us=50, b_us=100, c_us=0, beta_us=0.1, tile_us=60, tile_tokens=32)
    found = fit(GRID, times(tiled), forms=(PLAIN, (32, 32, False)))
    assert found.model.tile_tokens == 32
    assert found.model.tile_us == pytest.approx(60, rel=0.02)
    assert fit(GRID, times(TRUE), forms=(PLAIN, (32, 32, False))).model.tile_tokens is None


def test_the_form_of_the_machine_is_found_again():
    mixed = [*GRID, *(np.array([n, 1, 1, 3 * n, 2]) for n in (2, 7, 20, 60))]
    paid = replace(TURNS, beta_us=20, tile_us=80, free_tokens=8)
    tiled = replace(TURNS, beta_us=20, tile_us=900, tile_tokens=16, free_tokens=16)
    for true, forms in ((TURNS, IN_TURN), (paid, IN_TURN), (tiled, IN_TURN), (TRUE, (PLAIN,))):
        found = fit(mixed, np.array([true.of_experts(t) for t in mixed]))
        own = found.model
        assert (own.tile_tokens, own.free_tokens, own.in_turn) in forms
        assert found.median_relative_error < 1e-3
        assert found.model.knee_tokens == pytest.approx(true.knee_tokens, rel=0.02)


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_times_that_are_no_times_are_refused(bad):
    measured = times(TRUE)
    measured[3] = bad
    with pytest.raises(BalancerError, match="positive"):
        fit(GRID, measured)


def test_too_few_or_equal_points_are_refused():
    with pytest.raises(BalancerError, match="at least 6"):
        fit(GRID[:5], times(TRUE)[:5])
    with pytest.raises(BalancerError, match="hardly differ"):
        fit([np.full(2, 3)] * 8, np.arange(1.0, 9.0))


@settings(max_examples=10)
@given(st.lists(st.floats(1e-3, 1e6), min_size=len(GRID), max_size=len(GRID)))
def test_any_positive_times_give_a_usable_curve(measured):
    if np.ptp(measured) == 0:
        measured[0] += 1
    model = fit(GRID, np.array(measured), forms=(PLAIN,)).model
    values = np.array([model.a_us, model.b_us, model.c_us, model.beta_us, model.tile_us])
    assert np.isfinite(values).all() and (values >= 0).all()
