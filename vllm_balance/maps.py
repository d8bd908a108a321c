"""The placement map file: which expert sits in which slot, per layer of one model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import AwareDatetime, Field, model_validator

from vllm_balance import documents
from vllm_balance.documents import Document
from vllm_balance.errors import BalancerError
from vllm_balance.model_shape import ModelShape


class LayerMap(Document):
    """The slots of one MoE layer; slots of a rank are consecutive."""

    index: int = Field(ge=0)
    """Which layer of the model, counting dense ones."""
    physical_to_logical: list[int] = Field(min_length=1)
    """Logical expert of each slot."""


class PlacementMap(Document):
    """The file: `kind` and `format` first, so that another file is told apart."""

    kind: Literal["vllm-balance placement map"] = "vllm-balance placement map"
    format: Literal[1] = 1
    created: AwareDatetime
    policy: str
    sources: dict[str, str]
    """What it was made from, e.g. {"trace": ..., "profile": ...}; for people."""
    shape: ModelShape
    num_ranks: int = Field(ge=1)
    layers: list[LayerMap] = Field(min_length=1)
    checksum: str = ""
    """SHA-256 of everything above as compact JSON with sorted keys, hexadecimal."""

    @model_validator(mode="after")
    def _valid(self) -> Self:
        indices = [layer.index for layer in self.layers]
        if sorted(set(indices)) != indices:
            raise ValueError("layers must be in rising order, each once")
        if indices[-1] >= self.shape.num_layers:
            raise ValueError(
                f"layer {indices[-1]} is not one of the model's {self.shape.num_layers}"
            )
        sizes = {len(layer.physical_to_logical) for layer in self.layers}
        if len(sizes) != 1 or min(sizes) % self.num_ranks:
            raise ValueError(
                f"layers have {sorted(sizes)} slots; needed is one size, a multiple of "
                f"{self.num_ranks} ranks"
            )
        last = self.shape.num_experts - 1
        for layer in self.layers:
            held = set(layer.physical_to_logical)
            if (min(held), max(held), len(held)) != (0, last, last + 1):
                raise ValueError(
                    f"layer {layer.index} does not hold every expert from 0 to {last} and no other"
                )
        return self

    @property
    def num_physical(self) -> int:
        """Slots of each layer."""
        return len(self.layers[0].physical_to_logical)

    def sealed(self) -> PlacementMap:
        """This map with its checksum."""
        return self.model_copy(update={"checksum": self.computed_checksum()})

    def computed_checksum(self) -> str:
        """The checksum that the content asks for."""
        content = self.model_dump(mode="json", exclude={"checksum"})
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def require(self, *, shape: ModelShape, num_ranks: int, layers: Iterable[int]) -> None:
        """Returns if the map is for this model, this many ranks and has all these layers.

        The dtype is not compared: which experts a token uses hardly depends on it.

        Raises:
            BalancerError: with everything that differs, and what to do.
        """
        wrong = self.shape.differences(shape.model_copy(update={"dtype": self.shape.dtype}))
        if self.num_ranks != num_ranks:
            wrong.append(f"{self.num_ranks} ranks instead of {num_ranks}")
        missing = sorted(set(layers) - {layer.index for layer in self.layers})
        if missing:
            wrong.append(f"no entry for layer {', '.join(map(str, missing))}")
        if wrong:
            raise BalancerError(
                f"The placement map ({self.policy}, {self.created:%Y-%m-%d}) does not fit: "
                f"{'; '.join(wrong)}. Make one for this deployment with `vllm-balance place`."
            )

    def doubt(self, name: str) -> str | None:
        """What to say if the model of this name and shape may be another one; None if there is no
        doubt. Of names the last part counts, so that a folder is what it was downloaded from.
        """
        if Path(self.shape.name).name == Path(name).name:
            return None
        return (
            f"The placement map was made for {self.shape.name}, and {name} of the same shape is "
            f"served. If that is another model, it uses its experts differently: make a map from "
            f"a trace of it."
        )

    def placement_LP(self, layers: Iterable[int]) -> np.ndarray:
        """Expert of each slot of these layers, int32 [L, P]. They must be there (`require`)."""
        by_index = {layer.index: layer.physical_to_logical for layer in self.layers}
        return np.array([by_index[index] for index in layers], dtype=np.int32)


def load(path: Path) -> PlacementMap:
    """The map in a file.

    Raises:
        BalancerError: it is damaged, was changed by hand, or is no map.
    """
    found = documents.read(path, PlacementMap, "placement map", "vllm-balance place")
    if found.checksum != found.computed_checksum():
        raise BalancerError(
            f"The placement map {path} was changed after it was written: its checksum is "
            f"{found.checksum[:12] or 'empty'}, its content asks for "
            f"{found.computed_checksum()[:12]}. Make it anew with `vllm-balance place`."
        )
    return found


def save(path: Path, placement_map: PlacementMap) -> None:
    """Writes a map with its checksum. Raises BalancerError if the place is not writable."""
    documents.write(path, placement_map.sealed())
