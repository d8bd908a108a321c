"""How wrong the simulator was where it could be checked: written by bench/validation.py."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from vllm_balance import documents
from vllm_balance.documents import Document
from vllm_balance.profiles import Profile
from vllm_balance.simulate.hardware import is_of
from vllm_balance.simulate.models import Model
from vllm_balance.simulate.quantities import Count, Share, Sourced

FILE = Path(__file__).parent / "validity.toml"


class Errors(Document):
    """Of predicted ratios between two balancers on one machine, absolute."""

    points: Count
    mean: Share
    """A predicted gain comes with a band of so much."""
    one_in_ten: Share
    """A tenth of the points were missed by more."""


class Validity(Sourced):
    """Errors over all checked points, by where the times of experts are from."""

    kind: Literal["vllm-balance validity"]
    format: Literal[1]
    profiled: Errors
    """Measured pairs of arms on CPUs that were profiled."""
    roofline: Errors
    """Published ratios on GPUs, which data sheets describe."""

    def of(self, profile: Profile | None, model: Model) -> Errors:
        """Those that count for a model on a machine: its experts' times may be a profile's."""
        return self.profiled if profile and is_of(profile, model) else self.roofline


def load() -> Validity:
    """The errors that this version of the simulator was published with."""
    return documents.read_toml(FILE, Validity, "validity file")
