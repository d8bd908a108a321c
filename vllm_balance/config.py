"""The one door for settings: the flag, the file and ``additional_config`` end up here.

``vllm serve --moe-balancer metro --moe-balancer-config FILE`` and
``LLM(..., additional_config={"moe_balancer": {...}})`` mean the same; the merged settings travel
to every process in ``VllmConfig.additional_config["moe_balancer"]`` and are part of vLLM's config
hash.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from vllm_balance import documents
from vllm_balance.errors import RAISED, BalancerError, unknown
from vllm_balance.placement.online import OnlineSettings
from vllm_balance.recording import RecordSettings
from vllm_balance.replay import STRATEGY
from vllm_balance.replay_rows import ReplaySettings

KEY = "moe_balancer"
"""Key of our settings in ``VllmConfig.additional_config``."""

BalancerName = Literal[
    "static",
    "eplb",
    "first_copy",
    "metro",
    "gem",
    "exflow",
    "harmoeny",
    "harmoeny_paper",
    "shadow",
    "even_split",
]
BALANCERS: tuple[str, ...] = get_args(BalancerName)
_STRATEGY_OF = "VLLM_MOE_ROUTING_SIMULATION_STRATEGY"
"""vLLM's variable that names what takes the place of its routers."""
_SET_UP = "VLLM_BALANCE_SET_UP"
"""Names the process that set up a deployment, in those that it starts."""
FETCHES = ("harmoeny", "harmoeny_paper", "shadow", "even_split")
"""Balancers that fetch experts into dynamic slots."""
LOADED_BY_MAP = ("gem", "exflow")
"""Balancers that place experts by a map instead of by vLLM's EPLB; they stay there unless `online`
moves them."""
DEFAULT_REDUNDANCY = 1.25
"""Physical / logical experts when a balancer that uses replicas is asked for without a number."""
DEFAULT_DYNAMIC_SLOTS = 8
"""Dynamic slots per rank and layer without a number; fewer if there are fewer foreign experts."""


