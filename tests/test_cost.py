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
TURNS = CostModel(a_us=30, b_us=400, c_us=0, beta_us=0, tile_us=100, tile_tokens=1, free_tokens=2)
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
    found = fit(GRID, times(tiled), forms=(PLAIN, (32, 32)))
    assert found.model.tile_tokens == 32
    assert found.model.tile_us == pytest.approx(60, rel=0.02)
    assert fit(GRID, times(TRUE), forms=(PLAIN, (32, 32))).model.tile_tokens is None


def test_the_form_of_the_machine_is_found_again():
    mixed = [*GRID, *(np.array([n, 1, 1, 3 * n, 2]) for n in (2, 7, 20, 60))]
    for true, forms in ((TURNS, IN_TURN), (TRUE, (PLAIN,))):
        found = fit(mixed, np.array([true.of_experts(t) for t in mixed]))
        assert (found.model.tile_tokens, found.model.free_tokens) in forms
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
