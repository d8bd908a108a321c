"""What the simulator says of a benchmark: its model, its load and one of its arms."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bench import real_size_model
from bench.load import Load as Asked
from bench.placed import Slowed
from vllm_balance import traces
from vllm_balance.config import BalancerConfig
from vllm_balance.placement import TRACED
from vllm_balance.replay_rows import ReplaySettings
from vllm_balance.simulate import Arm, Layout, Load, Outcome, hardware, models, simulate, skewed
from vllm_balance.simulate.hardware import NUMBER_OF, is_of
from vllm_balance.simulate.machine_speed import AS_PROFILED, MachineSpeed
from vllm_balance.simulate.models import Model

BASE = "qwen3-30b-a3b"
SHAPE = ("num_experts", "top_k", "hidden", "inner", "num_heads", "num_kv_heads", "head_dim")
SHAPE += ("vocabulary",)
"""What a benchmark's model may have otherwise than BASE."""
BUDGET, TOKEN_BUDGET = "--max-num-batched-tokens", 8192
"""The flag, and where a run file lacks it a limit that its loads stay below."""
MAX_STEPS = 1000
"""More than any load of configs/runs has."""
NUMBERS = {dtype: (NUMBER_OF[dtype], width) for dtype, width in (("bfloat16", 2), ("float32", 4))}
"""What a model is served in: the format of its arithmetic, bytes of a weight or cached element."""
AT_FULL_SPEED = Slowed(0, 1.0)
Row = dict[str, Any]


class Recorded(NamedTuple):
    """Files of the trace that a run with `[place]` replays, half of its requests each."""

    known: Path
    """What arms with a placement are placed by."""
    replayed: Path
    """What servers are given."""


def benchmark_model(preset: str, num_layers: int, dtype: str = "bfloat16", **changes: int) -> Model:
    """The model file of what `bench/real_size_model.py` makes of the same arguments."""
    shape = replace(real_size_model.PRESETS[preset], **changes)
    counts = {key: getattr(shape, key) for key in SHAPE}
    base = models.load(BASE).with_counts(num_layers=num_layers, num_dense_layers=0, **counts)
    number, width = NUMBERS[dtype]
    size = base.dense_weight.model_copy(update={"value": width})
    widths = ("expert_weight", "dense_weight", "head_weight", "cache_element")
    stored = dict.fromkeys(widths, size)
    return base.model_copy(update={"expert_number": number, "dense_number": number, **stored})


def loop(load: Asked, engines: int = 1, token_budget: int = TOKEN_BUDGET) -> Load:
    """What the client sends: a closed loop that ends."""
    return Load(
        concurrency=load.at_once,
        requests=load.requests,
        prompt_tokens=load.prompt_tokens,
        output_tokens=load.max_tokens,
        length_spread=load.length_spread,
        token_budget=token_budget,
        engines=engines,
        max_steps=MAX_STEPS,
        steady=False,
    )


def profiled_dtype(machine: str) -> str:
    """The number format that the experts of a hardware file were measured in; BASE's without."""
    _, profile = hardware.load(machine)
    return "bfloat16" if profile is None else profile.shape.dtype


def is_profiled(settings: Row, machine: str) -> bool:
    """Whether a hardware file has a profile of experts as large as those of a run file; otherwise
    another one is taken in proportion to their weights."""
    model = benchmark_model(**settings["model"])
    _, profile = hardware.load(machine, model)
    return profile is not None and is_of(profile, model)


def predict(
    settings: Row,
    load: Asked,
    name: str,
    machine: str,
    recorded: Recorded | None = None,
    slow: Slowed = AT_FULL_SPEED,
    speed: MachineSpeed = AS_PROFILED,
) -> Outcome:
    """The simulation of one arm of a run file on the machine of a hardware file.

    Args:
        recorded: the trace that the run replays, if it does.
        slow: a rank, and how many times longer it takes for all that it computes.
        speed: of the machine as a whole beside the load.
    """
    model = benchmark_model(**settings["model"])
    described, profile = hardware.load(machine, model)
    serve = settings["serve"]
    layout = Layout(tensor=serve.get("tensor_parallel", 1), data=serve.get("data_parallel", 1))
    own = settings.get("eplb", {}) | settings["arms"][name]
    extra = own.get("num_redundant_experts", own.get("dynamic_slots", 0) * layout.num_ranks)
    asked = load.replay or settings["replay"]
    served = known = {**asked, "seed": settings["seed"]}
    known_trace = None
    if "trace" in asked:
        assert recorded is not None
        served = known = {**served, "trace": recorded.replayed}
    if "place" in own:
        assert recorded is not None
        known = {**settings["replay"], "seed": settings["seed"], "trace": recorded.known}
        if own["place"] in TRACED:
            # `vllm-balance place` scores by the other half.
            known_trace, _ = traces.load(recorded.known).split(settings["seed"])
    sent = partial(loop, engines=layout.data, token_budget=_token_budget(serve["flags"]))
    arm = Arm(
        model=model,
        hardware=described,
        profile=profile,
        layout=layout,
        balancer=own.get("balancer", name),
        seed=settings["seed"],
        placed_by=None if own.get("place") == "gem" else own.get("place"),
        known_trace=known_trace,
        known_batches=_known_batches(settings["place"]) if "place" in own else (),
        slowness=tuple(
            slow.factor if rank == slow.rank else 1.0 for rank in range(layout.num_ranks)
        ),
        speed=speed,
        redundancy=own.get("redundancy", 1 + extra / model.num_experts.value),
        load=sent(load),
        warm=tuple(map(sent, _warming(settings, load))),
    )
    layers = model.num_moe_layers
    traffic, placed_by = (skewed(ReplaySettings(**each), model, layers) for each in (served, known))
    return simulate(arm, traffic, placed_by)


def _known_batches(place: Row) -> tuple[tuple[int, int], ...]:
    """Decoding and prompt tokens of the batches that `[place]` of a run file takes."""
    kinds = [(place["batch"], 0)]
    if "prefill_batch" in place:
        kinds.append((0, place["prefill_batch"]))
    return tuple(kind for kind in kinds for _ in range(place["steps"]))


def _token_budget(flags: list[str]) -> int:
    """Most tokens of a step of an engine."""
    if BUDGET not in flags:
        return TOKEN_BUDGET
    return int(flags[flags.index(BUDGET) + 1])


def _warming(settings: Row, load: Asked) -> tuple[Asked, ...]:
    """What a server has served since its traffic began: `bench.run` sends what warms up twice."""
    warm = load.warming or (Asked(**settings["warm"]) if "warm" in settings else None)
    return () if warm is None else (warm, warm)


def rearranges(settings: Row, load: Asked, name: str) -> bool:
    """Whether experts of an arm move in mid-load, which is not simulated: vLLM's EPLB places them
    anew while the popular ones change."""
    own = settings["arms"][name]
    balancer = BalancerConfig(name=own.get("balancer", name))
    changes = "change_every" in (load.replay or settings["replay"])
    return changes and "place" not in own and not balancer.stays
