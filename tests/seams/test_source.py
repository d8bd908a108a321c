"""Seams against the source of vLLM versions: the installed one and a recorded 0.33."""

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import vllm
from typer.testing import CliRunner
from vllm.platforms import current_platform

from vllm_balance import commands
from vllm_balance.commands.doctor import all_places, all_seams
from vllm_balance.errors import BalancerError
from vllm_balance.seams.source import problems, signatures

SEAMS = all_seams(cpu=True)
PLACES = all_places(cpu=True)
INSTALLED = Path(vllm.__file__).parents[1]
RECORDED = Path(__file__).parent / "vllm-0.33.0.json"
"""Made by `vllm-balance doctor --against vllm-0.33.0-*.whl --json`."""


def doctor(*arguments):
    runner = CliRunner(env={"COLUMNS": "300"})
    return runner.invoke(commands.app, ["doctor", *map(str, arguments)])


def test_the_installed_source_and_the_live_objects_agree():
    found = signatures(PLACES, INSTALLED)
    assert problems(PLACES, found) == {}
    assert [place.problem() for place in PLACES] == [None] * len(PLACES)
    assert {seam.target for seam in SEAMS if found[seam.target] is None} == {
        seam.target for seam in SEAMS if seam.only_if_missing
    }


def test_every_place_fits_vllm_0_33():
    recorded = json.loads(RECORDED.read_text())
    found = {seam["target"]: seam["parameters"] for seam in recorded["seams"]}
    assert set(found) == {place.target for place in PLACES}, "record vLLM 0.33 again"
    assert problems(PLACES, found) == {}


def test_a_changed_signature_and_a_missing_function_are_named():
    renamed = replace(SEAMS[0], parameters=("parser", "colour"))
    gone = replace(SEAMS[1], target=SEAMS[1].target + "_gone")
    assert problems([renamed, gone], signatures([renamed, gone], INSTALLED)) == {
        renamed.target: f"{renamed.target} has no parameter colour",
        gone.target: f"{gone.target} does not exist",
    }


def test_a_missing_class_and_a_missing_module_are_named_beside_the_others():
    no_class = replace(SEAMS[0], target="vllm.engine.arg_utils:NoSuchClass.add_cli_args")
    no_file = replace(SEAMS[0], target="vllm.no_such:Class.run", only_if_missing=True)
    seams = [no_class, no_file, SEAMS[1]]
    file = "vllm/engine/arg_utils.py"
    assert problems(seams, signatures(seams, INSTALLED)) == {
        no_class.target: f"{no_class.target}: this vLLM has no class NoSuchClass in {file}",
        no_file.target: f"{no_file.target}: this vLLM has no file vllm/no_such.py",
    }


def wheel(path, *names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "")
    return path


def test_what_holds_no_vllm_is_refused(tmp_path):
    (tmp_path / "text.whl").write_text("no archive")
    wheel(tmp_path / "other.whl", "other/version.py")
    for name, reason in (
        ("missing.whl", "No such file"),
        ("text.whl", "not a zip file"),
        ("other.whl", "no item named"),
        ("missing", "neither a wheel nor a folder"),
        (".", "neither a wheel nor a folder"),
    ):
        with pytest.raises(BalancerError, match=rf"--against names .*{reason}.*Name a wheel"):
            signatures(SEAMS, tmp_path / name)


def test_doctor_prints_what_a_wheel_lacks_as_rows(tmp_path):
    ended = doctor("--against", wheel(tmp_path / "vllm.whl", "vllm/version.py"), "--json")
    assert ended.exit_code == 1, ended.output
    rows = json.loads(ended.output)["seams"]
    assert len(rows) == len(PLACES)
    assert all("this vLLM has no file" in row["state"] for row in rows)
    assert {tuple(row["parameters"] or ()) for row in rows} == {()}


def test_doctor_says_of_a_source_that_no_server_was_run_with_it():
    ended = doctor("--against", INSTALLED)
    assert ended.exit_code == 0, ended.output
    said = "can be used, but it is untested here: only its functions' parameters were compared"
    assert said in " ".join(ended.output.split())


@pytest.mark.parametrize(
    ("version", "is_cpu", "untested"),
    [
        ("0.32.0", True, None),
        ("0.32.1+cpu", True, None),
        ("0.33.0", True, "and this is vLLM 0.33.0 on CPU"),
        ("0.32.0", False, "and this is vLLM 0.32.0 on H100"),
    ],
)
def test_doctor_says_where_no_server_was_run(monkeypatch, version, is_cpu, untested):
    monkeypatch.setattr(vllm, "__version__", version)
    if not is_cpu:
        monkeypatch.setattr(type(current_platform), "is_cpu", lambda *_: False)
        monkeypatch.setattr(type(current_platform), "get_device_name", lambda *_: "H100")
    ended = doctor()
    assert ended.exit_code == 0, ended.output
    text = " ".join(ended.output.split())
    assert ("--moe-balancer can be used." in text) == (untested is None)
    if untested is not None:
        assert "but it is untested here: servers were run on x86 CPUs with vLLM 0.32.0" in text
        assert untested in text
