"""Seams against the source of vLLM versions: the installed one and a recorded 0.33."""

import ast
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import vllm
from typer.testing import CliRunner
from vllm.platforms import current_platform

import vllm_balance
from vllm_balance import commands
from vllm_balance.commands.doctor import all_places, all_seams
from vllm_balance.errors import BalancerError
from vllm_balance.seams.source import problems, signatures

SEAMS = all_seams()
PLACES = all_places()
INSTALLED = Path(vllm.__file__).parents[1]
RECORDED = Path(__file__).parent / "vllm-0.33.0.json"
"""Made by `vllm-balance doctor --against vllm-0.33.0-*.whl --json`."""

PUBLIC = {
    "vllm": "for its version, which says whether the rest is known",
    "vllm.config.CUDAGraphMode": "an enumeration, of which a value is compared",
    "vllm.envs": "settings, of which one is read",
    "vllm.logger.init_logger": "for plugins, as docs of vLLM say",
    "vllm.platforms.CpuArchEnum": "an enumeration, of which a value is compared",
    "vllm.platforms.current_platform": "for plugins, as docs of vLLM say",
    "vllm.v1.worker.cpu_worker.CPUWorker": "for CPUs only; a subclass of Worker, which is checked",
}
"""What is imported of vLLM and not checked: why."""


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


def imported_of_vllm() -> dict[str, Path]:
    """Every full name that the package imports of vLLM -> a file that does."""
    found = {}
    for file in Path(vllm_balance.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name: file for name in names if name.partition(".")[0] == "vllm"}
    return found


def is_checked(name: str) -> bool:
    """Whether doctor looks at an imported name, or at a function of what it names."""
    module, _, own = name.rpartition(".")
    for place in PLACES:
        defined_in, _, path = place.target.partition(":")
        if name == defined_in:
            return True
        # A package may give again what a module in it defines.
        within = f"{defined_in}.".startswith(f"{module}.")
        if within and path.partition(".")[0] == own:
            return True
    return False


def test_doctor_checks_what_is_imported_of_vllm():
    imported = imported_of_vllm()
    assert "vllm.distributed.eplb.eplb_state.EplbState" in imported
    assert is_checked("vllm.distributed.get_ep_group") and not is_checked("vllm.distributed.other")
    unknown = imported.keys() - PUBLIC.keys()
    assert {name: imported[name].name for name in unknown if not is_checked(name)} == {}
    assert imported.keys() >= PUBLIC.keys(), "a row is of no use"


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
