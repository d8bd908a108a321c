"""One server of a run: started, proven, warmed up, and measured load by load.

Servers that are up together take turns: while one is measured, the processes of the others are
stopped. So arms are compared within seconds, not minutes, on a machine that others use too. Arms
that are placements of one server share it, and its experts are moved from one to the next. Every
server is stopped while the machine's own speed is looked at (bench/speed.py), before and after each
load.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from bench import counters, gate, speed, waiting
from bench.load import Load, send, timed
from bench.placed import Placed, Slowed
from bench.server import Server
from bench.slow_rank import slowed
from bench.speed import Watch
from bench.starts import Cell, Start, arm_of


class Turn:
    """One server of those that are up together; while another has its turn, it is stopped."""

    def __init__(
        self,
        start: Start,
        left: Sequence[Cell],
        model: Path,
        placed: Placed | None,
        watch: Watch,
        say: Callable[[str], None],
    ) -> None:
        self.left = left
        self._start, self._model, self._placed = start, model, placed
        self._watch, self._say = watch, say
        self._seed: int = start.settings["seed"]
        self._where = " ".join(filter(None, (start.case, start.arm)))
        self._one_server: bool = start.settings.get("one_server", False)
        self._map: Path | None = None
        """Where the experts of a server that other arms have too must be moved to."""

    @contextmanager
    def up(self, beside: Self | None = None) -> Iterator[Self]:
        """The server is up inside, proven and warm; suspended until its turn.

        Args:
            beside: whose server it is too; its experts are moved when the turn changes.
        """
        arm = arm_of(self._start, self._placed)
        own = self._start.settings["arms"][self._start.arm]
        self._proof = gate.prove(arm, own.get("gate", {}), self._say)
        if self._one_server:
            self._map = Path(arm.settings["map"])
        if beside is not None:
            self._server = beside._server
            yield self
            return
        self._say(f"{self._where}: starting the server")
        with Server(arm, self._model) as self._server:
            if "warm" in self._start.settings:
                self._say(f"{self._where}: warming up")
                self._warm(Load(**self._start.settings["warm"]))
            self._server.suspend()
            yield self

    @contextmanager
    def _running(self, factor: float) -> Iterator[None]:
        """The server runs inside, its experts where the arm has them, its slow rank slowed."""
        if self._map is not None:
            self._server.resume()
            self._server.move_to(self._map)
        with running(self._server, self._start.slow_rank, factor):
            yield

    def get_ready(self, factor: float, name: str) -> None:
        """Changes to the routing of a load, if it has its own, and warms up for it."""
        load = self._start.loads[name]
        with self._running(factor):
            if load.replay is not None:
                self._server.replay({**load.replay, "seed": self._seed})
            if load.warming is not None:
                self._say(f"{self._where}: warming up for {name}")
                self._warm(load.warming)

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Fields of a row."""
        start, load = self._start, self._start.loads[cell.load]
        what = f"{cell.load or 'measuring'}, {cell.repeat + 1} of {load.repeats}"
        self._say(f"{self._where}: {what}")
        before, load_seed = self._watch.before(), self._seed + cell.repeat
        with self._running(cell.slow):
            measured = _measure_once(load, self._server, self._model, load_seed)
        measured["machine_speed"] = speed.between(before, self._watch.after())
        fields = {"arm": start.arm, "case": start.case, "position": start.position}
        fields |= {"load": cell.load, "repeat": cell.repeat}
        fields |= {"seed": self._seed, "load_seed": load_seed}
        if self._placed is not None:
            shown = self._placed.shown_slowdown[Slowed(start.slow_rank, cell.slow)]
            fields |= {"slow": cell.slow, "slow_shown": shown}
        fields |= {"in_turns": start.settings.get("in_turns", False)}
        fields |= {"one_server": self._one_server}
        return fields | {"gate": self._proof} | measured

    def _warm(self, load: Load) -> None:
        for _ in range(2):
            send(load, self._server.url, self._model, self._seed)


@contextmanager
def running(server: Server, rank: int, factor: float) -> Iterator[None]:
    """A suspended server runs inside, a rank slowed, if at all: other layouts name workers
    otherwise."""
    server.resume()
    slow = slowed(server.worker(rank), factor) if factor > 1 else None
    with slow or contextlib.nullcontext():
        yield
    server.suspend()


def _measure_once(load: Load, server: Server, model: Path, seed: int) -> dict[str, Any]:
    """Fields of a row: one load, what the client timed and what the counters say."""
    server.rest()
    server.reset()
    answered = send(load, server.url, model, seed)
    server.rest()
    ranks = server.status(per_layer=True)
    counters.require_trustworthy(
        server.arm.name,
        ranks,
        min_steps=load.min_steps,
        is_skewed_prefill=load.is_skewed_prefill(server.arm.settings["replay"]),
    )
    return {
        **timed(load, answered),
        **counters.counted(ranks),
        **waiting.shares(ranks),
        "memory_bytes": server.memory_bytes(),
        "huge_page_share": counters.huge_page_share(ranks),
        "samples": counters.samples(answered),
        "layers": counters.heat(answered),
    }
