"""What a run file asks for: which servers are started in which order, and what each measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench import demo_trace
from bench.load import Load
from bench.placed import SLOW_RANK, Placed, Slowed, num_ranks
from bench.server import Arm
from vllm_balance.config import FETCHES
from vllm_balance.measurement import Key


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Cell:
    """One row to measure."""

    slow: float = 1.0
    """Factor by which the slow rank is slowed meanwhile."""
    load: str = ""
    repeat: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One start of a server."""

    position: int
    group: int
    """Servers of one group are up together."""
    arm: str
    case: str
    settings: dict[str, Any]
    """The run file with the case's tables in place of its own."""
    factors: tuple[float, ...]
    loads: dict[str, Load]

    @property
    def num_ranks(self) -> int:
        return num_ranks(self.settings["serve"])

    @property
    def slow_rank(self) -> int:
        """Whose factors these are."""
        rank: int = self.settings.get("slow_rank", SLOW_RANK)
        return rank

    @property
    def cells(self) -> list[Cell]:
        """What is measured on it, in order."""
        return [
            Cell(slow=factor, load=name, repeat=repeat)
            for factor in self.factors
            for name, load in self.loads.items()
            for repeat in range(load.repeats)
        ]

    def key(self, cell: Cell) -> Key:
        """What `Measurement.key` of its row will be."""
        return self.case, self.arm, self.position, cell.slow, cell.load, cell.repeat


def plan(settings: dict[str, Any], rounds: int) -> list[Start]:
    """The starts of a run file in order: all arms of all cases forth, then back, ``rounds`` times.

    With `in_turns` the arms of a case are up together, and a round is one way. A table of a case
    replaces the run file's table of that name. An arm whose map depends on how much a rank is
    slowed has a start for each factor.
    """
    cases = settings.get("cases", {"": {}})
    shared = settings.get("load", {})
    loads = {name: Load(**shared | own) for name, own in settings.get("loads", {"": {}}).items()}
    in_turns = settings.get("in_turns", False)
    units = [
        (arm, case, own)
        for case in cases
        for arm in settings["arms"]
        for own in factors_of(settings["arms"][arm], settings | cases[case])
    ]
    ways = rounds if in_turns else 2 * rounds
    order = [unit for way in range(ways) for unit in (units[::-1] if way % 2 else units)]
    pairs = [(position // len(units), case) for position, (_, case, _) in enumerate(order)]
    groups = [*dict.fromkeys(pairs)]
    return [
        Start(
            position=position,
            group=groups.index(pairs[position]) if in_turns else position,
            arm=arm,
            case=case,
            settings=settings | cases[case],
            factors=own,
            loads=loads,
        )
        for position, (arm, case, own) in enumerate(order)
    ]


def factors_of(arm: dict[str, Any], settings: dict[str, Any]) -> list[tuple[float, ...]]:
    """The factors that each start of an arm goes through."""
    factors = tuple(float(factor) for factor in settings.get("slow", [1.0]))
    return [(factor,) for factor in factors] if arm.get("place") == "gem" else [factors]


def arm_of(start: Start, placed: Placed | None = None) -> Arm:
    """The server of a start: the arm's own settings, the shared ones, and the replayed routing."""
    settings, own = start.settings, start.settings["arms"][start.arm]
    balancer = own.get("balancer", start.arm)
    asked = {key: own[key] for key in own if key not in ("balancer", "place", "gate")}
    if balancer not in (*FETCHES, "static"):
        asked |= settings.get("eplb", {})
    asked["replay"] = {**settings["replay"], "seed": settings["seed"]}
    if placed is not None:
        asked["replay"]["trace"] = str(placed.replayed)
        if "place" in own:
            slow = Slowed(start.slow_rank, start.factors[0])
            redundant = asked.get("num_redundant_experts", 0)
            asked["map"] = str(placed.map(own["place"], slow, redundant))
        if "online" in own:
            asked["profile"] = str(placed.profile)
    elif asked["replay"].get("trace") == "demo":
        asked["replay"]["trace"] = str(demo_trace.ensure())
    serve, flags = settings["serve"], [*settings["serve"]["flags"]]
    if "dtype" in settings["model"]:
        # By itself vLLM serves a float32 model in 16 bits.
        flags += ["--dtype", settings["model"]["dtype"]]
    return Arm(
        name=start.arm,
        balancer=balancer,
        settings=asked,
        tensor_parallel=serve.get("tensor_parallel", 1),
        data_parallel=serve.get("data_parallel", 1),
        flags=flags,
    )
