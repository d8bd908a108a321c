"""When a few experts move, and when not: hand-made windows with known answers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student

from vllm_balance.cost import CostModel
from vllm_balance.errors import BalancerError
from vllm_balance.placement import Cluster, score_L
from vllm_balance.placement.online import (
    CERTAIN_T,
    LEAST_STEPS,
    MOST_LAYERS,
    PARTS,
    OnlineSettings,
    certain_slowdown_S,
    decide,
    drift,
)

PER_TOKEN = CostModel(a_us=0.0, b_us=0.0, c_us=0.0, beta_us=1.0)
EVEN = Cluster(costs=(PER_TOKEN, PER_TOKEN))
SETTINGS = OnlineSettings(horizon=100, max_swaps=4, hysteresis=0.0)
LINEAR_LP = np.arange(4, dtype=np.int32)[None, :]


def steady(*tokens_E: int, steps: int = 16) -> np.ndarray:
    """The same batch again and again, [N, 1, E]."""
    return np.tile(np.array(tokens_E, dtype=np.int32), (steps, 1, 1))


def test_two_busy_experts_on_one_rank_are_parted():
    decision = decide(steady(10, 10, 0, 0), LINEAR_LP, EVEN, SETTINGS, swap_us=1.0)
    assert decision.reason == "moved"
    assert decision.step_us == 20.0 and decision.gain_us == 10.0
    assert len(decision.swaps) == 1
    moved_P = decision.placement(LINEAR_LP)[0]
    assert sorted(moved_P) == [0, 1, 2, 3]
    assert {int(np.flatnonzero(moved_P == e)[0]) // 2 for e in (0, 1)} == {0, 1}
    assert LINEAR_LP.tolist() == [[0, 1, 2, 3]], "the placement was changed in place"


def test_a_slow_rank_gives_work_away():
    slow = Cluster(costs=(PER_TOKEN.slowed(1.5), PER_TOKEN))
    history_NLE = steady(10, 8, 8, 6)
    assert not decide(history_NLE, LINEAR_LP, EVEN, SETTINGS, swap_us=1000.0).swaps
    decision = decide(history_NLE, LINEAR_LP, slow, SETTINGS, swap_us=1.0)
    assert decision.swaps
    before, after = (
        score_L(history_NLE, placement, slow)[0] / 16
        for placement in (LINEAR_LP, decision.placement(LINEAR_LP))
    )
    assert before - after == pytest.approx(decision.gain_us)


def test_the_gain_within_the_horizon_must_exceed_the_cost_of_moving():
    """10 us per step over 100 steps: a swap may cost just under 1,000 us."""
    history_NLE = steady(10, 10, 0, 0)
    assert decide(history_NLE, LINEAR_LP, EVEN, SETTINGS, swap_us=999.0).swaps
    refused = decide(history_NLE, LINEAR_LP, EVEN, SETTINGS, swap_us=1000.0)
    assert not refused.swaps and "pays" in refused.reason
    longer = SETTINGS.model_copy(update={"horizon": 101})
    assert decide(history_NLE, LINEAR_LP, EVEN, longer, swap_us=1000.0).swaps


def test_a_gain_within_the_hysteresis_moves_nothing():
    history_NLE = steady(100, 98, 97, 101)
    least = SETTINGS.model_copy(update={"hysteresis": 0.02})
    assert decide(history_NLE, LINEAR_LP, EVEN, SETTINGS, swap_us=0.0).swaps == ()
    history_NLE = steady(102, 98, 96, 100)
    assert decide(history_NLE, LINEAR_LP, EVEN, SETTINGS, swap_us=0.0).swaps
    refused = decide(history_NLE, LINEAR_LP, EVEN, least, swap_us=0.0)
    assert not refused.swaps and "hysteresis" in refused.reason
    assert 0 < refused.gain_us < 0.02 * refused.step_us


def test_what_only_the_even_steps_show_moves_nothing():
    """Swaps are chosen on half of the window and judged on the other half."""
    history_NLE = steady(10, 10, 10, 10)
    history_NLE[::2] = [20, 20, 0, 0]
    assert not decide(history_NLE, LINEAR_LP, EVEN, SETTINGS, swap_us=0.0).swaps


def test_experts_that_fire_in_turn_are_left_together():
    history_NLE = np.zeros((16, 1, 4), np.int32)
    for step in range(16):
        history_NLE[step, 0, [0, 2] if step % 4 < 2 else [1, 3]] = 10
    assert not decide(history_NLE, LINEAR_LP, EVEN, SETTINGS, swap_us=0.0).swaps


def test_where_every_expert_is_streamed_there_is_nothing_to_gain():
    streams = CostModel(a_us=0.0, b_us=1000.0, c_us=0.0, beta_us=1.0)
    decision = decide(
        steady(3, 9, 1, 4), LINEAR_LP, Cluster(costs=(streams,) * 2), SETTINGS, swap_us=0.0
    )
    assert not decision.swaps and decision.gain_us == 0.0 and decision.step_us == 2000.0


def test_the_most_swaps_are_shared_by_all_layers_and_the_best_come_first():
    small, large = [4, 4, 0, 0], [40, 40, 0, 0]
    history_NLE = np.tile(np.array([small, large, small], dtype=np.int32), (16, 1, 1))
    placement_LP = np.tile(LINEAR_LP, (3, 1))
    one = SETTINGS.model_copy(update={"max_swaps": 1})
    decision = decide(history_NLE, placement_LP, EVEN, one, swap_us=0.0)
    assert [swap.layer for swap in decision.swaps] == [1]
    two = SETTINGS.model_copy(update={"max_swaps": 2})
    decision = decide(history_NLE, placement_LP, EVEN, two, swap_us=0.0)
    assert [swap.layer for swap in decision.swaps] == [1, 0]


def test_many_layers_are_searched_in_turn():
    layers = 2 * MOST_LAYERS + 1
    history_NLE = np.tile(np.array([10, 10, 0, 0], dtype=np.int32), (16, layers, 1))
    placement_LP = np.tile(LINEAR_LP, (layers, 1))
    settings = SETTINGS.model_copy(update={"max_swaps": layers})
    seen: list[int] = []
    for turn in range(3):
        decision = decide(history_NLE, placement_LP, EVEN, settings, swap_us=0.0, turn=turn)
        found = [swap.layer for swap in decision.swaps]
        assert len(found) <= MOST_LAYERS and decision.step_us == 20.0 * len(found)
        seen += found
        placement_LP = decision.placement(placement_LP)
    assert sorted(seen) == list(range(layers))


def test_too_few_steps_decide_nothing():
    history_NLE = steady(10, 10, 0, 0, steps=LEAST_STEPS - 1)
    decision = decide(history_NLE, LINEAR_LP, EVEN, SETTINGS, swap_us=0.0)
    assert not decision.swaps and "steps recorded" in decision.reason
    with pytest.raises(BalancerError, match="history"):
        decide(history_NLE[:0], LINEAR_LP, EVEN, SETTINGS, swap_us=0.0)


@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 4]), st.integers(1, 5))
def test_decisions_are_valid_repeatable_and_lower_the_score(seed, num_ranks, most):
    random = np.random.default_rng(seed)
    curve = CostModel(a_us=5.0, b_us=3.0, c_us=2.0, beta_us=0.7, tile_us=1.0, tile_tokens=16)
    speeds = 1 + random.random(num_ranks) / 2
    cluster = Cluster(costs=tuple(curve.slowed(float(s)) for s in speeds))
    history_NLE = random.poisson(random.gamma(0.5, 8, (1, 3, 16)), (20, 3, 16)).astype(np.int32)
    placement_LP = np.stack([random.permutation(16) for _ in range(3)]).astype(np.int32)
    settings = OnlineSettings(max_swaps=most, hysteresis=0.0)
    decision = decide(history_NLE, placement_LP, cluster, settings, swap_us=0.0)
    assert decision == decide(history_NLE, placement_LP, cluster, settings, swap_us=0.0)
    assert len(decision.swaps) <= most
    after_LP = decision.placement(placement_LP)
    assert (np.sort(after_LP) == np.arange(16)).all()
    odd = history_NLE[1::2]
    before, after = (score_L(odd, p, cluster).sum() / 10 for p in (placement_LP, after_LP))
    assert decision.step_us == pytest.approx(before)
    assert before - after == pytest.approx(decision.gain_us, abs=1e-9)
    for swap in decision.swaps:
        one, two = (slot // (16 // num_ranks) for slot in swap.slots)
        assert one != two and swap.gain_us > 0


def test_moving_again_and_again_comes_to_rest():
    random = np.random.default_rng(3)
    history_NLE = random.poisson(random.gamma(0.5, 8, (1, 2, 16)), (32, 2, 16)).astype(np.int32)
    placement_LP = np.tile(np.arange(16, dtype=np.int32), (2, 1))
    for _ in range(40):
        decision = decide(history_NLE, placement_LP, EVEN, SETTINGS, swap_us=1.0)
        if not decision.swaps:
            return
        placement_LP = decision.placement(placement_LP)
    raise AssertionError("it moves for ever on the same window")


def test_drift_is_the_share_of_the_load_that_moved_on():
    before = np.array([[10, 0], [5, 5]])
    assert drift(before, before) == 0.0
    assert drift(before, 7 * before) == 0.0
    assert drift(before, np.array([[0, 3], [5, 5]])) == 0.5
    assert drift(before, np.zeros((2, 2), int)) == 0.5


def test_a_rank_is_slower_if_the_parts_agree_and_else_as_the_median_rank():
    steady_MS = np.tile([1.2, 1.2, 1.8, 1.2], (PARTS, 1))
    assert certain_slowdown_S(steady_MS) == pytest.approx([1.2, 1.2, 1.8, 1.2])
    assert certain_slowdown_S(np.tile([1.0, 1.5], (PARTS, 1))) == pytest.approx([1.0, 1.5])
    disturbed_MS = np.tile([1.2, 1.2, 1.2, 1.2], (PARTS, 1))
    disturbed_MS[2:4, 1] = 9.0
    assert certain_slowdown_S(disturbed_MS) == pytest.approx([1.2] * 4)


def test_by_chance_a_rank_of_two_is_certain_once_in_a_hundred():
    assert student.ppf(0.995, PARTS - 1) == pytest.approx(CERTAIN_T, abs=1e-3)
    noise = np.random.default_rng(0).lognormal(0, 0.2, (2000, PARTS, 2))
    found = [certain_slowdown_S(slowdown_MS) for slowdown_MS in noise]
    assert 0.005 < np.mean([first != second for first, second in found]) < 0.02
