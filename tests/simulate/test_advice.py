"""The choice between candidates, and what keeps an SLO."""

import math
import re
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from vllm_balance.config import parse
from vllm_balance.errors import BalancerError
from vllm_balance.kernels.limits import MAX_EXPERTS, MAX_PHYSICAL, MAX_RANKS
from vllm_balance.replay_rows import ReplaySettings
from vllm_balance.simulate import Layout, hardware, models, skewed
from vllm_balance.simulate.advice import (
    MAP,
    Advice,
    Candidate,
    Question,
    _arm,
    _cheapest_of_the_best,
    advise,
    candidates,
    flags_of,
    host_bytes,
    left_out,
    settings_of,
)
from vllm_balance.simulate.slo_search import most_within

OSS = models.load("gpt-oss-20b")
MODEL = OSS.model_copy(update={"support": "eplb"})
"""Few experts and layers, as if vLLM's EPLB supported it."""
TRAFFIC = skewed(ReplaySettings(zipf=0.5, seed=1, rows=2048), MODEL, 1)


@dataclass(frozen=True)
class Made:
    """As much of an outcome as the choice looks at."""

    tokens_per_s: float
    redundant_bytes: float


def candidate(name, tokens_per_s, gigabytes):
    return Candidate(balancer=name, redundancy=1.0, concurrency=1,
                     outcome=Made(tokens_per_s, gigabytes * 1e9))  # fmt: skip


def question(machine="h20", **changes):
    asked = {
        "model": MODEL, "hardware": hardware.load(machine)[0], "layout": Layout(data=8),
        "prompt_tokens": 64, "output_tokens": 64,
        "traffic": lambda: (TRAFFIC.fresh(), TRAFFIC.fresh()),
    }  # fmt: skip
    return Question(**{**asked, **changes})


def test_memory_decides_between_equals():
    found = (candidate("static", 90, 0), candidate("a", 100, 4), candidate("b", 99.5, 2))
    assert _cheapest_of_the_best(found).balancer == "b"
    assert _cheapest_of_the_best((candidate("static", 99.5, 0), *found)).balancer == "static"


@pytest.mark.parametrize(("gain", "error", "worth"), [(0.05, 0.04, True), (0.05, 0.06, False)])
def test_a_gain_within_the_error_is_none(gain, error, worth):
    best = candidate("metro", 1, 1)
    band = (gain - error, gain + error)
    made = Advice(candidates=(), left_out={}, best=best, static_rate=1.0, gain=gain, band=band)
    assert made.worth_it is worth


def test_a_little_of_tpot_is_much_throughput_where_an_slo_decides_the_requests():
    """The band of a gain is of its TPOT: wider than the error where requests hardly slow a step."""
    asked = question(slo_tpot_us=8e3)
    made, exact = advise(asked, error=0.05), advise(asked, error=0.0)
    low, high = made.band
    assert exact.band == pytest.approx((exact.gain, exact.gain), abs=0.02)
    assert low < made.gain < high and high - low > 2 * 0.05 * (1 + made.gain)
    fixed = advise(question(concurrency=64), error=0.05)
    assert fixed.band == pytest.approx(((1 + fixed.gain) / 1.05 - 1, (1 + fixed.gain) / 0.95 - 1))


def uneven(**asked):
    """A load whose experts are so uneven that placing them makes steps shorter."""
    skew = skewed(ReplaySettings(zipf=2.0, seed=1, rows=2048), MODEL, 1)
    return question(traffic=lambda: (skew.fresh(), skew.fresh()), concurrency=1024, **asked)


def test_a_balancer_that_alone_keeps_the_slo_is_advised():
    free = advise(uneven(), error=0.0)
    static_us, best_us = (made.outcome.tpot_us for made in (free.candidates[0], free.best))
    assert best_us < 0.97 * static_us
    between = uneven(slo_tpot_us=(best_us + static_us) / 2)
    made = advise(between, error=0.0)
    assert made.static_misses and made.candidates[0].outcome is None and made.worth_it
    assert (made.best.balancer, made.gain) == (free.best.balancer, pytest.approx(free.gain))
    unsure = advise(between, error=0.5)
    assert unsure.band[0] <= 0 and not unsure.worth_it
    with pytest.raises(BalancerError, match="misses the SLO at 1,024 requests in flight, balanced"):
        advise(uneven(slo_tpot_us=best_us / 2), error=0.0)


def test_one_request_that_is_too_long_is_no_matter_of_weights():
    asked = question(prompt_tokens=10**8, concurrency=1)
    with pytest.raises(BalancerError, match=r"cache of one request of 100,000,064 tokens takes"):
        advise(asked, error=0.0)


