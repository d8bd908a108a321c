"""Which code a row depends on: that which measures; tests/bench/test_gate.py has the servers'."""

import ast
import subprocess

import pytest

from bench import provenance
from bench.provenance import REPORTING, ROOT

MEASURING = ("run", "turn", "starts", "load", "client", "server", "starter", "slow_rank", "placed")


@pytest.fixture
def tree(monkeypatch, tmp_path):
    """A repository with some modules of bench and a file of rows, all committed."""
    for name in ("bench/turn.py", "bench/tables.py", "bench/results/decode.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    own = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], [*own, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "counts"),
    [("bench/turn.py", True), ("bench/tables.py", False), ("bench/results/decode.jsonl", False)],
)
def test_code_that_measures_counts_and_tables_do_not(tree, name, counts):
    before = provenance.harness()
    assert not provenance.commit().endswith("+")
    (tree / name).write_text("2")
    assert (provenance.harness() != before) == counts
    assert provenance.commit().endswith("+") == counts


def imported(name: str) -> set[str]:
    """Modules of bench that a module of bench imports."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / "bench" / f"{name}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "bench":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bench."):
            found.add(node.module.removeprefix("bench."))
    return found


def test_no_row_depends_on_what_is_said_to_report():
    reached, ahead = set(), {"run"}
    while ahead:
        name = ahead.pop()
        reached.add(name)
        ahead |= imported(name) - reached
    assert reached >= set(MEASURING)
    assert not reached & set(REPORTING)
    assert all((ROOT / "bench" / f"{name}.py").is_file() for name in REPORTING)
