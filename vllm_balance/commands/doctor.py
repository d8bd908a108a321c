"""``vllm-balance doctor``: what is installed, which seams would apply, and why not if not."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from platform import machine
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_balance.commands import installed
from vllm_balance.commands.printing import say
from vllm_balance.seams import Place, Seam


@dataclass(kw_only=True)
class SeamFinding:
    """One place of vLLM and whether it is as it is relied on."""

    target: str
    why: str
    delete_when: str
    """Empty if it is called and not wrapped."""
    state: str
    """``applies``, ``called``, ``not needed`` (this vLLM has it) or what is wrong."""
    parameters: list[str] | None = None
    """Parameters of the place in the source that was checked; None if it is not defined there."""

    @property
    def is_problem(self) -> bool:
        return self.state not in ("applies", "called", "not needed")


@dataclass(kw_only=True)
class Findings:
    """All that doctor found."""

    vllm: str
    platform: str
    packages: dict[str, str]
    problems: list[str] = field(default_factory=list)
    untested: str | None = None
    """Why nobody knows yet whether what fits also works here; None where servers were run."""
    seams: list[SeamFinding] = field(default_factory=list)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
    against: Annotated[
        Path | None,
        typer.Option(help="Check the source of another vLLM instead: a wheel or a folder."),
    ] = None,
) -> None:
    """Print what was found, which places of vLLM are wrapped or called, and what stands in the way.

    Exit status 1 if one of them is not as it is relied on, or --moe-balancer would be refused.
    """
    findings = examine() if against is None else examine_source(against)
    if as_json:
        typer.echo(json.dumps(asdict(findings), indent=2))
    else:
        _print(findings)
    if findings.problems or any(seam.is_problem for seam in findings.seams):
        raise typer.Exit(1)


def examine_source(vllm: Path) -> Findings:
    """Checks every seam against the source of a vLLM that need not be installed.

    Raises:
        BalancerError: no vLLM is found there.
    """
    from vllm_balance.seams.source import problems, signatures

    places = all_places()
    found = signatures(places, vllm)
    complaints = problems(places, found)
    return Findings(
        vllm=vllm.name,
        platform="source only",
        packages={"vllm-balance": _version("vllm-balance")},
        untested="only its functions' parameters were compared, and no server was run with it",
        seams=[
            _source_finding(place, found[place.target], complaints.get(place.target))
            for place in places
        ],
    )


def _source_finding(
    place: Place, parameters: list[str] | str | None, complaint: str | None
) -> SeamFinding:
    needed = not place.only_if_missing or parameters is None
    found = _finding(place, complaint, needed=needed)
    found.parameters = parameters if isinstance(parameters, list) else None
    return found


def _finding(place: Place, problem: str | None, *, needed: bool) -> SeamFinding:
    """`needed`: this vLLM does not have it already."""
    fits, delete_when = "called", ""
    if isinstance(place, Seam):
        fits, delete_when = "applies" if needed else "not needed", place.delete_when
    return SeamFinding(
        target=place.target, why=place.why, delete_when=delete_when, state=problem or fits
    )


def all_places(*, cpu: bool = True, gpu: bool = True) -> tuple[Place, ...]:
    """Every seam, and what is called without being wrapped."""
    from vllm_balance.seams.used import USED

    return (*all_seams(cpu=cpu, gpu=gpu), *USED)


def all_seams(*, cpu: bool = True, gpu: bool = True) -> tuple[Seam, ...]:
    """Every seam of servers on these devices."""
    from vllm_balance.seams.arguments import ARGUMENT_SEAMS
    from vllm_balance.seams.cpu import CPU_SEAMS
    from vllm_balance.seams.gpu import GPU_SEAMS
    from vllm_balance.seams.loading import LOADING_SEAMS
    from vllm_balance.seams.router import ROUTER_SEAMS
    from vllm_balance.seams.server import SERVER_SEAMS

    devices = (*(CPU_SEAMS if cpu else ()), *(GPU_SEAMS if gpu else ()))
    return (*ARGUMENT_SEAMS, *SERVER_SEAMS, *ROUTER_SEAMS, *LOADING_SEAMS, *devices)


def examine() -> Findings:
    """Looks at the installed packages, the plugin and every seam; changes nothing."""
    packages = {name: _version(name) for name in ("vllm-balance", "torch", "triton", "numba")}
    if not installed.has_vllm():
        return Findings(
            vllm="not installed",
            platform=machine(),
            packages=packages,
            problems=[installed.MISSING],
        )
    from vllm.platforms import current_platform

    from vllm_balance.seams.device import untested_device
    from vllm_balance.seams.versions import (
        TESTED,
        installed_version,
        is_tested,
        unsupported_version,
    )

    findings = Findings(vllm=installed_version(), platform=_platform_name(), packages=packages)
    if (problem := unsupported_version()) is not None:
        findings.problems.append(problem)
    findings.problems += _plugin_problems()
    other = untested_device()
    if other is not None or not is_tested():
        findings.untested = (
            f"servers were run on x86 CPUs with vLLM {TESTED} only, and this is vLLM "
            f"{findings.vllm} on {other or findings.platform}"
        )
    on_cpu = current_platform.is_cpu()
    places = all_places(cpu=on_cpu, gpu=not on_cpu)
    findings.seams = [_examined(place) for place in places]
    return findings


def _examined(place: Place) -> SeamFinding:
    problem = place.problem()
    needed = problem is not None or not isinstance(place, Seam) or place.applies()
    return _finding(place, problem, needed=needed)


def _plugin_problems() -> list[str]:
    from vllm_balance.config import plugins_allowed

    if not any(
        point.name == "moe_balancer" for point in entry_points(group="vllm.general_plugins")
    ):
        return ["vLLM does not find the plugin: install vllm-balance into vLLM's environment."]
    if not plugins_allowed():
        return [
            "VLLM_PLUGINS is set and does not name moe_balancer, so vLLM does not load it. Add it "
            "to the list, or unset the variable."
        ]
    return []


def _platform_name() -> str:
    import torch
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return str(current_platform.get_device_name())
    if torch.cpu._is_amx_tile_supported():
        return "CPU with AMX"
    return "CPU with AVX-512" if torch.cpu._is_avx512_supported() else "CPU"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _print(findings: Findings) -> None:
    versions = ", ".join(f"{name} {found}" for name, found in findings.packages.items())
    say(f"vLLM {findings.vllm} on {findings.platform}; {versions}")
    table = Table(title="Places of vLLM that --moe-balancer wraps or calls")
    table.add_column("place", overflow="fold")
    table.add_column("why", overflow="fold")
    table.add_column("state", overflow="fold")
    for seam in findings.seams:
        colour = "red" if seam.is_problem else "green"
        table.add_row(escape(seam.target), escape(seam.why), f"[{colour}]{escape(seam.state)}[/]")
    Console().print(table)
    for problem in findings.problems:
        say(problem, "red")
    if findings.problems or any(seam.is_problem for seam in findings.seams):
        return
    if findings.untested is None:
        say("--moe-balancer can be used.", "green")
    else:
        say(f"--moe-balancer can be used, but it is untested here: {findings.untested}.", "yellow")