def test_experts_wait_for_fetches_where_tokens_come_from_an_all_to_all():
    asked = {
        dispatch: question(
            model=models.load("qwen3-30b-a3b"), layout=Layout(data=8, dispatch=dispatch)
        )
        for dispatch in ("all_gather", "all_to_all")
    }
    fetching = candidate("harmoeny", 1, 0)
    flags = {name: flags_of(each, fetching) for name, each in asked.items()}
    assert flags == {
        "all_gather": ("--enforce-eager", "--moe-backend triton"),
        "all_to_all": ("--enforce-eager",),
    }


def test_candidates_are_what_a_server_accepts():
    """32 experts on 8 ranks: 36, 40 and 48 are 40 and 48; 2 and 8 slots on each of 8 ranks."""
    assert candidates(question()) == (
        ("static", 1.0),
        ("eplb", 1.0),
        ("gem", 1.0),
        *((name, ratio) for name in ("eplb", "first_copy", "metro") for ratio in (1.25, 1.5)),
        ("harmoeny", 1.5),
        ("harmoeny", 3.0),
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"layout": Layout(data=16)},
        {"hardware": hardware.load("h20")[0].model_copy(update={"host": None})},
    ],
)
def test_fetching_needs_a_host_link_and_one_node(changes):
    asked = question(**changes)
    names = {name for name, _ in candidates(asked)}
    assert names == {"static", "gem", "eplb", "first_copy", "metro"}
    (names,) = left_out(asked).values()
    assert names == ("harmoeny",)


def test_a_model_without_eplb_leaves_static_and_maps_without_copies():
    without = OSS.model_copy(update={"support": "no eplb"})
    made = advise(question(model=without, concurrency=8), error=0.0)
    assert [each.balancer for each in made.candidates] == ["static", "gem"] and made.best.outcome
    ((reason, names),) = made.left_out.items()
    assert "does not support EPLB for GptOssForCausalLM" in reason
    assert names == ("eplb", "first_copy", "metro", "harmoeny")


def test_a_model_whose_experts_are_loaded_at_once_leaves_static():
    made = advise(question(model=OSS, concurrency=8), error=0.0)
    assert [each.balancer for each in made.candidates] == ["static"]
    found = {name: reason for reason, names in made.left_out.items() for name in names}
    assert found.keys() == {"eplb", "gem", "first_copy", "metro", "harmoeny"}
    assert "loads all experts of GptOssForCausalLM at once" in found["gem"]


def many(**counts):
    return MODEL.with_counts(**counts)


@pytest.mark.parametrize(
    ("changes", "names", "reason"),
    [
        ({"model": many(num_experts=128), "layout": Layout(data=2 * MAX_RANKS)},
         {"eplb", "first_copy", "metro"}, f"take {MAX_RANKS} ranks and here are {2 * MAX_RANKS}"),
        ({"model": many(num_experts=MAX_PHYSICAL - 128)}, {"eplb", "first_copy", "metro"},
         f"take {MAX_PHYSICAL:,} physical experts"),
        ({"model": many(num_experts=MAX_EXPERTS + 64)}, {"metro"}, f"take {MAX_EXPERTS} experts"),
        ({"layout": Layout(data=32), "model": many(num_experts=64, top_k=8)}, set(), ""),
    ],
)  # fmt: skip
def test_nothing_is_advised_that_is_too_large_for_the_gpu_kernels(changes, names, reason):
    found = {
        why: set(which) for why, which in left_out(question(**changes)).items()
        if "kernels take" in why
    }  # fmt: skip
    assert set().union(*found.values()) >= names and (names or not found)
    assert not names or any(re.search(reason, why) and names <= which
                            for why, which in found.items())  # fmt: skip


def test_a_cpu_has_the_limit_of_vllms_eplb_alone():
    cpu = question("cpu-avx512", model=many(num_experts=2 * MAX_PHYSICAL), layout=Layout(tensor=2))
    ((reason, names),) = left_out(cpu).items()
    assert reason == "vLLM's EPLB takes 1,023 redundant experts and here are 1,024"
    assert names == ("eplb", "first_copy", "metro")
    assert not left_out(question("cpu-avx512", layout=Layout(tensor=2)))


def test_ranks_that_experts_do_not_divide_over_are_refused_with_those_that_do():
    qwen = models.load("qwen15-moe-fp32")
    with pytest.raises(BalancerError, match=r"60 experts, and 8 ranks.* one of 2, 3, 4, 5, 6\."):
        advise(question("v100-dgx1", model=qwen, concurrency=8), error=0.0)


def test_a_model_that_vllm_does_not_have_is_refused():
    with pytest.raises(BalancerError, match="no model of the architecture SwitchTransformers"):
        advise(question("v100-dgx1", model=models.load("switch-128"), concurrency=8), error=0.0)


@pytest.mark.parametrize(("data", "tensor"), [(8, 1), (1, 8)])
def test_a_step_takes_the_default_budget_of_each_engine(data, tensor):
    asked = question(layout=Layout(data=data, tensor=tensor))
    assert _arm(asked, "static", 1.0, 1).load.token_budget == 8192 * data


