"""``vllm-balance map info``: what a placement map holds, and whether it fits a deployment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_balance import maps, model_shape
from vllm_balance.commands.printing import say, spans
from vllm_balance.errors import BalancerError
from vllm_balance.maps import PlacementMap


def map_info(
    file: Annotated[Path, typer.Argument(help="The map, as `vllm-balance place` wrote it.")],
    model: Annotated[
        Path | None,
        typer.Option(
            help="Does it fit this model? A folder, a config.json, or the name on Hugging Face of "
            "one that was downloaded."
        ),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Does it fit so many expert-parallel ranks?")
    ] = None,
) -> None:
    """Print what a placement map was made from, and what it holds.

    Exit status 1 if it does not fit what is asked about; 2 if it is damaged or was edited.
    """
    found = maps.load(file)
    _print(found)
    if model is None and ranks is None:
        return
    shape = found.shape if model is None else model_shape.from_config(model)
    layers = () if model is None else model_shape.layers_of(model)
    try:
        found.require(shape=shape, num_ranks=ranks or found.num_ranks, layers=layers)
    except BalancerError as error:
        say(str(error), "red")
        raise typer.Exit(1) from error
    asked = [] if model is None else [model_shape.name_of(model)]
    asked += [] if ranks is None else [f"{ranks} ranks"]
    say(f"It fits {' on '.join(asked)}.")
    doubt = None if model is None else found.doubt(model_shape.name_of(model))
    if doubt is not None:
        say(doubt, "yellow")


def _print(found: PlacementMap) -> None:
    shape, redundant = found.shape, found.num_physical - found.shape.num_experts
    rows = {
        "policy": found.policy,
        "made": f"{found.created:%Y-%m-%d %H:%M %Z}",
        **{f"from {name}": value for name, value in found.sources.items()},
        "model": f"{shape.name}, {shape.architecture}",
        "experts": f"{shape.num_experts}, top-{shape.top_k}, {shape.hidden} x {shape.inner}",
        "ranks": str(found.num_ranks),
        "slots per rank": f"{found.num_physical // found.num_ranks}, {redundant} redundant experts "
        f"per layer over all ranks",
        "layers": f"{spans(layer.index for layer in found.layers)} of {shape.num_layers}",
        "checksum": f"{found.checksum[:12]}, that of the content",
    }
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(escape(name), escape(value))
    Console().print(table)
