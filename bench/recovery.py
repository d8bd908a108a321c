"""What a change in mid-run costs, and how soon it is over: `python -m bench.recovery --traces DIR`.

A server is sent bursts of requests, one after another, while other traffic comes and then one rank
becomes slow (configs/runs/recovery.toml). Every arm lives through the same on a fresh server. The
servers of all arms are up together and take turns, burst by burst, A B C C B A; those that wait are
stopped. Rows are JSON lines in bench/results/recovery.jsonl, one per burst, written when the
servers of a round have lived through all; `started` is the same in all rows of a run, and in no
other's. A run that was ended continues with the next round.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bench import command, counters, gate, markdown, real_size_model, run_files
from bench.ended_run import append, unfinished
from bench.load import Load, send, timed
from bench.placed import SLOW_RANK, Placed, prepared, said, traffic
from bench.provenance import ROOT, config_hash, harness, provenance, sources
from bench.server import Server
from bench.starts import Start, arm_of, plan
from bench.turn import running
from vllm_balance.model_shape import from_config
from vllm_balance.own_benchmarks.recovery import Burst, table

RUN = run_files.FOLDER / "recovery.toml"
RESULTS = ROOT / "bench" / "results" / "recovery.jsonl"
Row = dict[str, Any]
console = Console()


def recovery(
    folder: Annotated[Path, typer.Option("--traces", help="Folder of the recorded traces.")],
    rounds: Annotated[int, typer.Option(min=1, help="Servers of each arm.")] = 3,
) -> None:
    """Append one row per burst to bench/results/recovery.jsonl and print the table."""
    settings = run_files.read(RUN)
    model = real_size_model.ensure(**settings["model"])
    factors = [1.0, *(phase.get("slow", 1.0) for phase in settings["phases"].values())]
    placed = prepared(
        settings | {"slow": sorted(set(factors))}, model, folder, config_hash(settings)
    )
    assert placed is not None
    console.print(said(placed.shown_slowdown))
    origin = {"run": RUN.stem, "title": settings["title"], "seed": settings["seed"]}
    origin |= {"config_hash": config_hash(settings)}
    origin |= {"expert_bytes": _expert_bytes(model), "sources": sources(), "harness": harness()}
    origin |= {"traffic": _traffic(settings, model, folder), **provenance()}
    starts = plan(settings, rounds)
    rows = unfinished(RESULTS, origin, [start.position for start in starts])
    origin["started"] = rows[0]["started"] if rows else datetime.now(UTC).isoformat()
    done = {row["position"] for row in rows}
    missing = [start for start in starts if start.position not in done]
    for _, together in itertools.groupby(missing, lambda start: start.group):
        own = []
        for row in _live_through([*together], model, placed, folder):
            console.print(row)
            own.append({**row, **origin})
        append(RESULTS, own)
        rows += own
    console.print(markdown.written(table([Burst.model_validate(row) for row in rows])))


def _traffic(settings: Row, model: Path, folder: Path) -> list[str]:
    """Of every recording that is replayed, which one it is."""
    phases = settings["phases"].values()
    names = dict.fromkeys(phase["trace"] for phase in phases if "trace" in phase)
    replays = [settings["replay"], *(settings["replay"] | {"trace": name} for name in names)]
    return [traffic(settings | {"replay": replay}, model, folder) for replay in replays]


def _expert_bytes(model: Path) -> int:
    """Weights of one expert in bfloat16."""
    shape = from_config(model)
    return 3 * shape.hidden * shape.inner * 2


def _live_through(
    together: Sequence[Start], model: Path, placed: Placed, folder: Path
) -> Iterator[Row]:
    """One row per burst of servers that are up together, through all phases, burst by burst."""
    with ExitStack() as up:
        lives = []
        for start in together:
            arm = arm_of(start, placed)
            proof = gate.prove(arm, {}, console.print)
            server = up.enter_context(Server(arm, model))
            lives.append(_Life(start, proof, server, model))
        for name, phase in together[0].settings["phases"].items():
            for life in lives:
                life.change(name, phase, folder)
            for burst in range(phase["bursts"]):
                for life in lives if burst % 2 == 0 else reversed(lives):
                    yield life.burst(burst)


class _Life:
    """One server, warmed up; it runs in its own turns only, and its clock with it."""

    def __init__(self, start: Start, proof: str, server: Server, model: Path) -> None:
        self._start, self._server, self._model = start, server, model
        self._fields: Row = {"arm": start.arm, "position": start.position, "group": start.group}
        self._fields["gate"] = proof
        self._load, self._seed = Load(**start.settings["load"]), start.settings["seed"]
        self._factor, self._lived_s, self._swaps = 1.0, 0.0, 0
        for _ in range(2):
            send(self._load, server.url, model, self._seed)
        server.suspend()

    def change(self, name: str, phase: Row, folder: Path) -> None:
        """A phase begins."""
        self._factor = phase.get("slow", self._factor)
        with self._awake():
            if "trace" in phase:
                trace = str(folder / phase["trace"])
                self._server.replay({"trace": trace, "seed": self._seed})
            self._swaps = _online(self._server.status()).get("swaps", 0)
        self._fields["phase"], self._lived_s = name, 0.0

    def burst(self, number: int) -> Row:
        """A row: what the client timed and what the server says of it."""
        load_seed, at_s = self._seed + number, self._lived_s
        with self._awake():
            self._server.reset()
            answered = send(self._load, self._server.url, self._model, load_seed)
            ranks = self._server.status()
        counters.require_trustworthy(self._start.arm, ranks, min_steps=self._load.min_steps)
        client, online = timed(self._load, answered), _online(ranks)
        return {
            **self._fields,
            **{"burst": number, "load_seed": load_seed, "at_s": at_s},
            **{key: client[key]["p50"] for key in ("e2e_ms", "ttft_ms", "tpot_ms")},
            "tokens_per_s": client["tokens_per_s"],
            "tokens_worst_rank": counters.counted(ranks)["tokens_worst_rank"],
            "swaps": online["swaps"] - self._swaps if online else None,
            **{key: online.get(key) for key in ("steps", "moving_us", "deciding_us")},
            **{key: online.get(key) for key in ("drift", "slowdown_per_rank")},
        }

    @contextmanager
    def _awake(self) -> Iterator[None]:
        """It runs inside, one of its ranks slowed by then, and its clock goes on."""
        with running(self._server, SLOW_RANK, self._factor):
            began = time.perf_counter()
            yield
            self._lived_s += time.perf_counter() - began


def _online(ranks: counters.Ranks) -> Row:
    """What online placement says of itself; nothing where there is none."""
    return ranks[0].get("online") or {}


if __name__ == "__main__":
    command.main(recovery)
