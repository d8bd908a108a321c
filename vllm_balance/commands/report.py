"""``vllm-balance report``: one page with the tables and plots of measured runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_balance import documents, own_benchmarks
from vllm_balance.commands import recovery_plot
from vllm_balance.commands.printing import say
from vllm_balance.commands.report_plots import Panel, panels
from vllm_balance.errors import BalancerError
from vllm_balance.measurement import Measurement, is_results, newest, read_measurements
from vllm_balance.own_benchmarks import OWN_BENCHMARKS, OwnRow
from vllm_balance.run_tables import tables

TEMPLATE = Path(__file__).with_name("report.html")
OWN_PANELS: dict[str, Callable[[list[Any]], list[Panel]]] = {"recovery": recovery_plot.panels}
"""Plots of benchmarks of their own."""
Section = dict[str, Any]


def report(
    results: Annotated[list[Path], typer.Argument(help="Files of rows, or folders of them.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The page.")] = Path("report.html"),
) -> None:
    """Write one self-contained page: tables, plots and where the numbers come from."""
    sections = [section for path in _files(results) if (section := _section_of(path))]
    if not sections:
        raise BalancerError(
            f"There is no measurement in {', '.join(map(str, results))}. Measure with "
            f"`python -m bench.run configs/runs/decode.toml`; its rows are in bench/results."
        )
    documents.write_text(output, render(sections))
    say(f"Wrote {output}: {', '.join(section['run'] for section in sections)}.")


def render(sections: list[Section]) -> str:
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
    figures = [[panel.figures for panel in section["panels"]] for section in sections]
    return template.render(sections=sections, figures=figures, plotly_js=get_plotlyjs())


def _section_of(path: Path) -> Section | None:
    """What was measured last of a file; None if it holds no row yet."""
    name = own_benchmarks.name_in(path)
    if name is None:
        measured = read_measurements(path)
        return _section(newest(measured)) if measured else None
    own = own_benchmarks.read(path, name)
    return _own_section(name, own_benchmarks.newest_run(own)) if own else None


def _section(rows: list[Measurement]) -> Section:
    last = rows[-1]
    return {
        "run": last.run,
        "title": last.title,
        "tables": tables(rows),
        "panels": panels(rows),
        "facts": _facts(rows),
    }


def _own_section(name: str, rows: list[OwnRow]) -> Section:
    own, more = OWN_BENCHMARKS[name], OWN_PANELS.get(name)
    return {
        "run": name,
        "title": own.about,
        "tables": [own.table(rows)],
        "panels": more(rows) if more else [],
        "facts": _facts(rows),
    }


def _facts(rows: Sequence[Measurement | OwnRow]) -> dict[str, str]:
    """Where rows come from, as far as they say."""
    last = rows[-1]
    facts = {
        "versions": ", ".join(f"{name} {found}" for name, found in last.versions.items()),
        "seed": str(last.seed),
        "settings": last.config_hash,
        "rows": str(len(rows)),
        "gate": last.gate,
    }
    return {name: fact for name, fact in facts.items() if fact}


def _files(results: list[Path]) -> list[Path]:
    """The files named, and in folders those with rows that can be shown, by name."""
    found = []
    for path in results:
        if path.is_dir():
            files = sorted(filter(Path.is_file, path.glob("*.jsonl")), key=lambda file: file.stem)
            found += [f for f in files if is_results(f) or own_benchmarks.name_in(f)]
        else:
            found.append(path)
    return found