class BalancerConfig(BaseModel):
    """Settings of one balancer; every field is a key of the configuration file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: BalancerName
    """Which balancer."""
    num_redundant_experts: int | None = Field(default=None, ge=0)
    """Physical experts beyond the logical ones, in each layer, over all ranks."""
    redundancy: float | None = Field(default=None, ge=1.0, le=16.0)
    """The same as a ratio, physical / logical experts, e.g. 1.5."""
    window_size: int = Field(default=1000, ge=1)
    """Steps of load that vLLM's EPLB looks at when it places experts."""
    step_interval: int = Field(default=3000, ge=1)
    """Steps between two placements by vLLM's EPLB; the first comes after a quarter of it."""
    knee_tokens: float | None = Field(default=None, gt=0)
    """Tokens of an expert that take as long to compute as its weights to stream. Above this mean
    per active expert a batch counts as compute-bound, so that metro spreads tokens evenly. For
    balancers that fetch one expert with `knee_tokens` + q makes it compute-bound too."""
    free_tokens: float | None = Field(default=None, ge=0)
    """Where ranks compute their experts in turn (CPU): tokens of an expert that streaming its
    weights hides. With it metro spreads tokens if the slowest rank then ends sooner; balancers that
    fetch have no use for it."""
    exchange: Literal["auto", "after_gather", "all_reduce"] = "auto"
    """How data-parallel ranks learn the global counts; see docs/configuration.md."""
    record: RecordSettings | None = None
    """Records what the router chooses into a new file; see docs/recording.md."""
    map: str | None = Field(default=None, min_length=1)
    """Placement map (`vllm-balance place`) that the weights are loaded by."""
    dynamic_slots: int | None = Field(default=None, ge=2)
    """Slots per rank and layer that hold fetched experts; balancers that fetch only."""
    threshold_tokens: int | None = Field(default=None, ge=1)
    """q, the fewest tokens that an expert is fetched for, and the time of a fetch. Default: derived
    at start from the measured speeds of this device; a smaller number makes fetches look cheaper
    than they are."""
    prefetch: Literal["async", "sync"] | None = None
    """Whether experts are fetched beside the computation (the default) or before it."""
    look_ahead: Literal["router", "off"] | None = None
    """Whether a layer lets the next one fetch early, by the next router on its own inputs."""
    profile: str | None = Field(default=None, min_length=1)
    """Measured cost curves (`vllm-balance profile`): the knee, unless `knee_tokens` names one, and
    the time of a token that q is derived from."""
    online: OnlineSettings | None = None
    """Only gem: moves a few experts while serving, when that pays."""
    replay: ReplaySettings | None = None
    """Benchmarks only: replaces the router's choice by a seeded skew or a recorded trace."""

    @field_validator("free_tokens")
    @classmethod
    def _beside_a_knee(cls, free_tokens: float | None, info: ValidationInfo) -> float | None:
        if free_tokens is not None and info.data.get("knee_tokens") is None:
            raise ValueError("it needs `knee_tokens` beside it; omit both for the defaults")
        if free_tokens is not None and info.data.get("name") in FETCHES:
            raise ValueError(
                "with it metro compares two ways to serve a batch; a balancer that fetches decides "
                "by `knee_tokens` and `threshold_tokens`. Omit it"
            )
        return free_tokens

    @property
    def replicates(self) -> bool:
        """Whether this balancer can use more than one copy of an expert."""
        if self.name in LOADED_BY_MAP:
            return bool(self.num_redundant_experts) or (self.redundancy or 1.0) > 1.0
        return self.name != "static"

    @property
    def fetches(self) -> bool:
        """Whether this balancer fetches experts into dynamic slots."""
        return self.name in FETCHES

    @property
    def uses_eplb(self) -> bool:
        """Whether it needs the state of vLLM's EPLB: maps and the exchange of weights."""
        return self.replicates or self.online is not None

    @property
    def stays(self) -> bool:
        """Whether vLLM's EPLB leaves every expert in the slot that it was loaded into."""
        return self.fetches or self.name in LOADED_BY_MAP or not self.replicates

    @property
    def without_effect(self) -> list[str]:
        """Keys that were given and that this balancer does not read."""
        has_regimes = self.name == "metro" or self.fetches
        reads = {
            "window_size": not self.stays,
            "step_interval": not self.stays,
            "knee_tokens": has_regimes,
            "free_tokens": self.name == "metro",
            "profile": has_regimes or self.online is not None,
        }
        return [key for key, read in reads.items() if not read and key in self.model_fields_set]

    @property
    def moves(self) -> bool:
        """Whether experts move from slot to slot while serving, so that their weights do: by vLLM's
        EPLB, or by `online`."""
        return not self.stays or self.online is not None


def parse(settings: Any) -> BalancerConfig:
    """Checked settings from a mapping, or from a bare balancer name.

    Raises:
        BalancerError: unknown balancer, unknown key (with the nearest one), wrong value.
    """
    if isinstance(settings, str):
        settings = {"name": settings}
    if not isinstance(settings, Mapping):
        raise BalancerError(
            f"moe_balancer was given as {type(settings).__name__}; it takes a balancer's name "
            f"or a table of settings, e.g. {{'name': 'metro', 'redundancy': 1.5}}."
        )
    if "name" not in settings:
        raise BalancerError(
            f"The settings of the MoE balancer name no balancer. Pass --moe-balancer NAME or put "
            f"`name` into the configuration; NAME is one of {', '.join(BALANCERS)}."
        )
    if settings["name"] not in BALANCERS:
        raise BalancerError(unknown("balancer", str(settings["name"]), BALANCERS))
    try:
        return BalancerConfig.model_validate(dict(settings))
    except ValidationError as error:
        raise BalancerError(_explain(error)) from error


def read(name: str | None, source: str | None, record: str | None = None) -> dict[str, Any]:
    """Settings from ``--moe-balancer``, ``--moe-balancer-config`` and ``--moe-record``.

    A recording without a named balancer gets ``static``, which changes nothing about placement.

    Raises:
        BalancerError: the file is missing or malformed (with the line), or two flags say different
            things.
    """
    settings = _load(source) if source is not None else {}
    _require_no_document(settings, source)
    if record is not None:
        recording = settings.setdefault("record", {})
        if not isinstance(recording, dict) or recording.setdefault("file", record) != record:
            raise BalancerError(
                f"--moe-record asks for {record!r} and --moe-balancer-config for {recording!r}. "
                f"Name one file: leave `file` out of `record`, or remove the flag."
            )
        if name is None:
            settings.setdefault("name", "static")
    if name is not None:
        if settings.get("name", name) != name:
            raise BalancerError(
                f"--moe-balancer asks for {name!r} and --moe-balancer-config for "
                f"{settings['name']!r}. Name one balancer: leave `name` out of the configuration "
                f"or remove the flag."
            )
        settings["name"] = name
    return parse(settings).model_dump(mode="json", exclude_unset=True)


