"""The state of online placement on one rank: what is recorded, exchanged, moved and reported."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_balance.cost import CostModel
from vllm_balance.online import OnlinePlacement, Window
from vllm_balance.placement.online import PARTS, OnlineSettings

COST = CostModel(a_us=0.0, b_us=0.0, c_us=0.0, beta_us=1.0)
SETTINGS = OnlineSettings(interval=10, window=8, horizon=10**6, hysteresis=0.0)


class TwoRanks:
    """The other rank says what it is told to; weights are counted, not moved."""

    def __init__(self, noise: np.random.Generator | None = None) -> None:
        """`noise` draws the other rank's slowdown in each part of the window."""
        self.noise = noise
        self.gathered, self.moved = [], []

    def gather(self, own):
        self.gathered.append(own)
        other_M = np.ones(PARTS) if self.noise is None else self.noise.lognormal(0, 0.3, PARTS)
        return np.stack([own, [50.0, *other_M]])

    def from_first(self, decision):
        return decision

    def move(self, placement_LP):
        self.moved.append(placement_LP.copy())


class Rank:
    """One rank of two with two layers of four experts; expert e gets tokens_E[e] pairs a step."""

    def __init__(self, ranks: TwoRanks) -> None:
        self.layers = [SimpleNamespace(rank=0, experts=SimpleNamespace(kernel_ns=0))] * 2
        self.load_LP = torch.zeros((2, 4), dtype=torch.int32)
        self.reports: list[str] = []
        self.online = OnlinePlacement(
            settings=SETTINGS,
            costs=(COST, COST),
            layers=self.layers,
            load_LP=self.load_LP,
            placement_LP=np.tile(np.arange(4, dtype=np.int32), (2, 1)),
            ranks=ranks,
            swap_us=20.0,
            report=self.reports.append,
        )

    def step(self, *tokens_E: int, us_per_token: float = 1.0) -> None:
        load_P = np.array(tokens_E, np.int32)[self.online.placement_LP]
        self.load_LP += torch.from_numpy(load_P)
        self.layers[0].experts.kernel_ns += int(1e3 * us_per_token * load_P[0, :2].sum())
        self.online.after_step()


