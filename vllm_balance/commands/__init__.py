"""The ``vllm-balance`` command."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from vllm_balance.commands.doctor import doctor
from vllm_balance.commands.map import map_info
from vllm_balance.commands.place import place
from vllm_balance.commands.plan import plan
from vllm_balance.commands.profile import profile
from vllm_balance.commands.report import report
from vllm_balance.commands.trace import info
from vllm_balance.errors import BalancerError

app = typer.Typer(
    name="vllm-balance",
    no_args_is_help=True,
    add_completion=False,
)


def _say_version(asked: bool) -> None:
    if asked:
        print(f"vllm-balance {version('vllm-balance')}")
        raise typer.Exit


@app.callback()
def _all_commands(
    asked: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_say_version, help="Print it and exit."),
    ] = False,
) -> None:
    """Balance the experts of expert-parallel MoE models served by stock vLLM."""


app.command()(doctor)
app.command()(profile)
app.command()(place)
app.command()(plan)
app.command()(report)
trace = typer.Typer(help="Recorded routing.", no_args_is_help=True)
app.add_typer(trace, name="trace")
trace.command()(info)


@trace.callback()
def _trace_commands() -> None:
    """Recorded routing."""


placement_map = typer.Typer(help="Placement maps.", no_args_is_help=True)
app.add_typer(placement_map, name="map")
placement_map.command("info")(map_info)


@placement_map.callback()
def _map_commands() -> None:
    """Placement maps."""


def main() -> None:
    """Runs the command line; a refusal is a message and exit status 2."""
    try:
        app()
    except BalancerError as error:
        print(f"vllm-balance: {error}", file=sys.stderr)
        raise SystemExit(2) from error
