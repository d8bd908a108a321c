"""How a benchmark's command ends if it is refused something."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

from vllm_balance.errors import BalancerError


def main(function: Callable[..., None]) -> None:
    """Runs a function as a command; a refusal is a message and exit status 2."""
    try:
        typer.run(function)
    except BalancerError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error
