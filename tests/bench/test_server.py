"""Counters are read where ranks stand still."""

from pathlib import Path

import pytest

from bench import server as module
from bench.server import Arm, Server


@pytest.fixture
def looks(monkeypatch):
    """A server's decisions on two ranks, one pair at each look; the last pair for ever."""
    monkeypatch.setattr(module, "REST_LOOK_S", 0.0)

    def of(*decisions: tuple[int, int]) -> tuple[Server, list[int]]:
        made = Server(Arm(name="metro", balancer="metro"), Path("model"))
        seen: list[int] = []

        def status(**_):
            seen.append(len(seen))
            return [{"decisions": d} for d in decisions[min(seen[-1], len(decisions) - 1)]]

        monkeypatch.setattr(made, "status", status)
        return made, seen

    return of


def test_a_server_rests_when_two_looks_are_equal(looks):
    made, seen = looks((4, 6), (6, 6), (6, 8), (8, 8))
    made.rest()
    assert len(seen) == 5


def test_ranks_that_differ_for_ever_rest_too(looks):
    """What that means is for `require_trustworthy` to say."""
    made, seen = looks((4, 6))
    made.rest()
    assert len(seen) == 2


def test_a_server_that_never_rests_is_named(looks, monkeypatch):
    monkeypatch.setattr(module, "RESTS_WITHIN_S", 0.05)
    made, _ = looks(*((n, n) for n in range(100_000)))
    with pytest.raises(RuntimeError, match=r"metro: 0.05 s behind their last request the ranks"):
        made.rest()
