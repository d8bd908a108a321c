"""The hardware file: what one rank and the links between ranks can do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from vllm_balance import profiles
from vllm_balance.documents import Document
from vllm_balance.errors import BalancerError
from vllm_balance.profiles import Profile
from vllm_balance.simulate import catalogue
from vllm_balance.simulate.quantities import (
    Bytes,
    BytesPerSecond,
    Count,
    FlopPerSecond,
    Microseconds,
    Ratio,
    Share,
    Sourced,
)

if TYPE_CHECKING:
    from vllm_balance.simulate.models import Model

Number = Literal["float32", "float16", "float8", "float4"]
"""Formats that arithmetic runs in; float16 stands for bfloat16 too."""
NUMBER_OF: dict[str, Number] = {
    "bfloat16": "float16",
    "float16": "float16",
    "float32": "float32",
}
"""Format of the arithmetic of a dtype that a model is served and profiled in."""


class Link(Document):
    """A connection: a message of n bytes takes latency + n / bandwidth."""

    latency: Microseconds
    """Of a whole collective operation over it, launch included, with no bytes."""
    bandwidth: BytesPerSecond
    """One direction, per rank, as reached by large messages."""


class Efficiency(Document):
    """Shares of the peaks that kernels reach."""

    expert_streaming: Ratio
    expert_compute: Ratio
    expert_exposed: Share
    """As dense_exposed, for experts that run in turn."""
    dense_streaming: Ratio
    dense_compute: Ratio
    attention_compute: Ratio
    """Of scores and weighted sums, against the 16-bit peak."""
    dense_exposed: Share
    """Share of the time to stream weights that arithmetic cannot hide: 0 on a GPU; a CPU core
    unpacks weights before it multiplies."""
    served_experts: Ratio | None = None
    """Share of a profile's speed that experts reach in a server, where they have neither caches
    nor memory for themselves; all of it if not said."""


class Tiles(Document):
    """How grouped kernels round tokens up."""

    compute_tokens: Count
    """An expert's tokens are computed in multiples of this."""
    stream_tokens: Count
    """Each further tile of so many tokens reads the expert's weights again ..."""
    stream_share: Ratio
    """... at this share of the first time (TEMPO, arXiv 2608.13057: b2 / b)."""


class Fixed(Document):
    """Times that depend on no size."""

    experts: Microseconds
    """Kernels of one layer's experts, without tokens."""
    layer: Microseconds
    """Norms, router, rotary embedding and launches of one layer, whatever its tokens."""
    step: Microseconds
    """Scheduling and launching a step."""
    token: Microseconds
    """Sampling, answering and streaming each token that comes out, beside the step."""
    prompt_value: Microseconds | None = None
    """Of each value of a prompt's hidden states, queries and keys that a layer's norms, residuals
    and rotary embedding go over; nothing if not said. A GPU does them in passing."""
    request: Microseconds
    """Of a request that arrives alone: from its arrival to its first step, and its first token's
    way back."""
    request_beside: Microseconds
    """Added for each request that arrived with it: the API server handles one after the other, on
    the ranks' cores if it has none of its own, and their first tokens come out together."""


class MicrosecondsAt(Microseconds):
    """A time that depends on how many experts a layer has."""

    experts: int = Field(ge=1)


class Engine(Document):
    """What `vllm serve` takes on this machine if nothing else is asked for; each data-parallel rank
    is an engine."""

    batched_tokens: Count
    """Most tokens of a step: max_num_batched_tokens."""
    sequences: Count
    """Most requests that run at once: max_num_seqs."""


