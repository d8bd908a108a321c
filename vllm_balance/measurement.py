"""One row of a benchmark: what was served, how, by what, how fast, and what the balancer did.

Rows are JSON lines; `bench/run.py` writes them, the tables of the docs and `vllm-balance report`
read them. Everything was measured; predictions have a format of their own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from vllm_balance.documents import Document, DocumentT, explain
from vllm_balance.errors import BalancerError

FORMAT: Literal["vllm-balance measurement 1"] = "vllm-balance measurement 1"
IDENTITY = ("config_hash", "traffic", "sources", "harness", "machine", "versions")
"""Fields that rows have in common which may be compared: settings, recorded routing, code of the
server and of the benchmark, machine, packages."""
Key = tuple[str, str, int, float, str, int]
"""Case, arm, position, slow, load and repeat of a row."""


class Latency(Document):
    """Distribution of one latency, ms: over requests; of the inter-token latency, over tokens."""

    p50: float
    p90: float
    p99: float
    quantiles: list[float] = Field(min_length=2)
    """At evenly spaced probabilities from 0 to 1."""


class Sample(Document):
    """What happened between two looks at the counters while the load ran."""

    at_s: float
    """Since the start of the load; the end of the interval."""
    steps: float = Field(gt=0)
    """Forward passes in the interval."""
    activated_per_rank: list[float]
    """Activated experts per step, summed over layers."""
    tokens_per_rank: list[float]
    """(token, choice) pairs per step, summed over layers."""


class LayerHeat(Document):
    """The slots of one layer at the end of the load."""

    physical_to_logical: list[int]
    """The expert in each slot; slots of a rank are consecutive."""
    slot_tokens: list[int]
    """Pairs that went to each slot, summed over the batches that were looked at."""


class KernelTime(Document):
    """Experts timed on all cores at once just before and after a load, while no server ran."""

    activated: int = Field(ge=1)
    """Experts of the batch, on each rank."""
    tokens_each: int = Field(ge=1)
    """Tokens of each of them."""
    time_us: list[float] = Field(min_length=1)
    """On each rank; the mean of before and after."""


class Measurement(Document):
    """One load on one warm server. Statistics per step are sums over layers."""

    format: Literal["vllm-balance measurement 1"] = FORMAT
    run: str
    title: str
    arm: str
    case: str = ""
    """Variant of the server, where a run file has several."""
    load: str = ""
    """Variant of the load, where a run file has several."""
    slow: float = 1.0
    """Factor by which one rank was asked to be slower."""
    slow_shown: float = 1.0
    """The factor that the profile's kernels showed."""
    position: int
    """Place in the order in which servers were started."""
    in_turns: bool = False
    """The servers of all arms were up, and their loads were sent in turn."""
    one_server: bool = False
    """They were one server, whose experts were moved from the placement of one arm to the next."""
    repeat: int
    seed: int
    """Of the run file; draws the routing that is replayed."""
    load_seed: int | None = None
    """What the client drew the prompts of this load with; None in rows that are older than this
    field."""
    config_hash: str
    versions: dict[str, str]
    commit: str
    sources: str
    """Hash of the code that ran in the server, and of that which made its profile and map."""
    traffic: str = ""
    """Hash of the recorded routing that was replayed and placed by; empty where a seed draws it,
    and in rows that are older than this field."""
    harness: str = ""
    """Hash of the code that measured; empty in rows that are older than this field."""
    machine: str
    machine_speed: list[KernelTime] | None = None
    """How fast its cores were meanwhile; None in rows that are older than this field."""
    huge_page_share: float | None = None
    """Of the expert weights, what lay in huge pages on the rank with the least; None in rows that
    are older than this field, and where no worker asks for them."""
    gate: str
    """The proof that this arm answers as one dense rank does, see docs/benchmarks.md."""

    requests: int
    concurrency: int
    prompt_tokens: int
    output_tokens: int
    duration_s: float
    client_waited_s: float | None = None
    """How long the client waited for a core; it should be next to nothing. None in rows that are
    older than this field: of theirs some waited 2 s in a load."""
    requests_per_s: float
    tokens_per_s: float
    """Generated tokens of all requests together."""
    total_tokens_per_s: float
    """Prompts included."""
    ttft_ms: Latency
    tpot_ms: Latency
    itl_ms: Latency
    e2e_ms: Latency
    slo_tpot_ms: float | None = None
    goodput_per_s: float | None = None
    """Requests per second whose TPOT was within the SLO."""

    policy: str
    placement: str
    """Where the experts were loaded to, and what decided it."""
    online: dict[str, Any] | None = None
    """What moved experts while serving, if anything did."""
    num_ranks: int
    num_layers: int
    num_logical_experts: int
    num_physical_experts: int
    steps: float
    """With tokens."""
    decisions: int
    """Times the policy ran: once per layer and step, on every rank, steps without tokens too."""
    memory_bound_batches: int
    compute_bound_batches: int
    activated_worst_rank: float
    """Per step, the sum over layers of the most activated experts on any rank."""
    tokens_worst_rank: float
    """Likewise of (token, choice) pairs."""
    activated_per_rank: list[float]
    tokens_per_rank: list[float]
    waiting_share_by_experts: float
    """Of the time to the slowest rank's end, the share that an average rank waits, if a layer's
    time follows its activated experts."""
    waiting_share_by_tokens: float
    """The same if it follows tokens."""
    waiting_share: float | None = None
    """The share of the time in a layer's experts that an average rank waits for the slowest or for
    a fetch, by the ranks' clocks; None where experts cannot be timed."""
    fetch_wait_share: float | None = None
    """The part of it for fetches."""
    batch_time_spread: float | None = None
    """Standard deviation over mean of the time that the slowest rank's experts take for a batch."""
    fetching: dict[str, int] | None = None
    """What all ranks fetched, and their schedules by outcome, where a balancer fetches; see
    docs/harmoeny.md. Rows that are older than the schedules lack them."""
    experts_us_per_rank: list[float]
    """In the experts' kernel during the load; 0 where it cannot be timed."""
    experts_us_per_layer: float
    """The same per layer and step, on the rank that spent most."""
    decide_us_per_layer: float
    decide_share: float
    """Deciding, of all time in MoE layers."""
    wrapping_share: float
    """Choosing, gathering and adding back a rank's pairs (CPU), of all time in MoE layers."""
    memory_bytes: int
    """Resident memory of all processes of the server, shared pages counted in each."""
    samples: list[Sample]
    layers: list[LayerHeat]

    @property
    def moved_share(self) -> float | None:
        """Of all batches with tokens, in all layers, those whose tokens moved between ranks; None
        where nothing fetches, and in rows that do not say."""
        counted = schedules(self.fetching or {})
        with_tokens = sum(counted.values()) - counted.get("empty", 0)
        moved = counted.get("held", 0) + counted.get("fetched", 0)
        return moved / with_tokens if with_tokens else None

    @property
    def load_name(self) -> str:
        """The load and, where a rank was slowed, by how much."""
        return ", ".join(filter(None, (self.load, slowed(self.slow))))

    @property
    def identity(self) -> tuple[Any, ...]:
        """What rows that may be compared have in common; the values of IDENTITY."""
        return tuple(getattr(self, name) for name in IDENTITY)

    @property
    def key(self) -> Key:
        """Which measurement of its run it is."""
        return self.case, self.arm, self.position, self.slow, self.load, self.repeat


