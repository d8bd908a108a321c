"""The schedules that are judged without a server are those that a server makes."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from bench import harmoeny_schedule
from bench.harmoeny_loads import BATCH_TOKENS
from bench.harmoeny_lookahead import judge
from bench.harmoeny_schedule import RULES
from vllm_balance import traces
from vllm_balance.seams.slots import ModelSlots
from vllm_balance.traces import Trace


def test_the_rules_are_those_of_a_server_with_this_threshold():
    slots = object.__new__(ModelSlots)
    settings = {"name": "harmoeny", "threshold_tokens": RULES.threshold_tokens}
    slots._on_cpu, slots._config = True, SimpleNamespace(**settings)
    assert slots.rules(knee_tokens=RULES.knee_tokens) == RULES


def test_a_fetch_that_no_server_would_pay_for_is_not_made():
    """Home ranks 200 and 100. The least fetch moves 64 tokens and, if it costs as much, ends at
    228; if it costs nothing, at 164."""
    counts_NE = np.array([[100, 100, 60, 40]])
    served, free = (
        judge(counts_NE, lambda n: None, 2, 1, rules)
        for rules in (RULES, replace(RULES, fetch_tokens=0))
    )
    assert (served.wanted, served.late) == (0, 0)
    assert (free.wanted, free.late) == (1, 1)


def test_schedules_are_timed_on_drawn_and_recorded_loads(tmp_path, monkeypatch):
    """One of these has 12 experts, which divide over four ranks alone."""
    seen = []

    def sweep(tokens_SE, repetitions):
        seen.append(tokens_SE)
        return {"harmoeny": float(len(tokens_SE))}

    monkeypatch.setattr(harmoeny_schedule, "_sweep", sweep)
    random = np.random.default_rng(0)
    for name, num_experts in (("a", 12), ("b", 16), ("c", 16)):
        trace = Trace(
            name=name, num_experts=num_experts, top_k=1, layer_index_L=np.arange(1),
            topk_ids_TLK=random.integers(0, num_experts, (2 * BATCH_TOKENS, 1, 1)),
        )  # fmt: skip
        traces.save(tmp_path / f"{name}.npz", trace)
    drawn = list(harmoeny_schedule.time_rows(1, None, 0))
    assert [(row["E"], row["S"]) for row in drawn[::2]] == list(harmoeny_schedule.TIMED)
    assert (128, 4) in harmoeny_schedule.TIMED
    every = list(harmoeny_schedule.time_rows(1, tmp_path, 0))
    again, recorded = every[: len(drawn)], every[len(drawn) :]
    assert again == drawn
    assert [(row["load"], row["E"], row["S"]) for row in recorded] == [
        ("a", 12, 4),
        *(("b", 16, ranks) for ranks in (4, 8, 16)),
        *(("c", 16, ranks) for ranks in (4, 8, 16)),
    ]
    assert [row["time_us"]["harmoeny"] for row in recorded] == [4, 4, 8, 16, 4, 8, 16]
    assert seen[-1].sum() == 16 * BATCH_TOKENS
