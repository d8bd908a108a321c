"""Times of a rank's experts: closed forms, a measured curve found again, monotony."""

from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_balance.commands.profile_samples import ON_CORES, grid
from vllm_balance.cost import fit
from vllm_balance.model_shape import ModelShape
from vllm_balance.profiles import Curve, Point, Profile, RankProfile, Units
from vllm_balance.simulate import hardware, models
from vllm_balance.simulate.expert_times import (
    TABLE,
    ExpertTimes,
    measured,
    roofline,
    sharing,
)
from vllm_balance.simulate.machine_speed import AS_PROFILED, MachineSpeed

MODEL = models.load("deepseek-v3")
H100, _ = hardware.load("h100")
TIMES = roofline(MODEL, H100)


def of(times, tokens_P, ranks=1):
    return [each.tolist() for each in times.of(np.array([tokens_P], np.int32), ranks)]


def test_the_roofline_has_tempos_slopes():
    """14.8 us for an expert and 0.0945 us for a token: where its efficiencies are from."""
    one, two = of(TIMES, [1, 0])[0][0][0], of(TIMES, [1, 1])[0][0][0]
    assert two - one == pytest.approx(14.8, rel=0.01)
    few, many = of(TIMES, [4096])[0][0][0], of(TIMES, [8192])[0][0][0]
    assert (many - few) / 4096 == pytest.approx(0.0945, rel=0.01)
    assert TIMES.knee_tokens == pytest.approx(14.8 / 0.0945, rel=0.02)


def test_ranks_are_summed_on_their_own():
    time, activated, pairs = of(TIMES, [3, 0, 1, 5], ranks=2)
    assert activated == [[1, 2]] and pairs == [[3, 6]]
    assert time[0][0] == of(TIMES, [3])[0][0][0]
    assert time[0][1] == of(TIMES, [1, 5])[0][0][0]


def test_no_tokens_take_no_time():
    assert of(TIMES, [0, 0]) == [[[0.0]], [[0]], [[0]]]


def test_behind_the_table_the_slope_goes_on():
    end, far = of(TIMES, [TABLE])[0][0][0], of(TIMES, [3 * TABLE])[0][0][0]
    assert far == pytest.approx(3 * end, rel=0.02)


@given(st.lists(st.integers(0, 600), min_size=1, max_size=32), st.data())
def test_fewer_experts_are_never_slower(tokens_P, data):
    full = of(TIMES, tokens_P)[0][0][0]
    position = data.draw(st.integers(0, len(tokens_P) - 1))
    fewer = list(tokens_P)
    fewer[position] = data.draw(st.integers(0, tokens_P[position]))
    assert of(TIMES, fewer)[0][0][0] <= full + 1e-9


@given(st.integers(1, 8), st.integers(1, 8), st.lists(st.integers(0, 600), max_size=30))
def test_moving_an_experts_few_tokens_to_its_copy_is_faster(first, second, others_P):
    """One replica instead of two, same tokens: METRO's premise in the memory-bound regime. Together
    they are one tile of tokens."""
    together = of(TIMES, [first + second, 0, *others_P])[0][0][0]
    apart = of(TIMES, [first, second, *others_P])[0][0][0]
    assert together < apart or together == pytest.approx(apart, rel=1e-12)
    if max(others_P, default=0) <= 16:
        assert together < apart - 10


def test_the_slower_of_two_ranks_ends_alone():
    """100 us beside the other; what is left of 60 us then takes three quarters."""
    time_LS, alone_LS = np.array([[100.0, 160.0], [160.0, 100.0]]), 0.75
    assert sharing(time_LS, alone_LS * time_LS).tolist() == [[100.0, 145.0], [145.0, 100.0]]


def test_four_ranks_get_faster_with_each_that_is_done():
    """From full time by thirds of the difference to half of it."""
    found = sharing(np.array([[10.0, 20.0, 40.0, 30.0]]), np.array([[5.0, 10.0, 20.0, 15.0]]))
    steps = np.cumsum([10, 10 * (1 / 2 + 1 / 3), 10 * (1 / 2 + 1 / 6), 10 * 1 / 2])
    assert found[0].tolist() == pytest.approx(steps[[0, 1, 3, 2]])


