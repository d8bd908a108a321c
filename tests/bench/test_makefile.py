"""What `make bench-full` runs: all run files, of which `bench.run` leaves out what does not fit."""

import os
import subprocess

import pytest

from bench.provenance import ROOT


def planned(*variables):
    """The lines that `make bench-full` would run, settings of an outer make left out."""
    command = ["make", "--dry-run", "bench-full", *variables]
    environ = {"PATH": os.environ["PATH"]}
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def run_files(lines):
    """The run files in the line that runs them."""
    (line,) = [line for line in lines if "-m bench.run --fitting " in line]
    return {word.removeprefix("configs/runs/") for word in line.split() if word.endswith(".toml")}


@pytest.mark.parametrize("variables", [(), ("TRACES=/traces",)])
def test_every_run_file_without_a_benchmark_of_its_own_is_run(variables):
    every = {path.name for path in (ROOT / "configs" / "runs").glob("*.toml")}
    every -= {"recorder.toml", "recovery.toml"}
    lines = planned(*variables)
    assert run_files(lines) == every
    (line,) = [line for line in lines if "-m bench.run " in line]
    assert ("--traces /traces" in line) == bool(variables)
    assert any("bench.recovery --traces /traces" in line for line in lines) == bool(variables)
