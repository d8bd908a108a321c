"""Published points and their predictions; the setup of a paper is the same for all of its rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np

from vllm_balance.kernels.metro import reference
from vllm_balance.replay_rows import Hot, ReplaySettings
from vllm_balance.simulate import (
    Arm,
    Layout,
    Load,
    Outcome,
    Traffic,
    hardware,
    models,
    simulate,
    skewed,
)
from vllm_balance.simulate.decisions import Decider
from vllm_balance.simulate.models import Model
from vllm_balance.simulate.run import decider_of
from vllm_balance.simulate.slo_search import most_within

Row = dict[str, Any]
Array = np.ndarray[Any, np.dtype[Any]]
LAYERS, STEPS = 4, 24
ZIPF = 0.3
"""Skew of the experts where a paper's traffic is not public: the busiest of 128 experts gets three
times the mean, as in the middle of public recordings of real models (2.0 to 3.9 times)."""


REDUNDANCY = 1.5
"""Where a source does not say its own: that of METRO's headline."""
BATCH = 65536
"""Prompt tokens of HarMoEny's batches, which it does not say either."""
MOST = 4096
"""Requests in flight up to which a throughput is looked for."""
STRICTEST = 64
"""Requests in flight up to which METRO says that links decide and balancing does not matter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a paper's rows have in common."""

    model: str
    hardware: str
    layout: Layout
    concurrency: int
    prompt_tokens: int
    output_tokens: int
    skew: ReplaySettings
    token_budget: int | None = None
    """None: vLLM's default, of each engine."""
    engines: int | None = None
    """None: one for each data-parallel rank."""
    prefetch: Literal["async", "sync"] = "async"
    steady: bool = True
    """False: only its first batch, which finds the dynamic slots empty."""


METRO_A100 = Setup(
    model="qwen3-30b-a3b", hardware="a100-80", layout=Layout(data=8), concurrency=256,
    prompt_tokens=1024, output_tokens=2048, skew=ReplaySettings(zipf=ZIPF, seed=1),
)  # fmt: skip
METRO_QWEN = Setup(
    model="qwen3-235b-a22b", hardware="b200", layout=Layout(data=8), concurrency=1024,
    prompt_tokens=1024, output_tokens=2048, skew=ReplaySettings(zipf=ZIPF, seed=1),
)  # fmt: skip
METRO_DEEPSEEK = Setup(
    model="deepseek-v3", hardware="b200", layout=Layout(data=16), concurrency=1024,
    prompt_tokens=1024, output_tokens=2048, skew=ReplaySettings(zipf=ZIPF, seed=1),
)  # fmt: skip
METRO_SMALL = replace(METRO_A100, concurrency=32)
"""The batch of 32 tokens that the paper counts activated experts with."""
H20 = Setup(
    model="deepseek-v3", hardware="h20", layout=Layout(data=16), concurrency=32,
    prompt_tokens=1024, output_tokens=1024, skew=ReplaySettings(zipf=ZIPF, seed=1),
)  # fmt: skip
"""The batch follows from what is published: two random active sets overlap by 58 to 62 %, so about
60 % of 256 experts are active, which takes about 30 tokens."""


def run(setup: Setup, balancer: str, redundancy: float, seed: int) -> Outcome:
    """One arm of a setup."""
    return _run(setup, balancer, redundancy, seed)


@cache
def _run(setup: Setup, balancer: str, redundancy: float, seed: int) -> Outcome:
    arm = _arm(setup, balancer, redundancy, seed)
    return simulate(arm, _traffic(setup).fresh(), _placed_by(setup).fresh())


