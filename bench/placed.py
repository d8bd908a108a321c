"""The files that arms with a placement need: a profile of this machine, halves of a trace, maps.

The placement knows one half of the trace's requests, the server replays the other half. A rank's
slowness is not assumed: the profile's kernels are timed again while the rank is slowed, and what
they show goes into the profile that the map is computed from.
"""

from __future__ import annotations

import hashlib
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import typer

from bench import demo_trace
from bench.provenance import config_hash, sources, versions
from bench.slow_rank import slowed
from vllm_balance import documents, profiles, traces
from vllm_balance.commands.expert_probe import probing
from vllm_balance.commands.place import place
from vllm_balance.commands.profile import cores_of, profile
from vllm_balance.model_shape import from_config
from vllm_balance.profiles import Profile
from vllm_balance.seams.device import kernel_isa
from vllm_balance.simulate.traffic import spread_layers
from vllm_balance.traces import Trace

HALVES = ("known", "replayed")
"""What placements know of a trace, and what servers replay."""
SLOW_RANK = 1
"""Where a run file names no other."""
TOLERANCE = 0.05
"""Most that the slowdown shown by the kernels may differ from what was asked for."""
REPEATS = 5
"""Samples of each point with the rank slowed and without, in turn."""


class Slowed(NamedTuple):
    """One rank of a server, and how many times longer it takes for the same work."""

    rank: int
    factor: float


def said(shown: Mapping[Slowed, float]) -> str:
    """What was asked for and what the kernels showed, in words."""
    return "; ".join(
        f"rank {asked.rank} slowed by {asked.factor - 1:.1%}, by its kernels {factor - 1:.1%}"
        for asked, factor in shown.items()
    )


def num_ranks(serve: dict[str, Any]) -> int:
    """Expert-parallel ranks of a run file's `serve`."""
    ranks: int = serve.get("tensor_parallel", 1) * serve.get("data_parallel", 1)
    return ranks


def slowdowns(settings: dict[str, Any]) -> list[Slowed]:
    """What `slow` and `slow_rank` of a run file, or of each of its cases, ask for."""
    cases = [settings | case for case in settings.get("cases", {"": {}}).values()]
    return list(
        dict.fromkeys(
            Slowed(case.get("slow_rank", SLOW_RANK), float(factor))
            for case in cases
            for factor in case.get("slow", [1.0])
        )
    )


