"""`make demo`: serve the demo model on two expert-parallel ranks and compare the balancers.

Trains the model once (cached), starts `vllm serve --moe-balancer metro`, talks to it as any client
of the OpenAI API would, then sends the same prompts to static, eplb and metro.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer
from openai import OpenAI
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench import client, demo_model
from bench.client import Answers
from bench.demo_text import QUESTIONS
from bench.server import Arm, Server

NUM_REQUESTS = 16
NUM_TOKENS = 48
WARM_TOKENS = 24
"""Enough steps for vLLM's EPLB to place its experts before anything is measured."""
REPLICAS = {"redundancy": 1.5, "window_size": 16, "step_interval": 32}
METRO = REPLICAS | {"knee_tokens": 32}
"""16 requests on 32 experts are many tokens per expert: without a higher knee metro would step
aside in most batches on a CPU without AMX, and the demo would not show it."""
SUBJECTS = ("a list", "a socket", "the heap", "an iterator", "a thread", "a file", "the locale")

console = Console()


def arms(ranks: int) -> list[Arm]:
    """metro first, because it is shown before it is measured."""
    flags = ("--dtype", "float32", "--max-model-len", "1024", "--enforce-eager")
    return [
        Arm(name=name, balancer=name, settings=settings, tensor_parallel=ranks, flags=flags)
        for name, settings in (("metro", METRO), ("static", {}), ("eplb", REPLICAS))
    ]


def demo(
    ranks: Annotated[int, typer.Option(help="Expert-parallel ranks, one core each.")] = 2,
) -> None:
    """Serve, talk, compare."""
    console.rule("The demo model")
    model = demo_model.ensure()
    console.print(f"Trained and cached in {model}")
    rows: dict[str, tuple[Answers, list[dict]]] = {}
    for arm in arms(ranks):
        console.rule(f"--moe-balancer {arm.name}")
        with _started(arm, model) as server:
            if arm.name == "metro":
                _talk(server, model)
            rows[arm.name] = _measure(server, model)
    console.print(_table(rows))
    _judge(rows)


@contextmanager
def _started(arm: Arm, model: Path) -> Iterator[Server]:
    console.print("$ " + " ".join(arm.command(Path(model.name), 8000)), soft_wrap=True)
    progress = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console
    )
    task = progress.add_task("starting the server")
    with ExitStack() as running:
        with progress:
            server = running.enter_context(Server(arm, model))
            progress.update(task, description="the server is up")
        yield server


def _talk(server: Server, model: Path) -> None:
    """A completion and a streamed chat through the official client."""
    openai = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    prompt = "The module provides"
    completion = openai.completions.create(
        model=str(model), prompt=prompt, max_tokens=24, temperature=0
    )
    console.print(f"[bold]completion[/]  {prompt}[green]{completion.choices[0].text}[/]")
    question = QUESTIONS[0].format(name="a list")
    console.print(f"[bold]chat[/]        {question} ", end="")
    for chunk in openai.chat.completions.create(
        model=str(model),
        messages=[{"role": "user", "content": question}],
        max_tokens=32,
        temperature=0,
        stream=True,
    ):
        console.print(chunk.choices[0].delta.content or "", end="", style="green", markup=False)
    console.print()


def _prompts() -> list[str]:
    questions = [q.format(name=subject) for q in QUESTIONS for subject in SUBJECTS]
    return questions[:NUM_REQUESTS]


def _measure(server: Server, model: Path) -> tuple[Answers, list[dict]]:
    """Answers of a warm server whose experts have been placed, and what its balancers did."""
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console
    ) as progress:
        warm = progress.add_task("warming up", total=NUM_REQUESTS * WARM_TOKENS)
        client.send(
            server.url,
            str(model),
            _prompts(),
            max_tokens=WARM_TOKENS,
            on_token=lambda: progress.advance(warm),
        )
        server.reset()
        task = progress.add_task("measuring", total=NUM_REQUESTS * NUM_TOKENS)
        answers = client.send(
            server.url,
            str(model),
            _prompts(),
            max_tokens=NUM_TOKENS,
            on_token=lambda: progress.advance(task),
        )
    return answers, server.status()


def _table(rows: dict[str, tuple[Answers, list[dict]]]) -> Table:
    table = Table(title=f"{NUM_REQUESTS} requests at once, {NUM_TOKENS} tokens each, measured here")
    for heading in (
        "balancer",
        "same tokens",
        "latency ms",
        "tokens/s",
        "experts on the worst rank*",
        "batches decided",
    ):
        table.add_column(heading, justify="left" if heading == "balancer" else "right")
    for name in ("static", "eplb", "metro"):
        answers, ranks = rows[name]
        steps = ranks[0]["decisions"] / ranks[0]["num_layers"]
        table.add_row(
            name,
            "yes" if _tokens(answers) == _tokens(rows["static"][0]) else "no",
            f"{answers.e2e_ms:.0f}",
            f"{answers.tokens_per_s:.0f}",
            f"{ranks[0]['max_activated_sum'] / steps:.1f}",
            f"{_decided(ranks[0])}",
        )
    table.caption = (
        "* activated experts per step: sum over layers of the largest number on any rank. "
        "latency: of whole answers, median; several tokens may arrive at once where a step is as "
        "short as here, so that a time per token would say nothing. "
        "eplb and metro have 1.5 x the experts in memory. The demo model is tiny: for times that "
        "mean something see docs/benchmarks.md."
    )
    return table


def _tokens(answers: Answers) -> list[tuple[int, ...]]:
    return [answer.token_ids for answer in answers.answers]


def _decided(rank: dict) -> int:
    """Batches (layers times steps) in which the policy did what its name says."""
    if rank["balancer"] == "metro":
        return int(rank["memory_bound_batches"])
    return int(rank["decisions"])


def _judge(rows: dict[str, tuple[Answers, list[dict]]]) -> None:
    """Ends with status 1 if tokens differ or a policy never ran."""
    for name, (answers, ranks) in rows.items():
        if _tokens(answers) != _tokens(rows["static"][0]):
            raise SystemExit(f"{name} generated other tokens than static.")
        if any(_decided(rank) == 0 for rank in ranks):
            raise SystemExit(f"{name} never decided anything; its numbers mean nothing.")


if __name__ == "__main__":
    typer.run(demo)
