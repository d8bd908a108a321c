"""The machine's own speed beside a load: timed on all ranks, compared with a profile."""

from contextlib import contextmanager
from itertools import count
from types import SimpleNamespace

import pytest

from bench import speed
from vllm_balance.commands.expert_probe import Timing
from vllm_balance.measurement import KernelTime
from vllm_balance.simulate import hardware
from vllm_balance.simulate.expert_times import measured

_, PROFILE = hardware.load("cpu-avx2")


def times_of(streaming, computing):
    """What a machine takes that is so much slower than the profile, in the two batches."""
    table = measured(PROFILE)
    return [
        KernelTime(
            activated=speed.EXPERTS,
            tokens_each=tokens,
            time_us=list(
                factor * (table.fixed_S2[:, 0] + speed.EXPERTS * table.stream_SN[:, tokens])
            ),
        )
        for tokens, factor in ((speed.STREAMING, streaming), (speed.COMPUTING, computing))
    ]


def test_both_batches_are_timed_on_every_rank_and_medians_kept(monkeypatch):
    asked, seen = [], iter([[5.0, 6.0], [50.0, 60.0], [9.0, 6.5], [51.0, 90.0], [4.0, 8.0],
                            [70.0, 61.0]])  # fmt: skip

    def measure(tokens_E):
        asked.append(tokens_E)
        return [Timing(time_us=time_us, repeats=3) for time_us in next(seen)]

    @contextmanager
    def probing(shape, isa, cores_S, num_local):
        assert (shape.hidden, shape.inner, shape.dtype, num_local) == (2048, 768, "float32", 16)
        yield SimpleNamespace(measure=measure)

    monkeypatch.setattr(speed, "probing", probing)
    with speed.watching(2, "float32") as watch:
        streaming, computing = watch.before()
    assert asked == [[1] * 16, [64] * 16] * 3
    assert (streaming.tokens_each, streaming.time_us) == (1, [5.0, 6.5])
    assert (computing.tokens_each, computing.time_us) == (64, [51.0, 61.0])
    assert speed.between([streaming], [computing])[0].time_us == [28.0, 33.75]


def test_a_look_behind_a_load_is_the_one_before_the_next_if_that_follows_at_once(monkeypatch):
    looks = count()
    monkeypatch.setattr(speed, "_timed", lambda probe: [next(looks)])
    watch = speed.Watch(probe=None)
    assert [watch.before(), watch.after(), watch.before(), watch.after()] == [[0], [1], [1], [2]]
    monkeypatch.setattr(speed, "FRESH_S", 0.0)
    assert watch.before() == [3]


def test_a_machine_is_compared_with_the_profile_and_looks_by_their_median():
    once = speed.against([times_of(1.5, 1.1)], PROFILE)
    assert once.tokens_K == (1, 64) and once.longer_K == pytest.approx((1.5, 1.1))
    looks = [times_of(*longer) for longer in ((1.5, 1.1), (1.2, 1.4), (3.0, 1.0))]
    assert speed.against(looks, PROFILE).longer_K == pytest.approx((1.5, 1.1))
