"""The profile file: what the ranks of a deployment measured, and the curves fitted to it."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import AwareDatetime, Field, model_validator

from vllm_balance import documents
from vllm_balance.cost import CostModel, Fit
from vllm_balance.documents import Document
from vllm_balance.errors import BalancerError
from vllm_balance.model_shape import ModelShape

BOUND_VERSIONS = ("vllm", "torch")
"""Packages whose kernels were measured: another version is another profile."""
MAX_TOKENS = 2**31
"""Of an expert, in anything that a profile says."""


class Units(Document):
    """What the numbers of the file mean."""

    time: Literal["us"] = "us"
    tokens: Literal["(token, choice) pairs on the rank"] = "(token, choice) pairs on the rank"


class Point(Document):
    """One measured batch of one rank."""

    tokens_E: list[int] = Field(min_length=1)
    """Tokens of each activated expert, each at least 1."""
    time_us: float = Field(gt=0)
    """Median over the repeats, in the fastest of the rounds."""
    repeats: int = Field(ge=1)
    rounds_us: list[Annotated[float, Field(gt=0)]] = Field(default=[])
    """Median over the repeats in every round: what a rank's speed follows from. Empty: of one."""

    @model_validator(mode="after")
    def _positive(self) -> Self:
        if min(self.tokens_E) < 1 or max(self.tokens_E) > MAX_TOKENS:
            raise ValueError(f"tokens_E must be between 1 and {MAX_TOKENS} per activated expert")
        return self


class Curve(Document):
    """Coefficients of `vllm_balance.cost.CostModel` and how well they describe the points."""

    a_us: float = Field(ge=0)
    b_us: float = Field(ge=0)
    c_us: float = Field(ge=0)
    beta_us: float = Field(ge=0)
    tile_us: float = Field(ge=0)
    tile_tokens: int | None = Field(ge=1, le=MAX_TOKENS)
    free_tokens: int | None = Field(ge=1, le=MAX_TOKENS)
    in_turn: bool | None = None
    """Older files do not say it: their tiles of one token are of experts in turn."""
    knee_tokens: float | None = Field(ge=0)
    """Tokens of an expert that compute as long as its weights stream; null: they cost nothing."""
    r2: float = Field(le=1)
    median_relative_error: float = Field(ge=0)
    residual_us: list[float]

    @classmethod
    def of(cls, fit: Fit) -> Curve:
        """The entry of a fit."""
        model = fit.model
        knee = model.knee_tokens
        return cls(
            **asdict(model),
            knee_tokens=knee if np.isfinite(knee) else None,
            r2=fit.r2,
            median_relative_error=fit.median_relative_error,
            residual_us=list(fit.residual_us_N),
        )

    @property
    def model(self) -> CostModel:
        own = {field.name: getattr(self, field.name) for field in fields(CostModel)}
        if self.in_turn is None:
            own["in_turn"] = self.tile_tokens == 1
        return CostModel(**own)


class RankProfile(Document):
    """One rank: where it ran, its curve and its points."""

    rank: int = Field(ge=0)
    place: str
    """The core or device that it ran on."""
    curve: Curve
    points: list[Point] = Field(min_length=1)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if len(self.curve.residual_us) != len(self.points):
            raise ValueError("residual_us must have one entry per point")
        if not any((self.curve.b_us, self.curve.beta_us)):
            raise ValueError("a curve whose b_us and beta_us are both 0 says nothing")
        if self.curve.free_tokens is not None and self.curve.tile_tokens is None:
            raise ValueError("free_tokens has a meaning only beside tile_tokens")
        return self


class Profile(Document):
    """The file: `kind` and `format` first, so that another file is told apart."""

    kind: Literal["vllm-balance profile"] = "vllm-balance profile"
    format: Literal[2] = 2
    units: Units
    created: AwareDatetime
    device: str
    """Processor and kernel, e.g. "Intel Xeon ..., vec"."""
    versions: dict[str, str]
    shape: ModelShape
    cores_per_rank: int = Field(default=1, ge=1)
    """Cores that each rank computed with."""
    ranks: list[RankProfile] = Field(min_length=1)
    alone: list[Point] = Field(default=[])
    """Batches of rank 0 measured while the other ranks were idle: less time where ranks share the
    memory that they read. Empty: of one rank, or of an older file."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if [rank.rank for rank in self.ranks] != list(range(len(self.ranks))):
            raise ValueError("ranks must be 0, 1, 2 ... in this order")
        batches = [[point.tokens_E for point in rank.points] for rank in self.ranks]
        if any(of_rank != batches[0] for of_rank in batches):
            raise ValueError("all ranks must have points of the same batches")
        if any(point.tokens_E not in batches[0] for point in self.alone):
            raise ValueError("alone must have batches that the ranks have points of")
        return self

    @property
    def costs(self) -> tuple[CostModel, ...]:
        """The curve of each rank."""
        return tuple(rank.curve.model for rank in self.ranks)

    @property
    def contention(self) -> dict[float, float]:
        """How many times longer rank 0 takes beside the other ranks than alone, at least 1, by
        tokens per activated expert; empty if it was not measured."""
        beside = {tuple(point.tokens_E): point.time_us for point in self.ranks[0].points}
        return {
            sum(point.tokens_E) / len(point.tokens_E): max(
                1.0, beside[tuple(point.tokens_E)] / point.time_us
            )
            for point in self.alone
        }

    def require(
        self,
        *,
        shape: ModelShape | None = None,
        device: str | None = None,
        versions: dict[str, str] | None = None,
    ) -> None:
        """Returns if the profile was measured on the same; what is None is not compared.

        Raises:
            BalancerError: one paragraph with everything that differs.
        """
        wrong = [] if shape is None else self.shape.differences(shape)
        flag = ""
        if shape is not None and shape.dtype != self.shape.dtype:
            flag = f", with `--dtype {shape.dtype}`"
        if device is not None and device != self.device:
            wrong.append(f"device {self.device!r} instead of {device!r}")
        for package in BOUND_VERSIONS if versions is not None else ():
            found, needed = self.versions.get(package), (versions or {}).get(package)
            if found != needed:
                wrong.append(f"{package} {found} instead of {needed}")
        if wrong:
            raise BalancerError(
                f"The profile of {self.created:%Y-%m-%d} was measured on something else: "
                f"{'; '.join(wrong)}. Times do not carry over; run `vllm-balance profile` for "
                f"this model on this machine{flag}."
            )

    def costs_of(self, num_ranks: int) -> tuple[CostModel, ...]:
        """The curves of a deployment of `num_ranks` ranks; one measured rank stands for all.

        Raises:
            BalancerError: the profile has more than one rank, but not this many.
        """
        if len(self.ranks) not in (1, num_ranks):
            raise BalancerError(
                f"{num_ranks} ranks were asked for, and the profile has {len(self.ranks)}. Profile "
                f"that many (`vllm-balance profile MODEL --ranks {num_ranks}`), or one if all are "
                f"alike."
            )
        return self.costs if len(self.ranks) == num_ranks else self.costs * num_ranks


def load(path: Path) -> Profile:
    """The profile in a file. Raises BalancerError if it is damaged or not one."""
    return documents.read(path, Profile, "profile", "vllm-balance profile")