@given(st.lists(st.tuples(st.floats(0, 1e4), st.floats(0.3, 1)), min_size=1, max_size=8))
def test_sharing_is_between_all_busy_and_alone(ranks):
    time_LS = np.array([[time for time, _ in ranks]])
    alone_LS = np.array([[time * share for time, share in ranks]])
    found_LS = sharing(time_LS, alone_LS)
    assert (found_LS <= time_LS * (1 + 1e-9)).all()
    assert (found_LS >= alone_LS * (1 - 1e-9)).all()
    assert sharing(time_LS[:, ::-1], alone_LS[:, ::-1]) == pytest.approx(found_LS[:, ::-1])
    first = time_LS.argmin()
    if len(ranks) > 1:
        assert found_LS[0, first] == pytest.approx(time_LS[0, first]), "the first is never alone"


def contended(profile):
    """The profile with each evenly loaded batch of 32 experts measured alone: a third of the time
    to stream is the other rank's doing."""
    points = [
        p for p in profile.ranks[0].points if p.tokens_E in [[n] * 32 for n in ON_CORES.coarse]
    ]
    times_faster = {point.tokens_E[0]: 1.5 if point.tokens_E[0] < 16 else 1 for point in points}
    alone = [
        point.model_copy(update={"time_us": point.time_us / times_faster[point.tokens_E[0]]})
        for point in points
    ]
    return profile.model_copy(update={"alone": alone})


def test_a_rank_that_streams_alone_is_faster_and_one_that_computes_is_not():
    profile = profile_of(lambda tokens: max(400.0, 100.0 + 100.0 * tokens))
    before, times = measured(profile), measured(contended(profile))
    for same in ([1, 1, 1, 1], [64, 0, 64, 64]):
        assert of(times, same, ranks=2)[0][0] == pytest.approx(of(before, same, ranks=2)[0][0])
    few = of(times, [1, 0, 1, 1], ranks=2)[0][0]
    assert few == pytest.approx([400, 400 + 400 / 1.5], rel=0.02)
    assert of(times, [1])[0][0] == pytest.approx([400 / 1.5], rel=0.02), "one rank has no other"


def test_products_of_a_slow_rank_end_alone():
    times = measured(contended(profile_of(lambda tokens: max(400.0, 100.0 + 100.0 * tokens))))
    found_N = times.slowest((1.0, 1.3), np.array([1, 64, 100_000]))
    assert found_N.tolist() == pytest.approx([1 + 0.3 / 1.5, 1.3, 1.3])
    assert times.slowest((1.2, 1.2), np.array([1])).tolist() == [1.2]
    assert TIMES.slowest((1.0, 1.3), np.array([1])).tolist() == [1.3], "GPUs share nothing"


def test_what_memory_takes_longer_for_ends_with_the_other_rank():
    """Twice as long with one token each, a tenth with 64: a rank that is alone has its memory to
    itself, but not a faster core."""
    before = measured(profile_of(lambda tokens: max(400.0, 100.0 + 100.0 * tokens)))
    assert before.on(AS_PROFILED) is before
    slow = before.on(MachineSpeed((1, 64), (2.2, 1.1)))
    for batch, longer in (([1, 1], 2.2), ([8, 8], 1.65), ([64, 64], 1.1), ([512, 512], 1.1)):
        expected = longer * of(before, batch, ranks=2)[0][0][0]
        assert of(slow, batch, ranks=2)[0][0] == pytest.approx([expected] * 2, rel=1e-3)
    few = of(slow, [1, 0, 1, 1], ranks=2)[0][0]
    assert few == pytest.approx([2.2 * 400, 2.2 * 400 + 1.1 * 400], rel=0.02)
    many = of(slow, [64, 0, 64, 64], ranks=2)[0][0]
    assert many == pytest.approx([1.1 * 6500, 2.2 * 6500], rel=0.02)
    products_N = slow.slowest((1.0, 1.3), np.array([1, 64]))
    assert products_N.tolist() == pytest.approx([1 + 0.3 / 2, 1.3])


