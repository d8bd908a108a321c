"""The schedules that are judged without a server are those that a server makes."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from bench.harmoeny_lookahead import judge
from bench.harmoeny_schedule import RULES
from vllm_balance.seams.slots import ModelSlots


def test_the_rules_are_those_of_a_server_with_this_threshold():
    config = SimpleNamespace(threshold_tokens=RULES.threshold_tokens)
    served = ModelSlots.rules(SimpleNamespace(_config=config), knee_tokens=RULES.knee_tokens)
    assert served == RULES


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