class Hardware(Sourced):
    """One kind of machine. Peaks are per rank."""

    kind: Literal["vllm-balance hardware"]
    format: Literal[1]
    machine: str | None = Field(default=None, min_length=1)
    """As rows of benchmarks name the machine that this is: `python -m bench.validation` checks the
    file against them."""
    experts: Literal["together", "in_turn"]
    """A grouped kernel, in which one expert's arithmetic hides another's streaming, or a loop. A
    loop has nothing to hide a fetch behind either."""
    memory: Bytes
    memory_bandwidth: BytesPerSecond
    compute: dict[Number, FlopPerSecond] = Field(min_length=1)
    """Dense peaks, by number format."""
    efficiency: Efficiency
    tiles: Tiles
    fixed: Fixed
    decide: dict[str, Microseconds | list[MicrosecondsAt]]
    """Time to decide and map one layer's batch, by balancer, and by how many experts the layer has
    where that matters; others take as long as eplb."""
    engine: Engine
    ranks_per_node: Count
    scale_up: Link
    """Between the ranks of a node."""
    scale_out: Link | None = None
    """Between nodes."""
    host: Link | None = None
    """From host memory to a rank's: what fetched experts come over."""
    profile: str | None = None
    """Measured expert times (`vllm-balance profile`), a file beside this one."""
    other_profiles: list[str] = Field(default_factory=list)
    """Of experts of other sizes, beside it too."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.ranks_per_node.value < 1:
            raise ValueError("ranks_per_node must be at least 1")
        if not 1 <= self.engine.sequences.value < self.engine.batched_tokens.value:
            raise ValueError("engine must take at least one request, and more tokens than requests")
        if min(self.tiles.compute_tokens.value, self.tiles.stream_tokens.value) < 1:
            raise ValueError("tiles must have at least one token")
        if self.other_profiles and self.profile is None:
            raise ValueError("other_profiles need a profile that stands for all other sizes")
        if "eplb" not in self.decide:
            raise ValueError("decide needs at least eplb")
        for balancer, times in self.decide.items():
            experts = [each.experts for each in times] if isinstance(times, list) else [1]
            if not experts or experts != sorted(set(experts)):
                raise ValueError(f"decide.{balancer} needs times of rising numbers of experts")
        return self

    def with_engine(self, batched_tokens: int, sequences: int) -> Hardware:
        """The machine under other limits of an engine."""
        engine = {
            "batched_tokens": self.engine.batched_tokens.model_copy(
                update={"value": batched_tokens}
            ),
            "sequences": self.engine.sequences.model_copy(update={"value": sequences}),
        }
        return self.model_copy(update={"engine": self.engine.model_copy(update=engine)})

    def decide_us(self, balancer: str, num_experts: int) -> float:
        """Time to decide one layer: between those of the nearest numbers of experts."""
        known = self.decide.get(balancer, self.decide["eplb"])
        if not isinstance(known, list):
            return known.value
        experts = [each.experts for each in known]
        return float(np.interp(num_experts, experts, [each.value for each in known]))

    def peak(self, number: Number) -> FlopPerSecond:
        """Dense peak. Raises BalancerError if the hardware does not compute in this format."""
        if number not in self.compute:
            raise BalancerError(
                f"{self.name} has no {number} arithmetic (it has {', '.join(self.compute)}), which "
                f"the model file asks for. Choose another model file or other hardware."
            )
        return self.compute[number]


def load(name: str, model: Model | None = None) -> tuple[Hardware, Profile | None]:
    """A hardware file by name or path, and of its profiles the one whose experts are as large as
    the model's; without such a one, or without a model, the first.

    Raises:
        BalancerError: file or profile are missing or malformed.
    """
    found, path = catalogue.find("hardware", name, Hardware)
    if found.profile is None:
        return found, None
    beside = Path(path).resolve().parent
    if model is not None:
        for other in found.other_profiles:
            profile = profiles.load(beside / other)
            if is_of(profile, model):
                return found, profile
    return found, profiles.load(beside / found.profile)


def is_of(profile: Profile, model: Model) -> bool:
    """Whether a profile is of experts of the model's size and format."""
    shape = profile.shape
    same_size = (shape.hidden, shape.inner) == (model.hidden.value, model.inner.value)
    return same_size and is_in_format_of(profile, model)


def is_in_format_of(profile: Profile, model: Model) -> bool:
    """Whether a profile is of arithmetic in the format of the model's experts."""
    return NUMBER_OF.get(profile.shape.dtype) == model.expert_number
