"""How wrong the simulator was where it could be checked: written by bench/validation.py."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from vllm_balance import documents
from vllm_balance.simulate.quantities import Count, Share, Sourced

FILE = Path(__file__).parent / "validity.toml"


class Validity(Sourced):
    """Errors over all checked points; a predicted gain comes with a band of `gain_error`."""

    kind: Literal["vllm-balance validity"]
    format: Literal[1]
    points: Count
    gain_error: Share
    """Mean absolute error of predicted ratios between two balancers on one machine."""


def load() -> Validity:
    """The errors that this version of the simulator was published with."""
    return documents.read_toml(FILE, Validity, "validity file")