def _arm(setup: Setup, balancer: str, redundancy: float, seed: int) -> Arm:
    machine, _ = hardware.load(setup.hardware)
    budget = machine.engine.batched_tokens.value * setup.layout.data
    return Arm(
        model=_model(setup.model, setup.layout.num_ranks),
        hardware=machine,
        layout=setup.layout,
        balancer=balancer,
        redundancy=redundancy,
        seed=seed,
        prefetch=setup.prefetch,
        load=Load(
            concurrency=setup.concurrency,
            prompt_tokens=setup.prompt_tokens,
            output_tokens=setup.output_tokens,
            token_budget=setup.token_budget or budget,
            engines=setup.engines or setup.layout.data,
            max_steps=STEPS,
            steady=setup.steady,
        ),
    )


def _traffic(setup: Setup) -> Traffic:
    """What is served."""
    return _rows(setup.skew, setup.model, setup.layout.num_ranks, 0)


def _placed_by(setup: Setup) -> Traffic:
    """Other tokens of the same skew, to place experts by."""
    return _rows(setup.skew, setup.model, setup.layout.num_ranks, 1)


@cache
def _rows(skew: ReplaySettings, model: str, ranks: int, which: int) -> Traffic:
    return skewed(skew, _model(model, ranks), LAYERS, which)


def _model(name: str, ranks: int) -> Model:
    """A model of the catalogue, with as many experts more as it takes that they divide."""
    model = models.load(name)
    experts = model.num_experts.value
    return model.with_counts(num_experts=experts + -experts % ranks)


@cache
def within_slo(
    setup: Setup, balancer: str, redundancy: float, seed: int, slo_us: float
) -> Outcome | None:
    """One arm with the most requests in flight, up to MOST, whose TPOT keeps an SLO, found as by
    `plan`; None if not even one keeps it. As in the other rows, memory is not asked about."""

    def at(concurrency: int) -> Outcome:
        return run(replace(setup, concurrency=concurrency), balancer, redundancy, seed)

    return most_within(slo_us, MOST, at, near=setup.concurrency)[1]


def rows(seed: int) -> Iterator[Row]:
    """Every published point with its prediction."""
    yield from metro(seed)
    yield from reproduction(seed)
    yield from harmoeny(seed)
    yield from tempo(seed)


def _row(
    paper: str, what: str, published: str, reference: float, predicted: float, remark: str = "",
    *, ratio: bool = True, form: str = "+.1%",
) -> Row:  # fmt: skip
    return {
        "kind": "published ratio" if ratio else "published",
        "paper": paper,
        "what": what,
        "published": published,
        "reference": reference,
        "predicted": predicted,
        "error": predicted - reference,
        "remark": remark,
        "format": form,
    }


def metro(seed: int) -> Iterator[Row]:
    """METRO, figures 9 to 12, as far as their numbers are in the text."""
    none, even, one = (
        run(METRO_A100, *arm, seed) for arm in (("static", 1.0), ("eplb", 1.5), ("metro", 1.5))
    )
    few = [run(METRO_SMALL, *arm, seed) for arm in (("static", 1.0), ("eplb", 1.5))]
    experts = _decoding_experts(few[1]) / _decoding_experts(few[0]) - 1
    yield _row("metro", "A100, batch 32, EPLB 1.5 x against none: activated experts", "+30 %",
               0.30, experts, ratio=False)  # fmt: skip
    even_lambda, greedy_lambda = above_optimum(METRO_SMALL, REDUNDANCY, seed)
    yield _row("metro", "A100, batch 32, EPLB 1.5 x against the optimum: activated experts",
               "up to +42.3 %", 0.423, even_lambda, ratio=False)  # fmt: skip
    yield _row("metro", "A100, batch 32, the paper's greedy 1.5 x against the optimum: the same",
               "up to +10.9 %", 0.109, greedy_lambda, "experts in id order; ours is the optimum",
               ratio=False)  # fmt: skip
    yield _row("metro", "A100, EPLB 1.5 x against none: TPOT", "+14 %", 0.14, _slower(even, none))
    yield _row("metro", "A100, EPLB 1.5 x against none: throughput", "-10 %", -0.10,
               _faster(even, none), ratio=False)  # fmt: skip
    yield _row(
        "metro", "A100, METRO against EPLB, 1.5 x: TPOT", "up to -12.9 %", -0.129,
        _slower(one, even),
    )  # fmt: skip
    yield _row(
        "metro", "A100, METRO against EPLB, 1.5 x: throughput", "up to +15.9 %", 0.159,
        _faster(one, even), ratio=False,
    )  # fmt: skip
    saved = even.mean(even.stage_us["experts"] - one.stage_us["experts"]) / 48
    yield _row("metro", "A100, experts' time saved in a layer", "81 us", 81.0, saved,
               ratio=False, form=".0f")  # fmt: skip
    yield from _metro_b200(seed)


