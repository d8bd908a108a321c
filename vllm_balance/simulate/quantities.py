"""Numbers with a unit and a source, as hardware and model files hold them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Self

from pydantic import Field, model_validator

from vllm_balance.documents import Document


class Quantity(Document):
    """A number; `source` is a key of the file's table of sources."""

    value: float = Field(ge=0)
    source: str = Field(min_length=1)


class Bytes(Quantity):
    unit: Literal["byte"]


class BytesPerSecond(Quantity):
    value: float = Field(gt=0)
    unit: Literal["byte/s"]

    @property
    def per_us(self) -> float:
        """Bytes per microsecond."""
        return self.value / 1e6


class FlopPerSecond(Quantity):
    """Multiplications and additions count as one operation each."""

    value: float = Field(gt=0)
    unit: Literal["FLOP/s"]

    @property
    def per_us(self) -> float:
        """Operations per microsecond."""
        return self.value / 1e6


class Microseconds(Quantity):
    unit: Literal["us"]


class Ratio(Quantity):
    """A share of a peak, 0 to 1."""

    value: float = Field(gt=0, le=1)
    unit: Literal["1"]


class Share(Quantity):
    """Part of a whole, 0 to 1; may be 0."""

    value: float = Field(ge=0, le=1)
    unit: Literal["1"]


class BytesPerWeight(Quantity):
    value: float = Field(gt=0, le=8)
    unit: Literal["byte/weight"]


class Count(Document):
    """A whole number of things."""

    value: int = Field(ge=0)
    unit: Literal["1"]
    source: str = Field(min_length=1)


class Sourced(Document):
    """A file whose every quantity names one of its sources."""

    name: str = Field(min_length=1)
    sources: dict[str, str] = Field(min_length=1)
    """Where numbers are from, by the short name that quantities use."""

    @model_validator(mode="after")
    def _sources_exist(self) -> Self:
        used = {quantity.source for quantity in _quantities(self)}
        unknown = sorted(used - self.sources.keys())
        if unknown:
            raise ValueError(f"sources has no {', '.join(unknown)}; every constant needs a source")
        idle = sorted(self.sources.keys() - used)
        if idle:
            raise ValueError(f"no constant is from the source {', '.join(idle)}")
        return self


def _quantities(part: object) -> Iterator[Quantity | Count]:
    if isinstance(part, Quantity | Count):
        yield part
    elif isinstance(part, Document):
        for field in type(part).model_fields:
            yield from _quantities(getattr(part, field))
    elif isinstance(part, dict | list):
        for value in part.values() if isinstance(part, dict) else part:
            yield from _quantities(value)