def test_more_requests_than_engines_run_are_refused_with_the_setting():
    with pytest.raises(BalancerError, match=r"1 engines of at most 1,024 each.*--max-num-seqs"):
        advise(question(layout=Layout(tensor=8), concurrency=1025), error=0.0)
    loose = question(layout=Layout(tensor=8), slo_tpot_us=1e9)
    assert advise(loose, error=0.0).candidates[0].concurrency == 1024


def test_answers_of_one_token_have_no_slo_and_miss_every_one():
    with pytest.raises(BalancerError, match="answers of one token were asked for"):
        advise(question(output_tokens=1, slo_tpot_us=1e6, concurrency=4), error=0.0)
    never = SimpleNamespace(tpot_us=math.nan)
    assert most_within(1e9, 64, lambda concurrency: never) == (0, None)


def test_a_candidate_that_fetches_takes_host_memory():
    asked = question()
    held = [host_bytes(asked, candidate(name, 1, 0)) for name in ("metro", "harmoeny")]
    assert held == [0, 24 * 32 * MODEL.expert_bytes]


@pytest.mark.parametrize("machine", ["h20", "cpu-avx512"])
def test_the_settings_of_every_candidate_are_accepted_and_mean_as_many_experts(machine):
    asked = question(machine, layout=Layout(tensor=2))
    for name, ratio in candidates(asked):
        settings = settings_of(asked, Candidate(balancer=name, redundancy=ratio, concurrency=0,
                                                outcome=None))  # fmt: skip
        config = parse({"name": name, **settings})
        assert config.map == (MAP if name == "gem" else None)
        extra = 2 * config.dynamic_slots if config.fetches else config.num_redundant_experts or 0
        assert (32 + extra) / 32 == ratio and extra % 2 == 0
        assert (config.knee_tokens is not None) == (name in ("metro", "harmoeny"))
        runs_in_turn = name == "metro" and machine == "cpu-avx512"
        assert (config.free_tokens is not None) == runs_in_turn


def test_more_requests_fit_into_a_looser_slo():
    tight, loose = (
        advise(question(slo_tpot_us=slo), error=0.0).candidates[0] for slo in (6e3, 9e3)
    )
    assert 0 < tight.concurrency < loose.concurrency
    assert tight.outcome.tpot_us <= 6e3 and loose.outcome.tpot_us <= 9e3
    assert tight.tokens_per_s < loose.tokens_per_s


class Curve:
    """A TPOT in us that rises steeply while experts become active, then straight."""

    def __init__(self):
        self.tried = []

    def __call__(self, concurrency):
        self.tried.append(concurrency)
        return SimpleNamespace(tpot_us=self.tpot_us(concurrency))

    @staticmethod
    def tpot_us(concurrency):
        return 1e4 * (2 - math.exp(-concurrency / 50)) + 5 * concurrency


@pytest.mark.parametrize("near", [0, 1, 900, 4096])
@pytest.mark.parametrize("slo_us", [10_500, 16_000, 25_000, 40_000])
def test_the_largest_concurrency_within_an_slo_is_found_to_one_percent_in_few_tries(slo_us, near):
    at = Curve()
    found, made = most_within(slo_us, 4096, at, near)
    assert at.tpot_us(found) <= slo_us < at.tpot_us(found + max(1, found // 100))
    assert made.tpot_us == at.tpot_us(found)
    assert len(set(at.tried)) == len(at.tried) <= 12


@pytest.mark.parametrize(
    ("slo_us", "most", "found"), [(5e4, 4096, 4096), (1e4, 4096, 0), (1, 0, 0)]
)
def test_an_slo_that_every_concurrency_keeps_or_none(slo_us, most, found):
    at = Curve()
    assert most_within(slo_us, most, at)[0] == found
    assert len(at.tried) <= 4


def test_more_requests_than_fit_are_refused_with_how_many_do():
    reason = r"1,000,000 requests in flight were asked for; [\d,]+ of 128 tokens fit on 8 ranks of"
    for slo_us in (None, 9e3):
        with pytest.raises(BalancerError, match=reason):
            advise(question(concurrency=10**6, slo_tpot_us=slo_us), error=0.0)


def test_an_slo_that_is_missed_names_the_requests_asked_for():
    with pytest.raises(
        BalancerError, match="misses the SLO at 64 requests in flight, balanced or not"
    ):
        advise(question(concurrency=64, slo_tpot_us=1.0), error=0.0)
    with pytest.raises(BalancerError, match="with the least batch"):
        advise(question(slo_tpot_us=1.0), error=0.0)


def test_a_question_needs_a_concurrency_or_an_slo():
    with pytest.raises(BalancerError, match="requests in flight, or an SLO"):
        advise(question(), error=0.0)
