"""Many cells in parallel over cores or a cluster, with Ray; ended at any time, resumed later."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, TextIO

from vllm_balance.errors import BalancerError
from vllm_balance.replay_rows import ReplaySettings
from vllm_balance.simulate import hardware, models
from vllm_balance.simulate.layout import Layout
from vllm_balance.simulate.memory import most_in_flight
from vllm_balance.simulate.run import Arm, simulate
from vllm_balance.simulate.steps import Load
from vllm_balance.simulate.traffic import Traffic, skewed

CHUNK = 32
"""Cells per task: sent, computed and written together."""
Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One point of a sweep, in plain values: it goes to other processes and into the row."""

    model: str
    hardware: str
    balancer: str
    redundancy: float
    zipf: float
    concurrency: int
    tensor: int = 1
    data: int = 1
    ranks_per_node: int | None = None
    prompt_tokens: int = 1024
    output_tokens: int = 2048
    layers: int = 2
    steps: int = 8
    seed: int = 0

    @property
    def key(self) -> str:
        """The same for the same values, in every process."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def compute(cell: Cell) -> Row:
    """The row of a cell: its values, `fits` and what was simulated, which is None if it does not;
    answers of one token have no TPOT.

    Raises BalancerError as `simulate`.
    """
    arm = _arm(cell)
    fits = cell.concurrency <= room(cell)
    served, placed_by = (_rows(cell.model, cell.zipf, cell.layers, cell.seed, n) for n in (0, 1))
    made = simulate(arm, served.fresh(), placed_by.fresh()) if fits else None
    return {
        "key": cell.key,
        **asdict(cell),
        "fits": fits,
        "tpot_us": None if made is None or math.isnan(made.tpot_us) else made.tpot_us,
        "tokens_per_s": made and made.tokens_per_s,
        "activated_worst_rank": made and made.mean(made.activated_N),
        "tokens_worst_rank": made and made.mean(made.pairs_N),
        "waiting_share": made and made.waiting_share,
        "redundant_bytes": arm.redundant_bytes,
    }


def room(cell: Cell) -> int:
    """Requests of a cell's length that its ranks have memory for and its engines run at once."""
    arm, tokens = _arm(cell), cell.prompt_tokens + cell.output_tokens
    return most_in_flight(arm.model, arm.hardware, arm.layout, arm.num_redundant, tokens)


def _arm(cell: Cell) -> Arm:
    model = models.load(cell.model)
    machine, profile = hardware.load(cell.hardware, model)
    return Arm(
        model=model,
        hardware=machine,
        profile=profile,
        layout=Layout(tensor=cell.tensor, data=cell.data, ranks_per_node=cell.ranks_per_node),
        balancer=cell.balancer,
        redundancy=cell.redundancy,
        seed=cell.seed,
        load=Load(
            concurrency=cell.concurrency,
            prompt_tokens=cell.prompt_tokens,
            output_tokens=cell.output_tokens,
            token_budget=machine.engine.batched_tokens.value * cell.data,
            engines=cell.data,
            max_steps=cell.steps,
        ),
    )


@cache
def _rows(model: str, zipf: float, layers: int, seed: int, rank: int) -> Traffic:
    return skewed(ReplaySettings(zipf=zipf, seed=seed), models.load(model), layers, rank)


def missing(
    cells: Iterable[Cell], results: Path, decided_by: Callable[[Cell], str | None] = lambda _: None
) -> list[Cell]:
    """The cells without a row in `results` that the same code and files decided.

    Args:
        decided_by: digest of what decides a cell's row beside its values, as rows have it; None
            for rows that say nothing of it.
    """
    done = {(row["key"], row.get("decided_by")) for row in read(results)}
    return [cell for cell in cells if (cell.key, decided_by(cell)) not in done]


def sweep(
    cells: Iterable[Cell],
    results: Path,
    origin: Row,
    *,
    decided_by: Callable[[Cell], str | None] = lambda _: None,
    address: str | None = None,
    on_rows: Callable[[int], None] = lambda _: None,
) -> int:
    """Computes the cells that `results` does not hold yet and appends their rows; how many.

    Args:
        origin: put into every row, e.g. versions and commit.
        decided_by: as in `missing`; put into the rows, except None.
        address: of a Ray cluster; None: the cores of this machine.
        on_rows: told how many rows were added, as they are.

    Raises:
        BalancerError: Ray is not installed, a cell is impossible, or another sweep writes there.
    """
    with _alone(results) as file:
        left = missing(cells, results, decided_by)
        digests = {cell.key: decided_by(cell) for cell in left}
        chunks = [left[start : start + CHUNK] for start in range(0, len(left), CHUNK)]
        for rows in _computed(chunks, address):
            for row in rows:
                digest = digests[row["key"]]
                own = {} if digest is None else {"decided_by": digest}
                file.write(json.dumps({**row, **own, **origin}) + "\n")
            file.flush()
            on_rows(len(rows))
    return len(left)


@contextmanager
def _alone(results: Path) -> Iterator[TextIO]:
    """The file to append to, behind its last whole line: what a killed sweep left is cut off.

    Raises BalancerError if another sweep writes into it.
    """
    with results.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BalancerError(
                f"Another sweep is writing into {results}. Wait for it, or write to another file."
            ) from error
        content = results.read_bytes()
        os.truncate(results, content.rfind(b"\n") + 1)
        yield file


def read(results: Path) -> list[Row]:
    """The rows of a file, none if it is missing; without a last line that is cut short."""
    if not results.exists():
        return []
    content = results.read_bytes()
    return [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]


def _computed(chunks: list[list[Cell]], address: str | None) -> Iterator[list[Row]]:
    try:
        import ray
    except ImportError as error:
        raise BalancerError(
            "A sweep runs in parallel with Ray, which is not installed: "
            "run pip install '.[sweep]' in the repository."
        ) from error
    if not chunks:
        return
    ray.init(
        address=address or "local", include_dashboard=False, logging_level=logging.ERROR,
        log_to_driver=False, ignore_reinit_error=True,
    )  # fmt: skip
    try:
        task = ray.remote(max_retries=2)(_compute_chunk)
        waiting = [task.remote(chunk) for chunk in chunks]
        while waiting:
            (ready,), waiting = ray.wait(waiting, num_returns=1)
            yield ray.get(ready)
    finally:
        ray.shutdown()


def _compute_chunk(cells: list[Cell]) -> list[Row]:
    return [compute(cell) for cell in cells]
