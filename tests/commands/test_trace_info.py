"""`trace info`: of one phase at a time, with the tokens of counts and the experts of a kind."""

import re

import numpy as np
import pytest
from typer.testing import CliRunner

from vllm_balance import commands, traces
from vllm_balance.commands import pictures
from vllm_balance.commands.printing import spans
from vllm_balance.errors import BalancerError
from vllm_balance.traces import Trace


@pytest.fixture
def info(tmp_path):
    """20 steps of prefill with 400 tokens each for experts 0 to 3, and 30 of decode with 10 tokens
    for 2 to 5; expert 5 in every fifth step, all of the tokens."""
    counts = np.zeros((50, 1, 6), np.int32)
    counts[:20, 0, :4] = 200
    counts[20:, 0, 2:5] = [8, 8, 4]
    counts[20::5, 0] = [0, 0, 0, 0, 0, 20]
    trace = Trace(
        name="[c]",
        num_experts=6,
        top_k=2,
        layer_index_L=np.array([3]),
        counts_NLE=counts,
        phase_N=np.repeat([0, 1], [20, 30]),
    )
    traces.save(tmp_path / "[c].npz", trace)

    def run(*arguments):
        asked = ["trace", "info", str(tmp_path / "[c].npz"), *map(str, arguments)]
        done = CliRunner(env={"COLUMNS": "100"}).invoke(commands.app, asked)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return " ".join(done.output.split())

    return run


def test_tokens_of_counts_are_printed_and_the_phase_with_most_steps_is_shown(info):
    said = info()
    assert "[c]: 1 layers, 6 experts, top-2; 8300 tokens, 50 recorded steps; 20 prefill, " in said
    assert "What follows is of the 30 steps of decode (--phase)." in said
    assert "│ 3 │ 1.92 │ 43% │ 0 │ 1 │ (2,3,4) │" in said
    assert "of the 20 steps of prefill" in info("--phase", "prefill")
    assert "│ 3 │ 1.50 │ 67% │ 4 │ 0 │" in info("--phase", "prefill")


def test_experts_groups_and_drift_are_listed(info):
    said = info("--experts")
    drift = re.search(r"│ 3 │ - │ 5 │ \(2,3,4\) │ ((?:\d+% ?){10})│", said)
    assert drift is not None, said
    shares = [int(share[:-1]) for share in drift[1].split()]
    # Expert 5 takes all in every fifth step, so in half of the tenths, which have three steps.
    assert shares[0] == 0 and max(shares) > 0
    last = re.search(r"\(2,3,4\) │ ([\d.]+)% │", said)
    assert last is not None and round(float(last[1])) == shares[-1]
    assert re.search(r"│ 3 │ 0-3 │ - │ - │ (0% ){10}│", info("--experts", "--phase", "prefill"))


def test_counts_are_in_steps_already(info):
    with pytest.raises(BalancerError, match=r"--batch 7 was given, and trace \S+ holds counts"):
        info("--batch", 7)


def test_a_phase_that_is_unknown_or_was_not_recorded_is_refused(info):
    with pytest.raises(BalancerError, match="Did you mean 'decode'"):
        info("--phase", "decoding")
    with pytest.raises(BalancerError, match="has 20 prefill, 30 decode among its steps"):
        info("--phase", "mixed")


def test_numbers_in_a_row_are_told_by_their_ends():
    assert spans([]) == "-"
    assert spans(np.array([4])) == "4"
    assert spans([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


def test_the_picture_shows_kind_and_group_of_every_expert(info, tmp_path, monkeypatch):
    """In decode experts 2, 3 and 4 rise together, and expert 5 is alone with its temporal load."""
    drawn = []
    monkeypatch.setattr(pictures, "_save", lambda figure, path: drawn.append((figure, path)))
    info("--plot", tmp_path / "t.png")
    ((figure, path),) = drawn
    assert path == tmp_path / "t.png"
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[:2] == ["skew", "drift"] and "consistent" in titles[2] and "group" in titles[3]
    skew, drift = figure.axes[:2]
    assert skew.lines[0].get_xydata().tolist() == [[3.0, pytest.approx(1.92, abs=0.005)]]
    assert [len(line.get_ydata()) for line in drift.lines] == [10, 10]
    assert drift.lines[0].get_ydata()[0] == 0 and max(drift.lines[0].get_ydata()) > 0
    kinds, groups = (axis.images[0].get_array() for axis in figure.axes[2:])
    assert kinds.tolist() == [[0, 0, 0, 0, 0, -1]]
    assert groups.mask.tolist() == [[True, True, False, False, False, True]]
    assert groups.compressed().tolist() == [0, 0, 0]