def _metro_b200(seed: int) -> Iterator[Row]:
    for name, setup in (("Qwen3-235B, 8 x B200", METRO_QWEN),
                        ("DeepSeek-V3, 16 x B200", METRO_DEEPSEEK)):  # fmt: skip
        for ratio, tpot, rate in ((1.125, -0.019, 0.007), (1.5, -0.218, 0.210)):
            even, one = (run(setup, balancer, ratio, seed) for balancer in ("eplb", "metro"))
            best = "up to " if ratio == 1.5 else ""
            remark = "theirs is simulated too" if ratio == 1.5 else "one of two models, theirs too"
            yield _row("metro", f"{name}, METRO against EPLB, {ratio} x: TPOT",
                       f"{best}{tpot:+.1%}", tpot, _slower(one, even), remark)  # fmt: skip
            yield _row("metro", f"{name}, METRO against EPLB, {ratio} x: throughput",
                       f"{best}{rate:+.1%}", rate, _faster(one, even), remark,
                       ratio=False)  # fmt: skip
        yield from _metro_at_a_tpot(name, setup, seed)


def _metro_at_a_tpot(name: str, setup: Setup, seed: int) -> Iterator[Row]:
    """The headline, 1.98 x to 4.11 x, whose models and SLOs we do not know. SLOs here: the TPOT of
    EPLB with the fewest requests from which the paper sees a gain, and with those of other rows."""
    for requests in (STRICTEST, setup.concurrency):
        even = run(replace(setup, concurrency=requests), "eplb", REDUNDANCY, seed)
        none, one = (
            within_slo(setup, *arm, seed, even.tpot_us)
            for arm in (("static", 1.0), ("metro", REDUNDANCY))
        )
        what = f"at the TPOT of EPLB with {requests:,} requests, 1.5 x: throughput"
        yield _row(
            "metro", f"{name}, METRO against EPLB {what}", "+98 % to +311 %", (0.98 + 3.11) / 2,
            _more(one, even),
            f"published without model and SLO; {even.tpot_us / 1e3:.1f} ms here, at which no "
            f"redundancy has {_more(none, even):+.0%}",
            ratio=False, form="+.0%",
        )  # fmt: skip


def reproduction(seed: int) -> Iterator[Row]:
    """The independent one: DeepSeek-V3 on H20, a fork of SGLang."""
    none = run(H20, "static", 1.0, seed)
    arms = ("eplb", "first_copy", "metro")
    even, first, one = (run(H20, name, REDUNDANCY, seed) for name in arms)
    yield _row("h20", "METRO against no redundancy: TPOT", "-5.1 %", -0.051, _slower(one, none))
    yield _row("h20", "METRO against first copy", "-7.0 %", -0.07, _slower(one, first))
    yield _row("h20", "METRO against even, same redundancy", "-12.1 %", -0.121, _slower(one, even))
    yield _row("h20", "even, redundant, against no redundancy", "+7.9 % to +16.8 %", 0.124,
               _slower(even, none))  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Skewed:
    """What HarMoEny publishes of one model."""

    name: str
    hot: Hot
    static_waits: float
    waits: float
    """Share of a rank's time with alpha 0.9, round robin and HarMoEny."""
    layer: float
    """Latency of a layer against round robin."""
    beside: float
    """The same of fetches beside experts against fetches before them."""