@dataclass(kw_only=True)
class Placed:
    """Files in `folder` for one model and one trace; each is made once and then kept."""

    model: Path
    trace: Path
    folder: Path
    num_ranks: int
    settings: dict[str, Any]
    """`batch`, `prefill_batch` and `steps` of `vllm-balance place`."""
    seed: int
    shown_slowdown: dict[Slowed, float] = field(default_factory=dict)
    """What was asked for -> the factor that the profile's kernels showed."""

    def prepare(self, asked: Sequence[Slowed]) -> None:
        """Makes the profile and the halves of the trace, and verifies the slowdowns.

        Raises:
            RuntimeError: the profile's kernels show another slowdown than was asked for.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.profile.exists():
            dtype = from_config(self.model).dtype
            profile(self.model, ranks=self.num_ranks, output=self.profile, dtype=dtype)
        for half, name in zip(halves(self.trace, self.model, self.seed), HALVES, strict=True):
            traces.save(self.folder / f"{name}.npz", half)
        self.shown_slowdown = self._verify(asked)
        off = {a: s for a, s in self.shown_slowdown.items() if abs(s - a.factor) > TOLERANCE}
        if off:
            raise RuntimeError(
                f"Asked and shown slowdown differ: {said(off)}. Something else runs on these "
                f"cores, and no number from this machine would mean anything now; run it again "
                f"when it is quiet. The profile in {self.folder} is measured anew if you delete it."
            )

    @property
    def profile(self) -> Path:
        """Measured with all ranks at full speed."""
        return self.folder / "profile.json"

    @property
    def replayed(self) -> Path:
        """The half of the trace that servers replay."""
        return self.folder / "replayed.npz"

    def map(self, policy: str, asked: Slowed, redundant: int = 0) -> Path:
        """The placement map of a policy that knows the slowdown of the slow rank.

        Args:
            redundant: experts of a layer, over all ranks.
        """
        shown = asked._replace(factor=self.shown_slowdown[asked])
        curves = self.folder / f"profile-{asked.rank}-{asked.factor:g}.json"
        documents.write(curves, _with_slow_rank(profiles.load(self.profile), shown))
        output = self.folder / f"{policy}-{redundant}-{asked.rank}-{asked.factor:g}.json"
        known = self.folder / "known.npz"
        place(
            profile=curves,
            trace=known,
            ranks=self.num_ranks,
            output=output,
            force=True,
            policy=policy,
            redundant=redundant,
            seed=self.seed,
            **self.settings,
        )
        return output

    def _verify(self, asked: Sequence[Slowed]) -> dict[Slowed, float]:
        """What the kernels of the profile show of each: slowed over unslowed time."""
        stored = profiles.load(self.profile)
        shown = {slow: 1.0 for slow in asked}
        isa = kernel_isa(stored.shape.dtype)
        with probing(stored.shape, isa, cores_of(self.num_ranks), _local(stored)) as probe:
            for slow in asked:
                if slow.factor == 1:
                    continue
                ratios = []
                for tokens_E in _longest(stored, slow.rank) * REPEATS:
                    free = probe.measure(tokens_E)[slow.rank].time_us
                    with slowed(probe.pids[slow.rank], slow.factor):
                        ratios.append(probe.measure(tokens_E)[slow.rank].time_us / free)
                shown[slow] = statistics.median(ratios)
        return shown


def halves(trace: Path, model: Path, seed: int) -> tuple[Trace, Trace]:
    """What placements know of a trace, and what servers replay: half of the requests each, with
    layers from all over the trace as those of the model.

    Raises:
        ValueError: the trace holds counts.
    """
    whole = traces.load(trace)
    if whole.topk_ids_TLK is None:
        raise ValueError(f"{trace} holds counts; servers replay token ids only")
    layers = from_config(model).num_layers
    taken_L = spread_layers(whole.num_layers, layers)
    cut = replace(
        whole, topk_ids_TLK=whole.topk_ids_TLK[:, taken_L], layer_index_L=np.arange(layers)
    )
    return cut.split(seed)


@contextmanager
def split_files(trace: Path, model: Path, seed: int) -> Iterator[tuple[Path, Path]]:
    """The halves of a trace as files, those of servers; gone behind it."""
    with tempfile.TemporaryDirectory() as folder:
        known, replayed = (Path(folder) / f"{name}.npz" for name in HALVES)
        for half, file in zip(halves(trace, model, seed), (known, replayed), strict=True):
            traces.save(file, half)
        yield known, replayed


def traffic(settings: dict[str, Any], model: Path, folder: Path | None) -> str:
    """Hash of the recorded routing that a run replays and places by; empty if a seed draws it.

    Args:
        folder: of the recorded traces.

    Raises:
        typer.BadParameter: the run replays a recorded trace, and no folder is named.
    """
    if "place" in settings:
        return _digest(halves(recorded(settings, folder), model, settings["seed"]))
    tables = [settings, *settings.get("cases", {}).values(), *settings.get("loads", {}).values()]
    names = {table.get("replay", {}).get("trace") for table in tables} - {None}
    files = [demo_trace.ensure() if name == "demo" else Path(name) for name in sorted(names)]
    return _digest(map(traces.load, files)) if files else ""


def _digest(recorded: Iterable[Trace]) -> str:
    """First 12 hex digits of the hash of what traces hold, in order."""
    digest = hashlib.sha256()
    for trace in recorded:
        for array in (trace.topk_ids_TLK, trace.counts_NLE, trace.request_id_T, trace.position_T):
            if array is not None:
                digest.update(f"{array.dtype.str} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()[:12]


def recorded(settings: dict[str, Any], folder: Path | None) -> Path:
    """The trace that a run replays. Raises typer.BadParameter without a folder for it."""
    name = settings["replay"]["trace"]
    if name == "demo":
        return demo_trace.ensure()
    if folder is None:
        raise typer.BadParameter("this run replays a trace: name its folder with --traces")
    return folder / name


def _local(stored: Profile) -> int:
    """Experts of a rank."""
    return max(len(point.tokens_E) for rank in stored.ranks for point in rank.points)


def _longest(stored: Profile, rank: int) -> list[list[int]]:
    """The three longest batches with all experts of a rank: they take several stops each."""
    points = [list(point.tokens_E) for point in stored.ranks[rank].points]
    return sorted((p for p in points if len(p) == _local(stored)), key=sum)[-3:]


def prepared(
    settings: dict[str, Any], model: Path, folder: Path | None, digest: str
) -> Placed | None:
    """The files of arms with a placement, made and verified; None if the run has no such arm.

    Args:
        folder: of the recorded traces.
        digest: of the run's settings.

    Raises:
        typer.BadParameter: the run replays a recorded trace, and no folder is named.
        RuntimeError: the profile's kernels show another slowdown than was asked for.
    """
    if "place" not in settings:
        return None
    placed = Placed(
        model=model,
        trace=recorded(settings, folder),
        folder=_folder(digest),
        num_ranks=num_ranks(settings["serve"]),
        settings=settings["place"],
        seed=settings["seed"],
    )
    placed.prepare(slowdowns(settings))
    return placed


def _folder(digest: str) -> Path:
    """Where the files of a run are kept: others for other settings, code or packages."""
    key = config_hash({"run": digest, "sources": sources(), "versions": versions()})
    return Path(tempfile.gettempdir()) / f"vllm-balance-run-{key}"


def _with_slow_rank(measured: Profile, slow: Slowed) -> Profile:
    """The profile with the slow rank's curve stretched."""
    rank = measured.ranks[slow.rank]
    names = ("a_us", "b_us", "c_us", "beta_us", "tile_us")
    times = {name: getattr(rank.curve, name) * slow.factor for name in names}
    curve = rank.curve.model_copy(update=times)
    ranks = list(measured.ranks)
    ranks[slow.rank] = rank.model_copy(update={"curve": curve})
    return measured.model_copy(update={"ranks": ranks})
