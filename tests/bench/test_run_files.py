"""Run files that are others with changes, and versions of them that rows were made with."""

import subprocess

import pytest

from bench import run_files
from bench.provenance import config_hash

BASE = """
title = "Decode"
flags = ["--a"]
[model]
preset = "small"
num_layers = 2
[arms.static]
[arms.eplb]
redundancy = 1.5
"""
CHANGED = """
base = "base.toml"
title = "Decode in bfloat16"
[model]
dtype = "bfloat16"
[arms.eplb]
redundancy = 1.25
[load]
requests = 3
"""
BOTH = {
    "title": "Decode in bfloat16",
    "flags": ["--a"],
    "model": {"preset": "small", "num_layers": 2, "dtype": "bfloat16"},
    "arms": {"static": {}, "eplb": {"redundancy": 1.25}},
    "load": {"requests": 3},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A repository with one run file, and one that came later and changes it."""
    folder = tmp_path / "configs" / "runs"
    folder.mkdir(parents=True)
    monkeypatch.setattr(run_files, "ROOT", tmp_path)
    monkeypatch.setattr(run_files, "FOLDER", folder)
    git(tmp_path, "init", "--quiet")
    commit(folder, "base.toml", BASE)
    commit(folder, "changed.toml", CHANGED)
    return folder


def git(folder, *arguments):
    identity = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True)


def commit(folder, name, text):
    (folder / name).write_text(text)
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", name)


def test_changes_are_laid_over_the_base_key_by_key(folder):
    assert run_files.read(folder / "changed.toml") == BOTH
    (folder / "again.toml").write_text('base = "changed.toml"\n[model]\nnum_layers = 4')
    assert run_files.read(folder / "again.toml") == BOTH | {
        "model": {"preset": "small", "num_layers": 4, "dtype": "bfloat16"}
    }


def test_settings_are_found_by_their_hash_whichever_of_the_two_files_was_changed(folder):
    commit(folder, "base.toml", BASE.replace("num_layers = 2", "num_layers = 3"))
    commit(folder, "changed.toml", CHANGED.replace("requests = 3", "requests = 4"))
    (folder / "changed.toml").write_text(CHANGED.replace("requests = 3", "requests = 5"))
    for layers, requests in ((2, 3), (3, 3), (3, 4), (3, 5)):
        expected = BOTH | {
            "model": BOTH["model"] | {"num_layers": layers},
            "load": {"requests": requests},
        }
        assert run_files.with_hash("changed", config_hash(expected)) == expected


def test_rows_of_no_version_are_an_error_that_names_them(folder):
    with pytest.raises(LookupError, match=r"changed\.toml has the hash 0123456789ab"):
        run_files.with_hash("changed", "0123456789ab")


def test_a_base_that_is_not_there_is_an_error(folder):
    (folder / "lone.toml").write_text('base = "missing.toml"')
    with pytest.raises(FileNotFoundError, match=r"missing\.toml"):
        run_files.read(folder / "lone.toml")