def test_it_moves_at_the_interval_and_follows_its_own_moves():
    ranks = TwoRanks()
    rank = Rank(ranks)
    for _ in range(9):
        rank.step(10, 10, 0, 0)
    assert not ranks.gathered
    rank.step(10, 10, 0, 0)
    assert len(ranks.gathered) == len(ranks.moved) == 1
    for slots_P in ranks.moved[0]:
        assert {int(np.flatnonzero(slots_P == e)[0]) // 2 for e in (0, 1)} == {0, 1}
    for _ in range(20):
        rank.step(10, 10, 0, 0)
    status = rank.online.status()
    assert (status["steps"], status["decisions"], status["moves"], status["swaps"]) == (30, 3, 1, 2)
    assert [entry["swaps"] for entry in status["recent"]] == [2, 0, 0]
    assert status["recent"][0]["gain_us"] == 20.0 and status["recent"][0]["step_us"] == 40.0
    assert len(rank.reports) == 1 and "2 swaps" in rank.reports[0]


def test_it_goes_on_from_a_placement_that_came_from_outside():
    ranks = TwoRanks()
    rank = Rank(ranks)
    there_LP = np.array([[2, 3, 0, 1], [0, 1, 2, 3]], np.int32)
    assert rank.online.adopt(there_LP) == 4
    (moved,) = ranks.moved
    np.testing.assert_array_equal(moved, there_LP)
    # Tokens of the slots are those of the experts that they hold now.
    for _ in range(10):
        rank.step(10, 10, 0, 0)
    status = rank.online.status()
    assert (status["moves"], status["swaps"], status["decisions"]) == (1, 2, 1)
    for slots_P in ranks.moved[1]:
        assert {int(np.flatnonzero(slots_P == e)[0]) // 2 for e in (0, 1)} == {0, 1}
    assert rank.online.adopt(rank.online.placement_LP) == 0


def test_the_slowest_measured_swap_counts():
    ranks = TwoRanks()
    rank = Rank(ranks)
    for _ in range(10):
        rank.step(1, 1, 1, 1)
    assert ranks.gathered[0][0] == 20.0
    assert rank.online.status()["recent"][0]["swap_us"] == 50.0


def test_a_rank_that_becomes_slow_is_noticed_and_relieved():
    ranks = TwoRanks()
    rank = Rank(ranks)
    for _ in range(10):
        rank.step(10, 7, 8, 9)
    assert not ranks.moved
    for _ in range(10):
        rank.step(10, 7, 8, 9, us_per_token=2.0)
    status = rank.online.status()
    assert status["slowdown_per_rank"][0] == pytest.approx(2.0)
    assert len(ranks.moved) == 1
    for slots_P in ranks.moved[0]:
        assert np.array([10, 7, 8, 9])[slots_P[:2]].sum() == 15


def test_equal_ranks_that_are_disturbed_by_chance_are_alike_and_nothing_moves():
    """By the mean over the window each of 20 decisions has the ranks several percent apart."""
    noise = np.random.default_rng(0)
    ranks = TwoRanks(noise)
    rank = Rank(ranks)
    for _ in range(200):
        rank.step(10, 7, 8, 9, us_per_token=noise.lognormal(0, 0.3))
    status = rank.online.status()
    apart = [abs(np.log(own[1:].mean())) for own in ranks.gathered]
    assert status["decisions"] == 20 and np.median(apart) > 0.05
    assert not ranks.moved
    for entry in status["recent"]:
        first, second = entry["slowdown_per_rank"]
        assert first == second


def test_a_rank_that_is_slow_beside_chance_is_noticed():
    noise = np.random.default_rng(1)
    ranks = TwoRanks(noise)
    rank = Rank(ranks)
    for _ in range(10):
        rank.step(10, 7, 8, 9, us_per_token=3.0 * noise.lognormal(0, 0.3))
    first, second = rank.online.status()["slowdown_per_rank"]
    assert first > 1.5 * second and len(ranks.moved) == 1


def test_idle_steps_are_none_and_drift_is_reported():
    rank = Rank(TwoRanks())
    for _ in range(5):
        rank.online.after_step()
    assert rank.online.status()["steps"] == 0
    for _ in range(10):
        rank.step(5, 0, 5, 0)
    assert rank.online.status()["drift"] == 0.0
    for _ in range(10):
        rank.step(0, 5, 0, 5)
    assert rank.online.status()["drift"] == 1.0


def test_counters_set_to_zero_do_not_make_time_run_backwards():
    rank = Rank(TwoRanks())
    for step in range(10):
        if step == 6:
            rank.layers[0].experts.kernel_ns = 0
            rank.online.counters_are_zero()
        rank.step(5, 5, 5, 5)
    assert rank.online.status()["slowdown_per_rank"][0] == pytest.approx(1.0)


def test_what_was_routed_before_serving_is_no_step():
    rank = Rank(TwoRanks())
    rank.load_LP += 7
    rank.layers[0].experts.kernel_ns = 10**9
    rank.online.forget()
    rank.online.after_step()
    assert rank.online.status()["steps"] == 0
    for _ in range(10):
        rank.step(5, 5, 5, 5)
    assert rank.online.status()["slowdown_per_rank"][0] == pytest.approx(1.0)


def window(steps: int) -> Window:
    found = Window(
        history_NLE=np.zeros((4, 1, 2), np.int32),
        own_NLP=np.zeros((4, 1, 1), np.int32),
        kernel_us_NL=np.zeros((4, 1)),
    )
    for step in range(steps):
        load = np.array([[step, 2 * step]], np.int32)
        found.add(load, load[:, :1], np.array([3.0 * step]))
    return found


@pytest.mark.parametrize("steps", [0, 1, 3, 4, 5, 11])
def test_the_window_keeps_the_last_steps_in_order(steps):
    kept = window(steps).in_order()[:, 0, 0].tolist()
    assert kept == list(range(steps))[-4:]


def test_slowdown_is_measured_over_modelled_time_of_steps_with_work():
    """Four steps for eight parts: those without any have the slowdown of all."""
    assert window(0).slowdown_M(COST).tolist() == [1.0] * PARTS
    assert window(1).slowdown_M(COST).tolist() == [1.0] * PARTS
    assert window(9).slowdown_M(COST) == pytest.approx([3.0] * PARTS)
