"""`profile --check` and the files of `profile`, with ranks whose times are known."""

import json
import sys
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from tiny_model import CONFIG
from typer.testing import CliRunner

from vllm_balance import commands, profiles
from vllm_balance.commands.expert_probe import Timing
from vllm_balance.commands.profile import DEFAULT_OUTPUT, form_of, sample
from vllm_balance.commands.profile_check import check_profile, moved
from vllm_balance.cost import CostModel
from vllm_balance.errors import BalancerError

CURVE = CostModel(a_us=50, b_us=400, c_us=100, beta_us=20)


class Ranks:
    """Two ranks of one curve, each slower by a factor, that share the memory of their weights."""

    factor_S = (1.0, 1.0)
    alone = 0.8
    """Of an expert's time to stream that is left when the other rank is idle."""

    def measure(self, tokens_E, repeats=None):
        time_us = CURVE.of_experts(np.array(tokens_E))
        return [Timing(time_us=time_us * factor, repeats=3) for factor in self.factor_S]

    def measure_alone(self, tokens_E, repeats=None):
        curve = replace(CURVE, b_us=self.alone * CURVE.b_us)
        time_us = curve.of_experts(np.array(tokens_E)) * self.factor_S[0]
        return Timing(time_us=time_us, repeats=repeats or 3)


@pytest.fixture
def ranks(monkeypatch):
    """The ranks that are measured in place of this machine's."""
    measured = Ranks()

    @contextmanager
    def probing(kernels_S):
        assert len(kernels_S) == 2
        yield measured

    for function in (sample, check_profile):
        monkeypatch.setattr(sys.modules[function.__module__], "probing_kernels", probing)
    monkeypatch.setattr(sys.modules[sample.__module__], "own_cores", lambda: [0, 1])
    return measured


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


@pytest.fixture
def file(ranks, model):
    """A profile of the ranks, in a folder whose name rich would take for a colour."""
    folder = model / "[red]"
    folder.mkdir()
    done = run("profile", model, "-o", folder / "p.json")
    assert done.exit_code == 0, done.output
    assert f"Wrote {folder / 'p.json'}." in done.output, "in one line, as it is"
    return folder / "p.json"


def run(*arguments, columns=80):
    runner = CliRunner(env={"COLUMNS": str(columns)})
    return runner.invoke(commands.app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("factor_S", "status", "said"),
    [
        ((1.0, 1.0), 0, "The profile still holds"),
        ((1.08, 1.09), 0, "The profile still holds"),
        ((1.0, 1.08), 1, "Rank 1 has become 8.0% slower against rank 0"),
        ((0.92, 1.0), 1, "Rank 1 has become 8.7% slower against rank 0"),
        ((1.3, 1.2), 1, "Rank 0 has become 8.3% slower against rank 1"),
        ((1.12, 1.13), 1, "as a whole is 12% slower than in the profile. The ratios between ranks"),
        ((0.8, 0.8), 1, "as a whole is 20% faster than in the profile. The ratios between ranks"),
    ],
)
def test_a_check_tells_a_slow_rank_from_a_slow_machine(ranks, model, file, factor_S, status, said):
    ranks.factor_S = factor_S
    done = run("profile", model, "--check", file)
    assert done.exit_code == status, done.output
    assert said in done.output
    for rank, factor in enumerate(factor_S):
        assert f"rank {rank}: {factor - 1:+.1%} against the profile" in done.output


def test_one_rank_has_none_beside_it():
    assert moved([1.09]) is None and "12% slower" in moved([1.12])


@pytest.mark.parametrize(
    "option",
    [
        ("--output", "o.json"),
        ("--plot", "p.png"),
        ("--ranks", 2),
        ("--cores-per-rank", 1),
        ("--experts", 4),
        ("--force",),
    ],
)
def test_what_a_check_would_ignore_is_refused(model, file, option):
    refused = run("profile", model, "--check", file, *option).exception
    assert isinstance(refused, BalancerError)
    assert f"--check was given together with {option[0]}." in str(refused)


def test_a_profile_is_replaced_only_by_force(ranks, model, file):
    before = file.read_bytes()
    ranks.factor_S = (1.0, 1.5)
    refused = run("profile", model, "-o", file).exception
    assert isinstance(refused, BalancerError) and "--force" in str(refused)
    assert f"written to {file}, and there is a file" in str(refused)
    assert file.read_bytes() == before
    assert run("profile", model, "-o", file, "--force").exit_code == 0
    fast, slow = profiles.load(file).costs
    assert slow.b_us / fast.b_us == pytest.approx(1.5)


def test_without_options_two_ranks_of_one_core_are_written_beside(ranks, model, monkeypatch):
    monkeypatch.chdir(model)
    assert run("profile", model).exit_code == 0
    found = profiles.load(DEFAULT_OUTPUT)
    assert (len(found.ranks), found.cores_per_rank) == (2, 1)
    assert isinstance(run("profile", model).exception, BalancerError)


def test_one_rank_is_measured_alone_too(ranks, model, monkeypatch):
    """Four experts of 400 us, or 320 alone, and 50 us; 100 us and 20 us for each token."""
    monkeypatch.chdir(model)
    said = run("profile", model, columns=200).output
    assert "rank 0 takes 1.24 times as long as alone with 1 tokens per expert" in said
    assert "and 1.00 times with 64." in said
    found = profiles.load(DEFAULT_OUTPUT)
    few, more = 1650 / (50 + 4 * 320), 1650 / (100 + 4 * 16 * 20)
    assert found.contention == pytest.approx({1: few, 4: few, 16: more, 64: 1})
    ranks.alone = 1.1
    assert run("profile", model, "--force").exit_code == 0
    assert set(profiles.load(DEFAULT_OUTPUT).contention.values()) == {1.0}, "noise"


def test_the_help_says_what_is_written_and_what_the_exit_status_means():
    said = " ".join(run("profile", "--help", columns=200).output.replace("│", " ").split())
    assert "With --check exit status 1 if the profile no longer holds" in said
    assert "The profile to write, a new file." in said and "Replace the file of --output" in said
    assert "Measure nothing" not in said


@pytest.mark.parametrize(
    ("tile", "free", "in_turn", "said"),
    [
        (None, None, False, "together"),
        (64, 64, False, "together, tiles of 64"),
        (1, 12, True, "in turn, 12 tokens free"),
        (32, 32, True, "in turn, tiles of 32"),
    ],
)
def test_a_form_is_named(tile, free, in_turn, said):
    model = replace(CURVE, tile_tokens=tile, free_tokens=free, in_turn=in_turn)
    assert form_of(model) == said
