"""The rows that routing replay hands out: drawn from a seeded skew, or from a recorded trace."""

from pathlib import Path
from typing import Annotated, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_balance import traces
from vllm_balance.traces import Trace


class Hot(BaseModel):
    """`fraction` of all (token, expert) pairs goes to `experts` experts, evenly; the rest too.

    With `ranks`, the hot experts of a layer are all at home on one of that many ranks, drawn per
    layer, if experts are placed linearly; without, they may be anywhere. `further_fractions`: with
    each change of the hot experts the next of these takes the place of `fraction`, round and round.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    experts: int = Field(ge=1)
    fraction: float = Field(ge=0, le=1)
    ranks: int | None = Field(default=None, ge=1)
    further_fractions: tuple[Annotated[float, Field(ge=0, le=1)], ...] = ()


class ReplaySettings(BaseModel):
    """What to replay: exactly one of `zipf`, `hot` and `trace`.

    zipf: exponent s; the r-th most popular expert is drawn with weight r**-s (0: even). The K
    experts of a token are drawn one after another without replacement.
    trace: a file that `traces.load` reads. Tokens are drawn at random; a token keeps its row in
    all layers. From counts, each row takes a random step and draws experts by their counts in it,
    without replacement. Layer l of the model uses layer l modulo the trace's number of layers.
    change_every: number of batches after which other experts become the popular ones (not for
    traces); counted per layer from the start of the worker, warm-up batches included.
    rows: rows of each layer's table.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    zipf: float | None = Field(default=None, ge=0)
    hot: Hot | None = None
    trace: Path | None = None
    seed: int = Field(default=0, ge=0)
    change_every: int | None = Field(default=None, ge=1)
    rows: int = Field(default=8192, ge=1)

    @model_validator(mode="after")
    def _exactly_one_source(self) -> Self:
        given = [kind for kind in ("zipf", "hot", "trace") if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(
                f"routing replay needs exactly one of zipf, hot and trace, got {given}"
            )
        if self.trace is not None and self.change_every is not None:
            raise ValueError("change_every goes with zipf or hot; a trace changes by itself")
        if self.hot is not None and self.hot.further_fractions and self.change_every is None:
            raise ValueError("hot.further_fractions need change_every")
        return self

    @property
    def phases(self) -> "tuple[ReplaySettings, ...]":
        """These settings with one fraction of `hot` each, in the order in which they come."""
        if self.hot is None or not self.hot.further_fractions:
            return (self,)
        fractions = (self.hot.fraction, *self.hot.further_fractions)
        hots = [Hot(**self.hot.model_dump(include={"experts", "ranks"}), fraction=fraction)
                for fraction in fractions]  # fmt: skip
        return tuple(self.model_copy(update={"hot": hot}) for hot in hots)


def draw(
    settings: ReplaySettings, num_layers: int, num_experts: int, top_k: int, rank: int
) -> torch.Tensor:
    """int32 [num_layers, rows, top_k], distinct within a row: experts numbered by popularity
    (0 first), or the trace's own ids; of the first of several phases.

    Raises ValueError if the settings do not fit the model.
    """
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must be between 1 and {num_experts} experts, got {top_k}")
    if settings.trace is not None:
        return _draw_trace(settings, settings.trace, num_layers, num_experts, top_k, rank)
    layers = []
    for layer in range(num_layers):
        random = np.random.default_rng((settings.seed, layer, rank, 1))
        if settings.hot is not None:
            drawn_NK = _draw_hot(settings.hot, random, settings.rows, num_experts, top_k)
        else:
            popularity_E = np.arange(1, num_experts + 1, dtype=np.float64) ** -(settings.zipf or 0)
            drawn_NK = _draw_weighted(popularity_E, random, settings.rows, top_k)
        layers.append(torch.from_numpy(drawn_NK.astype(np.int32)))
    return torch.stack(layers)


def name_experts(settings: ReplaySettings, num_experts: int, layer: int, phase: int) -> np.ndarray:
    """Which expert is the most popular, the second ...: int32 [E]; the same on every rank."""
    random = np.random.default_rng((settings.seed, layer, phase))
    names_E = random.permutation(num_experts).astype(np.int32)
    if settings.hot is None or settings.hot.ranks is None:
        return names_E
    home_E = names_E // (num_experts // settings.hot.ranks)
    is_near_E = home_E == random.integers(settings.hot.ranks)
    return np.concatenate([names_E[is_near_E], names_E[~is_near_E]])


def _draw_weighted(
    weight_E: np.ndarray, random: np.random.Generator, num_rows: int, top_k: int
) -> np.ndarray:
    """int [num_rows, top_k], drawn by weight without replacement: the Gumbel-top-k trick.

    weight_E: [E], or a row of its own for each row drawn.
    """
    noise = random.gumbel(size=(num_rows, weight_E.shape[-1]))
    return _largest(np.log(weight_E) + noise, top_k)


def _draw_hot(
    hot: Hot, random: np.random.Generator, num_rows: int, num_experts: int, top_k: int
) -> np.ndarray:
    """int [num_rows, top_k]; experts 0 to hot.experts - 1 are the hot ones."""
    if hot.ranks and (num_experts % hot.ranks or hot.experts > num_experts // hot.ranks):
        raise ValueError(
            f"hot: {hot.experts} experts at home on one of {hot.ranks} ranks, but a rank has "
            f"{num_experts / hot.ranks:g} of {num_experts}: change hot.experts or hot.ranks"
        )
    pairs = hot.fraction * top_k
    most_hot = int(np.ceil(pairs))
    num_cold = num_experts - hot.experts
    if most_hot > hot.experts or top_k - int(pairs) > num_cold:
        raise ValueError(
            f"hot: {hot.fraction} of {top_k} experts per token is {pairs:g} hot and "
            f"{top_k - pairs:g} other experts, but there are {hot.experts} hot and {num_cold} "
            f"others of {num_experts}, and a token uses an expert at most once: change "
            f"hot.experts or hot.fraction"
        )
    num_hot_N = int(pairs) + (random.random(num_rows) < pairs - int(pairs))
    noise = random.random((num_rows, num_experts))
    # Hot experts first, in random order, then the others: token i takes its first num_hot_N[i]
    # from the front of the first group and the rest from the front of the second.
    hot_NH = np.argsort(noise[:, : hot.experts], axis=1)
    cold_NC = np.argsort(noise[:, hot.experts :], axis=1) + hot.experts
    both = np.concatenate([hot_NH, cold_NC], axis=1)
    column_K = np.arange(top_k)
    from_cold = column_K >= num_hot_N[:, None]
    column_NK = column_K + from_cold * (hot.experts - num_hot_N[:, None])
    return np.take_along_axis(both, column_NK, axis=1)


def _largest(score_NE: np.ndarray, top_k: int) -> np.ndarray:
    """The columns of the top_k largest scores of each row, largest first."""
    return torch.from_numpy(score_NE).topk(top_k, dim=1).indices.numpy()


def _draw_trace(
    settings: ReplaySettings,
    path: Path,
    num_layers: int,
    num_experts: int,
    top_k: int,
    rank: int,
) -> torch.Tensor:
    trace = read_trace(path, num_experts, top_k)
    random = np.random.default_rng((settings.seed, rank, 2))
    layers_L = np.arange(num_layers) % trace.num_layers
    if trace.topk_ids_TLK is not None:
        tokens_N = random.integers(0, len(trace.topk_ids_TLK), settings.rows)
        drawn_NLK = trace.topk_ids_TLK[tokens_N][:, layers_L].astype(np.int32)
        return torch.from_numpy(drawn_NLK).transpose(0, 1).contiguous()
    assert trace.counts_NLE is not None
    return torch.from_numpy(
        draw_from_counts(trace.counts_NLE, layers_L, settings.rows, top_k, random)
    )


def draw_from_counts(
    counts_NLE: np.ndarray,
    layers_L: np.ndarray,
    num_rows: int,
    top_k: int,
    random: np.random.Generator,
) -> np.ndarray:
    """int32 [L, num_rows, top_k]: each row takes a random step, the same in all layers, and draws
    experts by their counts in it, without replacement. `layers_L`: which of the recorded layers."""
    steps_N = random.integers(0, len(counts_NLE), num_rows)
    # An expert that a step did not use comes last, behind all that it used.
    drawn = [_draw_weighted(counts_NLE[steps_N, layer] + 1e-9, random, num_rows, top_k)
             for layer in layers_L]  # fmt: skip
    return np.stack(drawn).astype(np.int32)


def read_trace(path: Path, num_experts: int, top_k: int) -> Trace:
    """A trace, checked against a model's shape.

    Raises ValueError if the file is missing, malformed or recorded from a model of another shape.
    """
    trace = traces.load(path)
    if (trace.num_experts, trace.top_k) != (num_experts, top_k):
        raise ValueError(
            f"trace {path} was recorded with {trace.num_experts} experts and top-{trace.top_k}, "
            f"but the model has {num_experts} and top-{top_k}: choose a trace of a model of this "
            f"shape"
        )
    return trace
