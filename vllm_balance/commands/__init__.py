"""The ``vllm-balance`` command."""

from __future__ import annotations

import typer

from vllm_balance.commands.doctor import doctor

app = typer.Typer(
    name="vllm-balance",
    help="Balance the experts of expert-parallel MoE models served by stock vLLM.",
    no_args_is_help=True,
    add_completion=False,
)
app.command()(doctor)


@app.callback()
def _commands() -> None:
    """Keeps `vllm-balance doctor` a sub-command while it is the only one."""


def main() -> None:
    """Runs the command line."""
    app()
