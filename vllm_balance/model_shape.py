"""The shape of a model's MoE layers, from its config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from vllm_balance.documents import Document
from vllm_balance.errors import BalancerError

NAMES = {
    "num_layers": ("num_hidden_layers", "n_layer"),
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "top_k": ("num_experts_per_tok", "moe_top_k", "experts_per_token"),
    "hidden": ("hidden_size", "d_model"),
    "inner": ("moe_intermediate_size", "expert_intermediate_size", "intermediate_size"),
}
"""How the models that vLLM serves call these numbers, most specific name first."""


class ModelShape(Document):
    """What a profile and a map depend on; `name` is for people and is not compared."""

    name: str
    architecture: str
    num_layers: int = Field(ge=1)
    """All layers of the model, dense ones included."""
    num_experts: int = Field(ge=2)
    """Logical experts of a MoE layer."""
    top_k: int = Field(ge=1)
    hidden: int = Field(ge=1)
    inner: int = Field(ge=1)
    """Inner size of one expert."""
    dtype: str

    def differences(self, other: ModelShape) -> list[str]:
        """Fields besides the name that differ, as "hidden 2048 instead of 4096"."""
        return [
            f"{field} {getattr(self, field)} instead of {getattr(other, field)}"
            for field in type(self).model_fields
            if field != "name" and getattr(self, field) != getattr(other, field)
        ]


def from_config(path: Path) -> ModelShape:
    """The shape of the model in a folder or in a config.json.

    Raises:
        BalancerError: no such file, not JSON, or no MoE model that we know how to read.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_bytes())
    except OSError as error:
        raise BalancerError(
            f"The model's {file} cannot be read: {error.strerror}. Name a folder with a "
            f"config.json, or the file."
        ) from error
    except (ValueError, RecursionError) as error:
        raise BalancerError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise BalancerError(f"{file} holds a JSON {type(config).__name__}; an object is needed.")
    return from_mapping(config, name=file.resolve().parent.name, where=str(file))


def from_mapping(config: Mapping[str, Any], *, name: str, where: str) -> ModelShape:
    """The shape of the model with this content of config.json; `where` names it in messages.

    Raises:
        BalancerError: no MoE model that we know how to read.
    """
    inner = config.get("text_config")
    text = inner if isinstance(inner, dict) else config
    found: dict[str, Any] = {field: _first(text, names) for field, names in NAMES.items()}
    missing = [f"{' or '.join(NAMES[f])}" for f, value in found.items() if value is None]
    if missing:
        raise BalancerError(
            f"{where} describes no MoE model that can be profiled or placed: it has no "
            f"{'; no '.join(missing)}."
        )
    architectures = config.get("architectures") or "unknown"
    try:
        return ModelShape(
            name=name,
            architecture=architectures[0] if isinstance(architectures, list) else "unknown",
            dtype=text.get("dtype") or text.get("torch_dtype") or "bfloat16",
            **found,
        )
    except ValidationError as error:
        raise BalancerError(f"{where} has a value that no MoE model has: {error}.") from error


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)
