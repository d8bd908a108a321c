"""``vllm-balance report``: one page with the tables and plots of measured runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_balance import documents
from vllm_balance.commands.printing import say
from vllm_balance.commands.report_plots import panels
from vllm_balance.errors import BalancerError
from vllm_balance.measurement import Measurement, is_results, newest, read_measurements
from vllm_balance.run_tables import tables

TEMPLATE = Path(__file__).with_name("report.html")


def report(
    results: Annotated[list[Path], typer.Argument(help="Files of rows, or folders of them.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The page.")] = Path("report.html"),
) -> None:
    """Write one self-contained page: tables, plots and where the numbers come from."""
    runs = [newest(rows) for rows in map(read_measurements, _files(results)) if rows]
    if not runs:
        raise BalancerError(
            f"There is no measurement in {', '.join(map(str, results))}. Measure with "
            f"`python -m bench.run configs/runs/decode.toml`; its rows are in bench/results."
        )
    documents.write_text(output, render(runs))
    say(f"Wrote {output}: {', '.join(rows[0].run for rows in runs)}.")


def render(runs: list[list[Measurement]]) -> str:
    """The page of some runs.

    Raises:
        BalancerError: plotly or jinja2 is not installed.
    """
    try:
        import jinja2
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        raise BalancerError(
            f"vllm-balance report needs {error.name}, which is not installed: "
            f"run pip install '.[report]' in the repository."
        ) from error
    template = jinja2.Template(
        TEMPLATE.read_text(encoding="utf-8"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    sections = [_section(rows) for rows in runs]
    figures = [[panel.figures for panel in section["panels"]] for section in sections]
    return template.render(sections=sections, figures=figures, plotly_js=get_plotlyjs())


def _section(rows: list[Measurement]) -> dict[str, Any]:
    last = rows[-1]
    return {
        "run": last.run,
        "title": last.title,
        "tables": tables(rows),
        "panels": panels(rows),
        "facts": {
            "versions": ", ".join(f"{name} {found}" for name, found in last.versions.items()),
            "seed": last.seed,
            "settings": last.config_hash,
            "rows": len(rows),
            "gate": last.gate,
        },
    }


def _files(results: list[Path]) -> list[Path]:
    """The files named, and in folders those that hold measurements, by name."""
    found = []
    for path in results:
        if path.is_dir():
            found += [f for f in sorted(path.glob("*.jsonl")) if f.is_file() and is_results(f)]
        else:
            found.append(path)
    return found