HARMOENY = {
    "switch-128": Skewed(name="Switch-128", hot=Hot(experts=1, fraction=0.9),
                         static_waits=0.826, waits=0.026, layer=-0.483, beside=-0.086),
    "qwen15-moe-fp32": Skewed(name="Qwen1.5-MoE", hot=Hot(experts=8, fraction=0.9, ranks=8),
                              static_waits=0.857, waits=0.01, layer=-0.637, beside=-0.138),
}  # fmt: skip
OTHERS = ("static", "shadow", "even_split")
"""Baselines of HarMoEny that are simulated; ExFlow, its next best on Switch, is not."""


def harmoeny(seed: int) -> Iterator[Row]:
    """HarMoEny's skew tables: 8 x V100, a share alpha of the tokens to experts of one rank."""
    for model, says in HARMOENY.items():
        setup = Setup(
            model=model, hardware="v100-dgx1",
            layout=Layout(data=8, dispatch="all_to_all"), concurrency=64, prompt_tokens=1024,
            output_tokens=1, skew=ReplaySettings(hot=says.hot, seed=1), token_budget=BATCH,
        )  # fmt: skip
        yield from _steady_skew(setup, says, seed)
        cold = replace(setup, concurrency=1, prompt_tokens=BATCH, engines=1, steady=False)
        beside, before = (
            _layer(run(replace(cold, prefetch=prefetch), "harmoeny_paper", 1.25, seed))
            for prefetch in ("async", "sync")
        )
        yield _skewed(says, "fetches beside experts against before: layer latency",
                      f"{says.beside:.1%}", says.beside, beside / before - 1,
                      "published without its alpha; 0.9 here, a batch with empty slots",
                      )  # fmt: skip
        even = replace(setup, skew=ReplaySettings(zipf=0.0, seed=1))
        base, ours = run(even, "static", 1.0, seed), run(even, "harmoeny_paper", 1.25, seed)
        yield _skewed(says, "no skew, HarMoEny against round robin: layer latency",
                      "up to +8 %", 0.08, _layer(ours) / _layer(base) - 1,
                      "the paper's scheduling takes 20 to 31 % of a layer; here it is compiled",
                      )  # fmt: skip


def _steady_skew(setup: Setup, says: Skewed, seed: int) -> Iterator[Row]:
    base, ours = run(setup, "static", 1.0, seed), run(setup, "harmoeny_paper", 1.25, seed)
    yield _skewed(says, "alpha 0.9, round robin: waiting share", f"{says.static_waits:.1%}",
                  says.static_waits, base.waiting_share, form=".1%")  # fmt: skip
    yield _skewed(says, "alpha 0.9, HarMoEny: waiting share", f"{says.waits:.1%}", says.waits,
                  ours.waiting_share, form=".1%")  # fmt: skip
    yield _skewed(says, "HarMoEny against round robin: layer latency", f"{says.layer:.1%}",
                  says.layer, _layer(ours) / _layer(base) - 1,
                  "published without its alpha; 0.9 here")  # fmt: skip
    if says is HARMOENY["switch-128"]:
        yield _skewed(says, "alpha 0.9: TTFT against round robin", "-45.1 %", 5.36 / 9.77 - 1,
                      _prefill(ours) / _prefill(base) - 1, ratio=True)  # fmt: skip
    others = [run(setup, name, 1.0 if name == "static" else 1.25, seed) for name in OTHERS]
    fewest_us = min(map(_prefill, others))
    remark = f"of {', '.join(OTHERS)} here; published for both models together"
    yield _skewed(says, "alpha 0.9, against the next best: throughput", "+37 % to +70 %", 0.535,
                  fewest_us / _prefill(ours) - 1, remark)  # fmt: skip
    yield _skewed(says, "alpha 0.9, against the next best: TTFT", "-34 % to -41 %", -0.375,
                  _prefill(ours) / fewest_us - 1, remark)  # fmt: skip


