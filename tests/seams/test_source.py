"""Seams against the source of vLLM versions: the installed one and a recorded 0.33."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import vllm

from vllm_balance.commands.doctor import all_seams
from vllm_balance.errors import BalancerError
from vllm_balance.seams.source import problems, signatures

SEAMS = all_seams(cpu=True)
RECORDED = Path(__file__).parent / "vllm-0.33.0.json"
"""Made by `vllm-balance doctor --against vllm-0.33.0-*.whl --json`."""


def test_the_installed_source_and_the_live_objects_agree():
    found = signatures(SEAMS, Path(vllm.__file__).parents[1])
    assert problems(SEAMS, found) == []
    assert {seam.target for seam in SEAMS if found[seam.target] is None} == {
        seam.target for seam in SEAMS if seam.only_if_missing
    }


def test_every_seam_fits_vllm_0_33():
    recorded = json.loads(RECORDED.read_text())
    found = {seam["target"]: seam["parameters"] for seam in recorded["seams"]}
    assert set(found) == {seam.target for seam in SEAMS}, "record vLLM 0.33 again"
    assert problems(SEAMS, found) == []


def test_a_changed_signature_and_a_missing_function_are_named():
    source = Path(vllm.__file__).parents[1]
    renamed = replace(SEAMS[0], parameters=("parser", "colour"))
    gone = replace(SEAMS[1], target=SEAMS[1].target + "_gone")
    complaints = problems([renamed, gone], signatures([renamed, gone], source))
    assert complaints == [
        f"{renamed.target} has no parameter colour",
        f"{gone.target} does not exist",
    ]


def test_a_missing_class_is_an_error(tmp_path):
    lost = replace(SEAMS[0], target="vllm.engine.arg_utils:NoSuchClass.add_cli_args")
    with pytest.raises(BalancerError, match="no class NoSuchClass"):
        signatures([lost], Path(vllm.__file__).parents[1])
    with pytest.raises(BalancerError, match="neither a wheel nor a folder"):
        signatures(SEAMS, tmp_path)
