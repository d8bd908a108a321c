"""What is installed is what the tree and the lock say."""

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = ROOT / "configs" / "cpu.lock"


def wheel_of(source: Path, folder: Path) -> zipfile.ZipFile:
    """The wheel that pip builds from `source`, with the back-end that is installed."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(source)], check=True)
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Our wheel, built from a copy so that the build leaves nothing in the tree."""
    copy = tmp_path_factory.mktemp("tree")
    clean = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("vllm_balance", "kernels", "configs"):
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=clean)
    for file in ("pyproject.toml", PROJECT["readme"]):
        if (ROOT / file).exists():
            shutil.copy(ROOT / file, copy)
    return wheel_of(copy, tmp_path_factory.mktemp("wheel"))


def test_the_wheel_has_every_module_and_the_kernels_inside_the_package(
    wheel: zipfile.ZipFile,
) -> None:
    in_tree = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("vllm_balance/**/*.py")}
    in_tree |= {f"vllm_balance/{path.relative_to(ROOT)}" for path in ROOT.glob("kernels/**/*.py")}
    in_tree.add("vllm_balance/commands/report.html")
    assert any(name.startswith("vllm_balance/kernels/") for name in in_tree)
    assert in_tree <= set(wheel.namelist())


def test_the_wheel_has_what_the_simulator_knows(wheel: zipfile.ZipFile) -> None:
    simulate = "vllm_balance/simulate"
    wanted = {f"{simulate}/validity.toml"}
    for kind in ("hardware", "model"):
        files = (ROOT / simulate / f"{kind}_files").iterdir()
        wanted |= {f"{simulate}/{kind}_files/{file.name}" for file in files}
    assert len(wanted) > 10
    assert wanted <= set(wheel.namelist())


def test_the_wheel_adds_nothing_else_to_the_top_level(wheel: zipfile.ZipFile) -> None:
    top_level = {name.split("/")[0] for name in wheel.namelist()}
    assert top_level == {"vllm_balance", f"vllm_balance-{PROJECT['version']}.dist-info"}


def test_the_wheel_carries_the_entry_points(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    entry_points = ConfigParser()
    entry_points.read_string(wheel.read(name).decode())
    assert dict(entry_points["console_scripts"]) == PROJECT["scripts"]
    for group, wanted in PROJECT["entry-points"].items():
        assert dict(entry_points[group]) == wanted


def test_entry_points_can_be_imported_and_called() -> None:
    for group in (*PROJECT["entry-points"], "console_scripts"):
        ours = [e for e in importlib.metadata.entry_points(group=group) if e.dist is not None]
        for entry_point in (e for e in ours if e.dist.name == PROJECT["name"]):
            assert callable(entry_point.load())


def test_the_kernels_import_under_our_name_only() -> None:
    """From anywhere but the repository's root; there, transformers knows a bare folder by sight."""
    program = "import importlib.util as u; print(u.find_spec('vllm_balance.kernels') is not None,"
    program += "u.find_spec('kernels') is None)"
    command = [sys.executable, "-c", program]
    answer = subprocess.run(command, cwd="/", check=True, capture_output=True, text=True)
    assert answer.stdout.split() == ["True", "True"]


def test_transformers_does_not_take_our_folder_for_the_kernels_package() -> None:
    program = "from transformers.utils import is_kernels_available as f; print(f())"
    command = [sys.executable, "-c", program]
    answer = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert answer.stdout.split() == ["False"]


def test_the_vllm_distribution_is_metadata_only(tmp_path: Path) -> None:
    copy = shutil.copytree(
        ROOT / "configs" / "vllm-cpu-metadata",
        tmp_path / "source",
        ignore=shutil.ignore_patterns("build", "*.egg-info"),
    )
    names = wheel_of(copy, tmp_path).namelist()
    assert {name.split("/")[0] for name in names} == {"vllm-0.32.0+cpu.dist-info"}


def test_vllm_is_found_under_both_names_and_runs_on_the_cpu() -> None:
    from vllm.platforms import current_platform

    locked = importlib.metadata.version("vllm-cpu")
    assert importlib.metadata.version("vllm") == f"{locked}+cpu"
    assert current_platform.is_cpu()


def locked_versions() -> dict[str, str]:
    lines = [line for line in LOCK.read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-.]+==[^=<>~*; ]+", line) for line in lines), lines
    return dict(line.split("==") for line in lines)


def test_the_lock_pins_what_the_project_asks_for() -> None:
    locked = locked_versions()
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
    for requirement in map(Requirement, wanted + PROJECT["optional-dependencies"]["cpu"]):
        version = locked[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(version), f"{requirement}, locked {version}"


def test_the_lock_holds_the_cpu_build_of_torch_and_no_cuda() -> None:
    locked = locked_versions()
    assert locked["torch"].endswith("+cpu")
    assert not {"torchvision", "torchaudio", "torchcodec"} & locked.keys()
    assert not [name for name in locked if name.startswith(("nvidia", "cuda"))]


def test_this_environment_is_the_locked_one() -> None:
    found = {name: importlib.metadata.version(name) for name in locked_versions()}
    assert found == locked_versions(), "run `make env`"


def test_left_out_packages_are_not_imported_by_vllm() -> None:
    for name in ("torchvision", "torchaudio", "torchcodec"):
        assert importlib.util.find_spec(name) is None


def test_tracked_files_name_no_package_host_and_no_path_of_one_machine() -> None:
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    tracked = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    # Written in pieces, so that this file does not contain them itself.
    forbidden = re.compile("|".join(("pypi" + r"\.", "/wor" + "k/", "/op" + "t/", "/roo" + "t/")))
    found = []
    for name in filter(None, tracked.split("\0")):
        path = ROOT / name
        if (
            path.is_file()
            and not path.is_symlink()
            and forbidden.search(path.read_text("utf-8", "replace"))
        ):
            found.append(name)
    assert not found
