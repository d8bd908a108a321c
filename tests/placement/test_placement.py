"""Every policy: valid placements, the same twice, refusals; GEM: descent and known optima."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_balance.cost import CostModel
from vllm_balance.errors import BalancerError
from vllm_balance.placement import PLACEMENT, Cluster, lower_bound_L, score_L
from vllm_balance.placement.gem import GemPlacement, coefficients, packed
from vllm_balance.placement.gem_r import GemReplicaPlacement, replicas_by_load
from vllm_balance.placement.score import step_times, step_times_with_one

TOKENS = CostModel(a_us=0, b_us=0, c_us=0, beta_us=1)
"""A rank that only computes: a microsecond per token."""
MIXED = CostModel(a_us=5, b_us=20, c_us=10, beta_us=1.5)
TILED = CostModel(a_us=5, b_us=20, c_us=0, beta_us=0.5, tile_us=7, tile_tokens=4)

TURNS = CostModel(
    a_us=5, b_us=20, c_us=0, beta_us=2, tile_us=4, tile_tokens=1, free_tokens=2, in_turn=True
)


def history(steps, layers, experts, seed=0, batch=60) -> np.ndarray:
    """Skewed counts, [steps, layers, experts]."""
    random = np.random.default_rng(seed)
    weight = random.permuted(np.tile(1 / np.arange(1, experts + 1), (layers, 1)), axis=1)
    return random.multinomial(batch, weight / weight.sum(1, keepdims=True), (steps, layers))


def cluster(num_ranks, model=MIXED, slow=1.3, num_redundant=0) -> Cluster:
    costs = (model.slowed(slow), *(model,) * (num_ranks - 1))
    return Cluster(costs=costs, num_redundant=num_redundant)


@pytest.mark.parametrize("name", PLACEMENT)
@pytest.mark.parametrize(("experts", "num_ranks", "redundant"), [(8, 4, 0), (12, 2, 0), (8, 4, 4)])
def test_placements_are_valid_and_repeatable(name, experts, num_ranks, redundant):
    if redundant and name in ("round_robin", "gem"):
        with pytest.raises(BalancerError, match="one copy"):
            PLACEMENT[name]().place(history(4, 3, 8), cluster(4, num_redundant=4))
        return
    counts, ranks = history(4, 3, experts), cluster(num_ranks, num_redundant=redundant)
    found_LP = PLACEMENT[name]().place(counts, ranks)
    assert found_LP.shape == (3, experts + redundant) and found_LP.dtype == np.int32
    for slots_P in found_LP:
        assert set(slots_P.tolist()) == set(range(experts))
    assert np.array_equal(found_LP, PLACEMENT[name]().place(counts, ranks))


@pytest.mark.parametrize("name", PLACEMENT)
def test_what_does_not_divide_or_is_no_history_is_refused(name):
    policy = PLACEMENT[name]()
    with pytest.raises(BalancerError, match="do not divide over 3 ranks"):
        policy.place(history(2, 1, 8), cluster(3))
    for bad in (np.zeros((2, 8), int), np.zeros((0, 1, 8), int), np.zeros((2, 1, 8))):
        with pytest.raises(BalancerError, match="needed are integers"):
            policy.place(bad, cluster(4))
    with pytest.raises(BalancerError, match="negative"):
        policy.place(np.full((2, 1, 8), -1), cluster(4))


def test_linear_and_round_robin_are_vllm_s():
    counts, ranks = history(1, 1, 6), cluster(2)
    assert PLACEMENT["linear"]().place(counts, ranks)[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert PLACEMENT["round_robin"]().place(counts, ranks)[0].tolist() == [0, 2, 4, 1, 3, 5]


def best_by_trying(counts_NE, ranks) -> float:
    """Least score over all placements without replicas of a small layer."""
    experts = range(counts_NE.shape[1])
    size = len(experts) // ranks.num_ranks

    def ways(left):
        if not left:
            yield ()
            return
        for chosen in itertools.combinations(left, size):
            for rest in ways([e for e in left if e not in chosen]):
                yield (*chosen, *rest)

    return min(
        step_times(counts_NE, np.array(way), ranks).max(1).sum() for way in ways(list(experts))
    )


@pytest.mark.parametrize("model", [TOKENS, MIXED, TILED, TURNS])
@pytest.mark.parametrize("seed", range(3))
def test_gem_finds_the_optimum_of_small_layers(model, seed):
    counts, ranks = history(5, 2, 6, seed), cluster(3, model)
    found_LP = GemPlacement().place(counts, ranks)
    best = [best_by_trying(counts[:, layer], ranks) for layer in range(2)]
    assert score_L(counts, found_LP, ranks) == pytest.approx(best, rel=1e-9)
    assert (lower_bound_L(counts, ranks) <= np.array(best) * (1 + 1e-9)).all()


def test_gem_gives_the_slow_rank_what_its_speed_allows():
    """60, 30, 30 and 0 tokens on ranks of speed 1/2 and 1: with 30 the slow one ends after 60 us,
    and the other after 90; with 60 it would end after 120."""
    counts = np.array([[[60, 30, 30, 0]]])
    ranks = Cluster(costs=(TOKENS.slowed(2), TOKENS))
    found_LP = GemPlacement().place(counts, ranks)
    assert score_L(counts, found_LP, ranks).tolist() == [90]
    assert set(found_LP[0, :2].tolist()) in ({1, 3}, {2, 3})


def test_gem_parts_experts_that_fire_together_where_averages_show_nothing():
    """All experts have the same mean; 0 and 1 fire in even steps, 2 and 3 in odd ones."""
    counts = np.zeros((8, 1, 4), np.int64)
    counts[::2, 0, :2] = counts[1::2, 0, 2:] = 10
    ranks = Cluster(costs=(TOKENS, TOKENS))
    found_LP = GemPlacement().place(counts, ranks)
    assert score_L(counts, found_LP, ranks).tolist() == [80]
    assert score_L(counts, PLACEMENT["linear"]().place(counts, ranks), ranks).tolist() == [160]
    assert lower_bound_L(counts, ranks).tolist() == pytest.approx([80], rel=1e-6)


@settings(max_examples=30)
@given(
    st.integers(0, 10**6), st.sampled_from([TOKENS, MIXED, TILED, TURNS]), st.sampled_from([2, 4])
)
def test_the_score_never_rises_and_is_the_placement_s(seed, model, num_ranks):
    from vllm_balance.placement.swap_search import descend

    counts, ranks = history(6, 1, 16, seed), cluster(num_ranks, model)
    rank_of_I = np.random.default_rng(seed).permutation(np.arange(16) // (16 // num_ranks))
    scores = np.full(500, np.nan)
    score, swaps = descend(counts[:, 0], rank_of_I, coefficients(ranks), scores)
    assert (np.diff(scores[: swaps + 1]) < 0).all() and scores[swaps] == score
    slots_LP = np.argsort(rank_of_I, kind="stable")[None]
    assert score_L(counts, slots_LP, ranks)[0] == pytest.approx(score, rel=1e-9)
    assert (np.bincount(rank_of_I) == 16 // num_ranks).all()


@settings(max_examples=20)
@given(
    st.integers(0, 10**6),
    st.sampled_from([MIXED, TILED, TURNS]),
    st.sampled_from(["even", "one"]),
    st.sampled_from([4, 40]),
)
def test_the_score_with_replicas_never_rises_and_is_the_placement_s(seed, model, split, steps):
    from vllm_balance.placement.replica_load import EVEN, ONE
    from vllm_balance.placement.replica_search import descend_replicas

    counts, ranks = history(steps, 1, 8, seed, batch=30), cluster(4, model, num_redundant=4)
    tokens_NE = counts[:, 0].astype(np.float64)
    slots_P = np.arange(12) % 8
    scores = np.full(500, np.nan)
    number = EVEN if split == "even" else ONE
    none, copy_P = np.empty(0), slots_P.copy()
    start, _ = descend_replicas(tokens_NE, copy_P, coefficients(ranks), number, 0, none)
    assert np.array_equal(copy_P, slots_P)
    assert start == pytest.approx(score_L(counts, slots_P[None], ranks, split)[0], rel=1e-9)
    score, made = descend_replicas(tokens_NE, slots_P, coefficients(ranks), number, 10**6, scores)
    assert (np.diff(scores[: made + 1]) < 0).all() and scores[made] == score
    assert score == pytest.approx(score_L(counts, slots_P[None], ranks, split)[0], rel=1e-9)
    assert set(slots_P.tolist()) == set(range(8))


@settings(max_examples=20)
@given(
    st.integers(0, 10**6), st.sampled_from([MIXED, TILED, TURNS]), st.sampled_from(["even", "one"])
)
def test_no_single_move_is_left_that_lowers_the_score_of_few_steps(seed, model, split):
    """Few enough that no move is given up; two copies on a rank to begin with."""
    from vllm_balance.placement.replica_load import EVEN, ONE
    from vllm_balance.placement.replica_search import descend_replicas

    counts, ranks = history(3, 1, 6, seed, batch=30), cluster(3, model, num_redundant=3)
    slots_P = np.array([0, 0, 1, 2, 2, 3, 4, 5, 1])
    number = EVEN if split == "even" else ONE
    score, _ = descend_replicas(
        counts[:, 0].astype(np.float64), slots_P, coefficients(ranks), number, 10**6, np.empty(0)
    )
    rank_P, moved = np.arange(9) // 3, []
    for p, q in itertools.combinations(range(9), 2):
        moved.append(slots_P.copy())
        moved[-1][[p, q]] = slots_P[[q, p]]
    for p, expert in itertools.product(range(9), range(6)):
        moved.append(slots_P.copy())
        moved[-1][p] = expert
    copies = [[np.bincount(rank_P[way_P == e]).max(initial=0) for e in range(6)] for way_P in moved]
    valid = np.array([way_P for way_P, most in zip(moved, copies, strict=True) if set(most) == {1}])
    tried_L = score_L(np.repeat(counts, len(valid), axis=1), valid, ranks, split)
    assert (tried_L >= score * (1 - 1e-6)).all()


@pytest.mark.parametrize("policy", [GemPlacement(), GemReplicaPlacement()])
@pytest.mark.parametrize("model", [MIXED, TILED, TURNS])
@pytest.mark.parametrize("seed", range(3))
def test_gem_is_never_worse_than_its_starts_and_never_below_the_bound(policy, model, seed):
    redundant = 4 * (policy.name == "gem_r")
    counts, ranks = history(8, 3, 16, seed, 200), cluster(4, model, num_redundant=redundant)
    linear_L, eplb_L = (
        score_L(counts, PLACEMENT[start]().place(counts, ranks), ranks)
        for start in ("linear", "eplb")
    )
    found_L = score_L(counts, policy.place(counts, ranks), ranks)
    assert (found_L <= linear_L).all() and (found_L < linear_L).any()
    assert (found_L <= eplb_L * (1 + 1e-9)).all() and (found_L < eplb_L).any()
    assert (lower_bound_L(counts, ranks) <= found_L * (1 + 1e-9)).all()


@pytest.mark.parametrize("policy", [GemPlacement(starts=0, kicks=0), GemReplicaPlacement(trials=0)])
def test_a_search_that_finds_nothing_keeps_eplb_s_placement(policy):
    """Equal ranks that only compute, and one step: packing by sums is hard to beat."""
    redundant = 4 * (policy.name == "gem_r")
    counts, ranks = history(1, 8, 16, 5, 900), cluster(4, TOKENS, 1.0, num_redundant=redundant)
    eplb_L = score_L(counts, PLACEMENT["eplb"]().place(counts, ranks), ranks)
    found_L = score_L(counts, policy.place(counts, ranks), ranks)
    assert (found_L <= eplb_L * (1 + 1e-9)).all()


def test_gem_r_repeats_the_expert_that_is_too_hot():
    """One expert with 90 of 120 tokens: shared by both ranks, each computes 60."""
    counts = np.array([[[90, 10, 10, 10]]])
    ranks = Cluster(costs=(TOKENS, TOKENS), num_redundant=2)
    found_LP = GemReplicaPlacement().place(counts, ranks)
    assert found_LP[0].tolist().count(0) == 2
    assert score_L(counts, found_LP, ranks)[0] == pytest.approx(60)


def test_gem_r_for_one_replica_per_expert_is_scored_as_served():
    counts = history(6, 2, 8, batch=40)
    ranks = cluster(4, num_redundant=4)
    one = GemReplicaPlacement(split="one").place(counts, ranks)
    even = GemReplicaPlacement(split="even").place(counts, ranks)
    assert score_L(counts, one, ranks, "one").sum() <= score_L(counts, even, ranks, "one").sum()


def test_one_replica_serves_all_tokens_on_the_rank_that_ends_first():
    """Expert 0 on both ranks; rank 0 also computes expert 1 and so rank 1 takes expert 0."""
    ranks = Cluster(costs=(TOKENS, TOKENS), num_redundant=1)
    counts_NE = np.array([[4, 5, 3]])
    assert step_times_with_one(counts_NE, np.array([0, 1, 0, 2]), ranks).tolist() == [[5, 7]]
    assert step_times(counts_NE, np.array([0, 1, 0, 2]), ranks).tolist() == [[7, 5]]


def test_layers_are_placed_independently_and_reported_once():
    counts, ranks = history(4, 5, 8), cluster(2)
    seen: list[int] = []
    found_LP = GemPlacement().place(counts, ranks, seen.append)
    assert sorted(seen) == list(range(5))
    alone_P = GemPlacement().place(counts[:, :1], ranks)[0]
    assert np.array_equal(found_LP[0], alone_P)


def test_starts_and_replica_counts():
    assert np.bincount(packed(history(3, 1, 12)[:, 0], cluster(3))).tolist() == [4, 4, 4]
    assert replicas_by_load(np.array([9.0, 4, 1]), 3, most=3).tolist() == [3, 2, 1]
    assert replicas_by_load(np.array([9.0, 4, 1]), 3, most=2).tolist() == [2, 2, 2]
    assert replicas_by_load(np.array([9.0, 4]), 3, most=2).sum() == 5


def test_the_bound_of_experts_in_turn_is_their_work():
    """Work 24, 48 and 72 on ranks of speed 1 and 1/2: 144 units, 3/2 of them per unit of time."""
    counts = np.array([[[2, 6, 10, 0]]])
    ranks = Cluster(costs=(TURNS.slowed(2), TURNS))
    assert lower_bound_L(counts, ranks) == pytest.approx([(144 + 5 + 5) / 1.5])


@pytest.mark.parametrize("model", [TOKENS, MIXED, TURNS])
def test_an_even_layer_on_equal_ranks_reaches_the_bound(model):
    counts = np.full((3, 2, 8), 7)
    ranks = cluster(4, model, slow=1.0)
    for name in ("linear", "gem"):
        found = score_L(counts, PLACEMENT[name]().place(counts, ranks), ranks)
        assert found == pytest.approx(lower_bound_L(counts, ranks), rel=1e-6)


def test_one_rank_no_tokens_and_one_expert_per_rank():
    for counts, ranks in (
        (history(3, 2, 4), cluster(1)),
        (np.zeros((3, 2, 4), np.int64), cluster(2)),
        (history(3, 2, 4), cluster(4)),
    ):
        found_LP = GemPlacement().place(counts, ranks)
        assert (np.sort(found_LP) == np.arange(4)).all()
        assert (lower_bound_L(counts, ranks) <= score_L(counts, found_LP, ranks) + 1e-6).all()
