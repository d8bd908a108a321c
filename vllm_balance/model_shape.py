"""The shape of a model's MoE layers, and which layers these are, from its config.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pydantic import Field, ValidationError

from vllm_balance import documents
from vllm_balance.documents import Document
from vllm_balance.errors import BalancerError

NAMES = {
    "num_layers": ("num_hidden_layers", "n_layer"),
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "top_k": ("num_experts_per_tok", "moe_top_k", "experts_per_token", "moe_k", "moe_topk"),
    "hidden": ("hidden_size", "d_model"),
    "inner": ("moe_intermediate_size", "expert_intermediate_size", "intermediate_size"),
}
"""How the models that vLLM serves call these numbers, most specific name first."""
_FIRST_MOE_LAYER = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
_EVERY_NTH = ("decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_interval")
_PERIOD_AND_OFFSET = ("expert_layer_period", "expert_layer_offset")
_KIND_OF_LAYER: dict[str, Callable[[Any], bool]] = {
    "mlp_layer_types": lambda kind: kind == "sparse",
    "hybrid_override_pattern": lambda kind: kind == "E",
    "moe_layer_freq": bool,
}
"""Key of a configuration with an entry for each layer -> whether the entry says MoE."""


class ModelShape(Document):
    """What a profile depends on, and but for `dtype` a map; `name` is for people and is not
    compared."""

    name: str
    """As `name_of` says it."""
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


def from_config(model: str | Path) -> ModelShape:
    """The shape of a model.

    Args:
        model: its folder, its config.json, or its name on Hugging Face, if it was downloaded.

    Raises:
        BalancerError: no such model, not JSON, or no MoE model that we know how to read.
    """
    return from_mapping(_read(model), name=name_of(model), where=str(_file_of(model)))


def layers_of(model: str | Path) -> tuple[int, ...]:
    """Indices of the MoE layers of a model. Arguments and errors as of `from_config`."""
    text = _text_of(_read(model))
    number = {"num_hidden_layers": _first(text, NAMES["num_layers"])}
    try:
        return moe_layers(SimpleNamespace(**{**text, **number}))
    except (TypeError, ValueError) as error:
        raise BalancerError(
            f"{_file_of(model)} does not say in a known way which layers are MoE layers: {error}."
        ) from error


def quantisation_of(model: str | Path) -> str | None:
    """How a model's weights are quantised, as vLLM calls it, e.g. "fp8"; None if they are not.
    Arguments and errors as of `from_config`."""
    config = _read(model)
    found = config.get("quantization_config") or _text_of(config).get("quantization_config")
    if not isinstance(found, dict):
        return None
    return str(found.get("quant_method", "an unnamed way"))


def name_of(model: str | Path) -> str:
    """What people call a model: its name on Hugging Face, if that is given or its folder is one of
    Hugging Face's cache; else the name of its folder."""
    path = Path(model)
    if not path.exists():
        return str(path)
    folder = (path if path.is_dir() else path.parent).resolve()
    cached = folder.parent.parent.name
    if folder.parent.name == "snapshots" and cached.startswith("models--"):
        return cached.removeprefix("models--").replace("--", "/", 1)
    return folder.name


def _read(model: str | Path) -> dict[str, Any]:
    """The content of a model's config.json. Raises BalancerError if there is none."""
    file = _file_of(model)
    try:
        config = json.loads(file.read_bytes())
    except OSError as error:
        reason = f"{file}: {error.strerror}"
        if file == Path(model) and not file.exists():
            reason = (
                "there is no such folder or file, and no config.json of a model of this name in "
                "Hugging Face's cache (nothing is downloaded)"
            )
        raise BalancerError(
            f"The model {model} cannot be read: {reason}. Name a folder with a config.json, the "
            f"file, or a model that was downloaded (`hf download NAME config.json`)."
        ) from error
    except (ValueError, RecursionError) as error:
        raise BalancerError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise BalancerError(f"{file} holds a JSON {type(config).__name__}; an object is needed.")
    return config


def _file_of(model: str | Path) -> Path:
    """The config.json of a model, whether or not it is there."""
    path = Path(model)
    if path.is_dir():
        return path / "config.json"
    cached = None if path.exists() else _cached(str(path))
    return path if cached is None else Path(cached)


def _cached(name: str) -> str | None:
    """The config.json of the model of this name in Hugging Face's cache, or None."""
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(name, "config.json")
    except (ImportError, ValueError):  # It is not installed; no model can have this name.
        return None
    return found if isinstance(found, str) else None


def from_mapping(config: Mapping[str, Any], *, name: str, where: str) -> ModelShape:
    """The shape of the model with this content of config.json; `where` names it in messages.

    Raises:
        BalancerError: no MoE model that we know how to read.
    """
    text = _text_of(config)
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
        raise BalancerError(
            f"{where} has a value that is not understood. {documents.explain(error)}"
        ) from error


def _text_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a configuration that describes the language model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)


def moe_layers(text: Any) -> tuple[int, ...]:
    """Indices of the MoE layers, by what the configurations of models say about dense ones."""
    named = _named_layers(text)
    if named is not None:
        return named
    first = max(_number(text, key) or 0 for key in _FIRST_MOE_LAYER)
    dense = set(getattr(text, "mlp_only_layers", None) or ())
    step = max(_number(text, key) or 1 for key in _EVERY_NTH)
    from_first = _number(text, "moe_layer_freq") or 1
    period, offset = (_number(text, key) or 0 for key in _PERIOD_AND_OFFSET)
    return tuple(
        layer
        for layer in range(first, text.num_hidden_layers)
        if layer not in dense
        and (layer + 1) % step == 0
        and layer % from_first == 0
        and (not period or layer % period == offset)
    )


def _named_layers(text: Any) -> tuple[int, ...] | None:
    """The MoE layers where a configuration says of each layer what it is; None if it does not."""
    if listed := getattr(text, "moe_layers", None):
        return tuple(listed)
    if listed := getattr(text, "moe_layers_enum", None):
        return tuple(int(layer) for layer in str(listed).split(","))
    for key, is_moe in _KIND_OF_LAYER.items():
        kinds = getattr(text, key, None)
        if isinstance(kinds, str | list | tuple) and kinds:
            return tuple(layer for layer, kind in enumerate(kinds) if is_moe(kind))
    return None


def _number(text: Any, key: str) -> int | None:
    value = getattr(text, key, None)
    return value if isinstance(value, int) else None
