"""4 gloo processes, of which one cannot get an expert: it says so and ends, and nobody hangs."""

from pathlib import Path

import pytest
from gloo import exit_codes, said

pytestmark = pytest.mark.timeout(600)


def test_a_rank_that_cannot_get_an_expert_ends_and_its_peers_do_not_wait_for_it(tmp_path):
    """In a collective they would wait for many minutes, longer than they are given here."""
    script = Path(__file__).with_name("failing_rank.py")
    codes = exit_codes(script, 4, tmp_path)
    assert codes[1] == 1
    assert "This worker ends. Expert" in said(tmp_path, 1)
    assert "page is gone" in said(tmp_path, 1)
    for peer in (0, 2, 3):
        assert codes[peer] != 0, f"rank {peer} ended as if all were well"
        lost = said(tmp_path, peer)
        assert "Connection" in lost or "Broken pipe" in lost
        assert "page is gone" not in lost