def _require_no_document(settings: dict[str, Any], source: str | None) -> None:
    """Raises BalancerError if a map or a profile was given for the settings that name one."""
    kind = str(settings.get("kind", ""))
    if kind.startswith("vllm-balance "):
        what = kind.removeprefix("vllm-balance ")
        key = "map" if "map" in what else "profile"
        raise BalancerError(
            f"--moe-balancer-config names {source!r}, which is a {what} and no settings. Name it "
            f"in them: --moe-balancer-config '{json.dumps({key: source})}'."
        )


def _load(source: str) -> dict[str, Any]:
    text = source.strip()
    if text.startswith("{"):
        return _parse_json(text, "--moe-balancer-config")
    path = documents.expanded(source)
    try:
        if not path.is_file():
            raise BalancerError(
                f"--moe-balancer-config names {source!r}, which is not a file (looked in "
                f"{path.resolve().parent}). It takes a .toml or .json file, or JSON that starts "
                f"with '{{'."
            )
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BalancerError(
            f"--moe-balancer-config names {source!r}, which cannot be read: {error.strerror}. Let "
            f"the user that starts the server read the file and its folder, or pass the settings "
            f"as JSON that starts with '{{'."
        ) from error
    except UnicodeDecodeError as error:
        raise BalancerError(f"{path} is not a text file in UTF-8: {error}.") from error
    if path.suffix == ".json":
        return _parse_json(content, str(path))
    try:
        return tomllib.loads(content)
    except tomllib.TOMLDecodeError as error:
        raise BalancerError(
            f"{path} is not valid TOML: {error}. See docs/configuration.md for an example."
        ) from error


def _parse_json(text: str, where: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except json.JSONDecodeError as error:
        raise BalancerError(
            f"{where} is not valid JSON: {error.msg} (at line {error.lineno}, "
            f"column {error.colno})."
        ) from error
    if not isinstance(settings, dict):
        raise BalancerError(f"{where} holds a JSON {type(settings).__name__}; an object is needed.")
    return settings


def _explain(error: ValidationError) -> str:
    parts = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            parts.append(unknown("key", where, _keys_beside(item["loc"])))
        else:
            said = item["msg"].removeprefix(RAISED)
            parts.append(f"`{where}` is {item['input']!r}: {said}.")
    return "The settings of the MoE balancer are wrong. " + " ".join(parts)


def _keys_beside(location: tuple[int | str, ...]) -> list[str]:
    """The keys, written in full, that the table around an unknown key may hold."""
    table: type[BaseModel] = BalancerConfig
    for name in location[:-1]:
        kinds = (table.model_fields[str(name)].annotation,)
        kinds = get_args(kinds[0]) or kinds
        table = next(k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel))
    prefix = "".join(f"{name}." for name in location[:-1])
    return [prefix + key for key in table.model_fields]


def route_by_replay() -> None:
    """Lets vLLM take the experts of each token from our replay, in processes started later."""
    os.environ[_STRATEGY_OF] = STRATEGY


def route_by_own_routers() -> None:
    """Takes that back, if a model before this one was replayed."""
    if os.environ.get(_STRATEGY_OF) == STRATEGY:
        del os.environ[_STRATEGY_OF]


def note_set_up() -> None:
    """Tells all processes that this one starts that a deployment was set up here."""
    os.environ[_SET_UP] = str(os.getpid())


def was_set_up_elsewhere() -> bool:
    """Whether a process that started this one, directly or not, set the deployment up."""
    return os.environ.get(_SET_UP, str(os.getpid())) != str(os.getpid())


def plugins_allowed() -> bool:
    """Whether vLLM's allow-list of plugins lets ours in."""
    allowed = os.environ.get("VLLM_PLUGINS")
    return allowed is None or KEY in allowed.split(",")