def _skewed(
    says: Skewed, what: str, published: str, reference: float, predicted: float, remark: str = "",
    *, ratio: bool = False, form: str = "+.1%",
) -> Row:  # fmt: skip
    what = f"{says.name}, {what}"
    return _row("harmoeny", what, published, reference, predicted, remark, ratio=ratio, form=form)


def tempo(seed: int) -> Iterator[Row]:
    """TEMPO's modelled block times, of which only ratios can be compared."""
    setup = Setup(
        model="deepseek-v3", hardware="h100", layout=Layout(data=16), concurrency=256,
        prompt_tokens=1, output_tokens=1024, skew=ReplaySettings(zipf=ZIPF, seed=1),
    )  # fmt: skip
    even, one = (run(setup, name, REDUNDANCY, seed) for name in ("eplb", "metro"))
    predicted = one.mean(one.stage_us["experts"]) / even.mean(even.stage_us["experts"]) - 1
    yield _row("tempo", "decode floor, METRO against uniform: block time",
               f"{0.950 / 1.299 - 1:+.1%}", 0.950 / 1.299 - 1, predicted)  # fmt: skip


def above_optimum(setup: Setup, redundancy: float, seed: int) -> tuple[float, float]:
    """By how much lambda is above the least possible one under vLLM's mapping and under the paper's
    greedy, on EPLB's placement: sums over decode batches and layers."""
    even = decider_of(_arm(setup, "eplb", redundancy, seed), _placed_by(setup).fresh())
    assert isinstance(even, Decider)
    traffic = _traffic(setup).fresh()
    sums = np.zeros(3)
    for _ in range(STEPS):
        ids_LTK = traffic.batch(setup.concurrency, 0)
        tokens_LP, _ = even.slots(ids_LTK)
        for tables, ids_TK, tokens_P in zip(even.tables_L, ids_LTK, tokens_LP, strict=True):
            table_ER = tables.logical_to_physical_ER.numpy()
            shape = (tables.num_ranks, tables.num_physical)
            replicas_E = tables.num_replicas_E.numpy()
            tokens_E = reference.count(ids_TK.numpy(), len(replicas_E), None)
            column_E = reference.greedy_by_id(tokens_E, table_ER, replicas_E, *shape)
            activated_S, _ = reference.loads(column_E, tokens_E, table_ER, *shape)
            sums += (
                (tokens_P.reshape(tables.num_ranks, -1) > 0).sum(1).max(),
                activated_S.max(),
                reference.optimal_activated(tokens_E, table_ER, replicas_E, *shape),
            )
    mapped, greedy, least = sums.tolist()
    return mapped / least - 1, greedy / least - 1


def _slower(one: Outcome, other: Outcome) -> float:
    return one.tpot_us / other.tpot_us - 1


def _faster(one: Outcome, other: Outcome) -> float:
    return one.tokens_per_s / other.tokens_per_s - 1


def _more(one: Outcome | None, other: Outcome) -> float:
    """Throughput of what may not be able to serve."""
    return -1.0 if one is None else _faster(one, other)


def _decoding_experts(made: Outcome) -> float:
    """Experts on the worst rank in steps without prompts."""
    return _over(made, made.steps.prefill_N == 0, made.activated_N)


def _layer(made: Outcome) -> float:
    """Time of the MoE part of prefill steps."""
    stages = ("exchange", "decide", "dispatch", "experts", "combine")
    time_N = sum((made.stage_us[stage] for stage in stages), np.zeros(len(made.busy_us_N)))
    return _over(made, made.steps.prefill_N > 0, time_N)


def _prefill(made: Outcome) -> float:
    return _over(made, made.steps.prefill_N > 0, made.step_us_N)


def _over(made: Outcome, chosen_N: Array, values_N: Array) -> float:
    """Mean over some of the steps."""
    return float(np.average(values_N[chosen_N], weights=made.steps.times_N[chosen_N]))
