"""2 and 4 gloo processes: the ranks' outputs sum to the dense layer, and the ranks agree.

ranks.py runs every policy, way of exchange and odd batch in one process per rank, and checks there
that its own tokens come out as from a dense layer.
"""

from pathlib import Path

import pytest
from gloo import run_ranks

pytestmark = pytest.mark.timeout(600)

RANKS = Path(__file__).with_name("ranks.py")
METROS = ("metro", "metro_even", "metro_knee", "metro_turns")
POLICIES = ("static", "eplb", "first_copy", *METROS, "gem", "exflow")
BY_INDEX = ("eplb", "gem")
"""vLLM hashes the index of a token in the batch that a rank is given."""
WAYS = ("replicated", "after_gather", "all_reduce")


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def findings(request, tmp_path_factory) -> list[dict]:
    """What each rank found, by case; fails with a rank's traceback if one failed."""
    return run_ranks(RANKS, request.param, tmp_path_factory.mktemp("ranks"))


def by_case(findings: list[dict]):
    """(case, what each rank found in it)."""
    for key in findings[0]:
        yield key, [found[key] for found in findings]


def test_every_policy_way_and_batch_was_run(findings):
    keys = {tuple(key.split(" | ")) for key in findings[0]}
    batches = {key[2] for key in keys}
    assert len(batches) == 16
    assert keys == {(p, w, b) for p in POLICIES for w in WAYS for b in batches}
    assert all(found.keys() == findings[0].keys() for found in findings)


def test_decisions_are_identical_on_all_ranks(findings):
    for key, ranks in by_case(findings):
        assert all(found["slots"] == ranks[0]["slots"] for found in ranks), key


def test_every_rank_takes_part_in_as_many_collectives(findings):
    total = 0
    for key, ranks in by_case(findings):
        assert len({found["collectives"] for found in ranks}) == 1, key
        total += ranks[0]["collectives"]
    counts = len(METROS) * 16  # Once per batch, in one of the three ways.
    # Tensor-parallel, where the batch has tokens.
    ids = len(POLICIES) * 14 if len(findings) > 2 else 0
    assert total == counts + ids


def test_global_counters_are_equal_on_all_ranks(findings):
    compared = 0
    for key, ranks in by_case(findings):
        counted = [found["counted"] for found in ranks]
        assert all(other == counted[0] for other in counted), key
        compared += counted[0] is not None
    assert compared == 16 * (2 * len(POLICIES) + len(METROS))


@pytest.mark.parametrize("policy", ["metro_knee", "metro_turns"])
@pytest.mark.parametrize("way", WAYS)
def test_both_regimes_were_met(findings, policy, way):
    counted = [
        ranks[0]["counted"]
        for key, ranks in by_case(findings)
        if key.startswith(f"{policy} | {way} | ")
    ]
    assert sum(batch["memory_bound_batches"] for batch in counted) > 0
    assert sum(batch["compute_bound_batches"] for batch in counted) > 0


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy not in BY_INDEX])
def test_the_way_of_exchange_changes_no_decision(findings, policy):
    for key in findings[0]:
        if not key.startswith(f"{policy} | replicated"):
            continue
        for way in WAYS:
            other = findings[0][key.replace("replicated", way)]
            assert other["slots"] == findings[0][key]["slots"], f"{key} and {way}"