def slowed(slow: float) -> str:
    """By how much one rank was asked to be slower; empty if none was."""
    return f"one rank {slow - 1:+.0%}" if slow > 1 else ""


def schedules(counted: Mapping[str, Any]) -> dict[str, int]:
    """Schedules by outcome, e.g. `held`, out of a balancer's counters; empty if it has none."""
    end = "_schedules"
    return {name.removesuffix(end): counted[name] for name in counted if name.endswith(end)}


def parse(line: str | bytes) -> Measurement:
    """The row that a line holds, its means over steps with tokens.

    Raises:
        ValidationError: it is not such a row.
    """
    row = Measurement.model_validate_json(line)
    steps = (row.memory_bound_batches + row.compute_bound_batches) / row.num_layers
    return row if steps in (0, row.steps) else _over_steps(row, steps)


def _over_steps(row: Measurement, steps: float) -> Measurement:
    """The row with its means over so many steps: early ones are over those without tokens too,
    which data-parallel ranks take behind their last request."""
    more = row.steps / steps
    scaled = ("activated_worst_rank", "tokens_worst_rank", "experts_us_per_layer")
    listed = ("activated_per_rank", "tokens_per_rank")
    spread = row.batch_time_spread
    if spread is not None:  # Those steps took no time in the experts.
        spread = math.sqrt(max(0.0, (1 + spread**2) / more - 1))
    return row.model_copy(
        update={
            "steps": steps,
            "batch_time_spread": spread,
            **{name: more * getattr(row, name) for name in (*scaled, "decide_us_per_layer")},
            **{name: [more * value for value in getattr(row, name)] for name in listed},
        }
    )


def read_measurements(path: Path) -> list[Measurement]:
    """All rows of a file, oldest first, as `read_rows` does."""
    return read_rows(path, parse, "measurement", "python -m bench.run")


def read_rows(
    path: Path, parse: Callable[[bytes], DocumentT], what: str, made_by: str
) -> list[DocumentT]:
    """All rows of a file, oldest first; what is behind the last line feed is no row yet.

    Args:
        what: names a row in messages.
        made_by: the command that writes them.

    Raises:
        BalancerError: the file is missing, or a line is not such a row.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise _unreadable(path, error) from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(parse(line))
        except ValidationError as error:
            raise BalancerError(
                f"Line {number} of {path} is no {what} of this version. {explain(error)} Name "
                f"a file of rows, as `{made_by}` writes them, or measure anew with it."
            ) from error
    return rows


def _unreadable(path: Path, error: OSError) -> BalancerError:
    return BalancerError(
        f"The results {path} cannot be read: {error.strerror}. Name files of rows, or folders of "
        f"them; `python -m bench.run` writes them."
    )


def is_results(path: Path) -> bool:
    """Whether the first line of a file says that it holds measurements. Raises BalancerError as
    `first_row` does."""
    return first_row(path).get("format") == FORMAT


def first_row(path: Path) -> dict[str, Any]:
    """What the first line of a file holds; nothing if it was cut short or is no object.

    Raises:
        BalancerError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            first = json.loads(file.readline())
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, RecursionError):
        return {}
    return first if isinstance(first, dict) else {}


def newest(rows: Iterable[Measurement]) -> list[Measurement]:
    """The rows of what was measured last: the same settings, routing, code, machine and packages.

    Of a measurement that was made again only the last row.
    """
    rows = list(rows)
    same = [row for row in rows if row.identity == rows[-1].identity]
    return list({row.key: row for row in same}.values())


def newest_by_machine(rows: Iterable[Measurement]) -> dict[str, list[Measurement]]:
    """What was measured last on each machine, that of the machine with the last row first."""
    rows = list(rows)
    machines = dict.fromkeys(row.machine for row in reversed(rows))
    return {name: newest(row for row in rows if row.machine == name) for name in machines}
