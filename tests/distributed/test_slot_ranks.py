"""2 and 4 gloo processes with dynamic slots that thrash: every token as from the dense layer.

slot_ranks.py runs every policy, way of exchange and kind of copy over changing skews, and compares
there; here the ranks are compared with each other.
"""

from pathlib import Path

import pytest
from gloo import run_ranks

pytestmark = pytest.mark.timeout(600)

POLICIES = ("harmoeny", "harmoeny_paper", "shadow", "even_split")
WAYS = ("replicated", "after_gather", "all_reduce")


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def findings(request, tmp_path_factory) -> list[dict]:
    script = Path(__file__).with_name("slot_ranks.py")
    return run_ranks(script, request.param, tmp_path_factory.mktemp("slots"))


def copies_of(findings) -> list[str]:
    """How copies ran."""
    return sorted({case.split(" | ")[2] for case in findings[0]})


def test_every_policy_way_and_copy_was_run(findings):
    copies = copies_of(findings)
    more = {"sync", "slow, mapped"} if len(findings) == 2 else set()
    assert {*copies} == {"async", "slow"} | more
    cases = {f"{p} | {w} | {c}" for p in POLICIES for w in WAYS for c in copies}
    assert all(found.keys() == cases for found in findings)


@pytest.mark.parametrize("what", ["slots", "content", "batches", "collectives"])
def test_all_ranks_decide_the_same(findings, what):
    for case in findings[0]:
        assert all(found[case][what] == findings[0][case][what] for found in findings), case


def test_how_a_copy_runs_changes_no_decision(findings):
    for policy in POLICIES:
        for way in WAYS:
            cases = [f"{policy} | {way} | {copies}" for copies in copies_of(findings)]
            assert all(findings[0][case] == findings[0][cases[0]] for case in cases)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_way_of_exchange_changes_no_decision(findings, policy):
    """The paper's schedule tells sources apart, where a way knows them: not if all have all."""
    told_apart = policy == "harmoeny_paper"
    ways = [way for way in WAYS if not (told_apart and way == "replicated")]
    for what in ("slots", "content", "batches"):
        first, *others = [findings[0][f"{policy} | {way} | async"][what] for way in ways]
        assert others and all(found == first for found in others)


@pytest.mark.parametrize("policy", POLICIES)
def test_batches_without_tokens_and_even_ones_were_met(findings, policy):
    """Both in each layer. Without a tolerance no policy tells even batches from others."""
    for way in WAYS:
        found = findings[0][f"{policy} | {way} | async"]
        assert [empty for _, _, empty in found["batches"]] == [1, 1]
        assert found["balanced"] >= 2 if policy == "harmoeny" else found["balanced"] == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_the_slots_thrashed(findings, policy):
    """Otherwise the comparison with the dense layer says nothing about fetched weights."""
    for way in WAYS:
        ranks = [found[f"{policy} | {way} | async"] for found in findings]
        assert sum(rank["fetches"] + rank["early_fetches"] for rank in ranks) > 4
        assert sum(rank["evictions"] for rank in ranks) > 2


@pytest.mark.parametrize("policy", POLICIES)
def test_guesses_came_true_and_did_not(findings, policy):
    """The router is asked on the same inputs before and in the second layer, but in every third
    batch other experts are chosen there; outputs were those of the dense layer all the same."""
    for way in WAYS:
        ranks = [found[f"{policy} | {way} | async"] for found in findings]
        assert sum(rank["early_fetches"] for rank in ranks) > 2
        assert sum(rank["early_hits"] for rank in ranks) > 2
        assert sum(rank["wasted_bytes"] for rank in ranks) > 0