def test_a_machine_whose_cores_are_slower_than_its_memory_is_slower_alone_too():
    before = measured(contended(profile_of(lambda tokens: max(400.0, 100.0 + 100.0 * tokens))))
    slow = before.on(MachineSpeed((1, 64), (1.2, 1.4)))
    assert slow.contention_N is not None and before.contention_N is not None
    assert (slow.contention_N == before.contention_N).all()
    assert of(slow, [1])[0][0] == pytest.approx([1.2 * 400 / 1.5], rel=0.02)
    assert slow.fixed_S2 == pytest.approx(1.2 * before.fixed_S2)


def varied_batches():
    """Many batches of many sizes."""
    random = np.random.default_rng(0)
    batches = [[n] * g for n in (1, 2, 4, 8, 16, 32, 64, 128) for g in (4, 16, 32)]
    return batches + [random.integers(1, 60, 24).tolist() for _ in range(6)]


def profile_of(time_of_one, batches=None, disturbed=lambda batch: 1.0):
    """A profile of a rank that serves one expert after the other."""
    points = [
        Point(tokens_E=batch, time_us=disturbed(batch) * sum(map(time_of_one, batch)), repeats=3)
        for batch in batches or varied_batches()
    ]
    found = fit(
        [np.array(point.tokens_E) for point in points], np.array([p.time_us for p in points])
    )
    shape = ModelShape(name="m", architecture="M", num_layers=1, num_experts=64, top_k=2,
                       hidden=64, inner=32, dtype="bfloat16")  # fmt: skip
    rank = RankProfile(rank=0, place="here", curve=Curve.of(found), points=points)
    return Profile(units=Units(), created=datetime.now(UTC), device="d",
                   versions={"vllm": "1", "torch": "1"}, shape=shape, ranks=[rank])  # fmt: skip


def profile_error(profile):
    """Median over points and ranks of the relative error of `measured`."""
    times = measured(profile)
    errors = []
    for row, rank in enumerate(profile.ranks):
        own = ExpertTimes(
            fixed_S2=times.fixed_S2[row : row + 1],
            stream_SN=times.stream_SN[row : row + 1],
            compute_SN=times.compute_SN[row : row + 1],
        )
        for point in rank.points:
            found, _, _ = own.of(np.array([point.tokens_E], np.int32), 1)
            errors.append(abs(float(found[0, 0]) / point.time_us - 1))
    return float(np.median(errors))


def test_a_measured_curve_is_found_again():
    def time_of_one(tokens):
        return max(400.0, 100.0 + 100.0 * tokens)

    profile = profile_of(time_of_one)
    times = measured(profile)
    assert profile_error(profile) < 0.01
    for tokens in (1, 2, 4, 8, 30, 100, 700):
        assert of(times, [tokens])[0][0][0] == pytest.approx(time_of_one(tokens), rel=0.05)
    assert times.knee_tokens == pytest.approx(4, rel=0.05)
    assert times.free_tokens == pytest.approx(3, rel=0.1)
    assert (np.diff(times.stream_SN[0]) >= -1e-9).all()


def test_the_cpu_of_the_catalogue_is_described_well():
    machine, profile = hardware.load("cpu-avx512")
    assert profile is not None and profile_error(profile) < 0.03
    assert measured(profile).knee_tokens == pytest.approx(4, abs=0.5)
    assert measured(profile).free_tokens == pytest.approx(2, abs=0.6)
    rough = roofline(models.load("qwen3-30b-a3b"), machine)
    assert rough.stream_SN[0, 1] == pytest.approx(measured(profile).stream_SN[0, 1], rel=0.1)
    assert rough.stream_SN[0, 64] == pytest.approx(measured(profile).stream_SN[0, 64], rel=0.1)


def test_the_few_points_with_hot_experts_do_not_make_a_token_free():
    """As measured once: the batches with more than 100 tokens of an expert were a quarter fast."""

    def time_of_one(tokens):
        return max(1600.0, 600.0 + 250.0 * tokens)

    batches = [[n] * 64 for n in ON_CORES.coarse if n * 64 <= ON_CORES.most_tokens]
    batches += grid(64, 7.0)
    times = measured(
        profile_of(time_of_one, batches, lambda batch: 0.75 if max(batch) > 100 else 1.0)
    )
    for few, many in ((64, 128), (128, 512)):
        slope = (times.stream_SN[0, many] - times.stream_SN[0, few]) / (many - few)
        assert 125 < slope < 260
