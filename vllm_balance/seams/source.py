"""What is relied on, checked against the source of a vLLM that is not installed."""

from __future__ import annotations

import ast
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

from vllm_balance.errors import BalancerError
from vllm_balance.seams import Place

Signatures = dict[str, list[str] | str | None]
"""Target -> names of its parameters; None if its class does not define it; in words, what of the
places around it is missing."""


def signatures(places: Iterable[Place], vllm: Path) -> Signatures:
    """What the source of a vLLM says of every place.

    Args:
        vllm: a wheel, or the folder that holds the package ``vllm``.

    Raises:
        BalancerError: no vLLM is found there.
    """
    read = _reader(vllm)
    return {place.target: _parameters(place.target, read) for place in places}


def problems(places: Iterable[Place], found: Signatures) -> dict[str, str]:
    """Target -> why a vLLM with these signatures is not what is relied on."""
    complaints = {}
    for place in places:
        parameters = found.get(place.target)
        if isinstance(parameters, str):
            complaints[place.target] = f"{place.target}: {parameters}"
        elif parameters is None:
            if not place.only_if_missing:
                complaints[place.target] = f"{place.target} does not exist"
        elif missing := [name for name in place.parameters if name not in parameters]:
            complaints[place.target] = f"{place.target} has no parameter {', '.join(missing)}"
    return complaints


def _reader(vllm: Path) -> Callable[[str], str]:
    """What reads a file of the package by its name in it; KeyError or OSError if there is none."""
    try:
        if vllm.suffix == ".whl":
            archive = zipfile.ZipFile(vllm)
            archive.getinfo("vllm/version.py")
            return lambda name: archive.read(name).decode()
        if (vllm / "vllm" / "version.py").is_file():
            return lambda name: (vllm / name).read_text(encoding="utf-8")
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        reason = error.strerror if isinstance(error, OSError) else error.args[0]
        raise BalancerError(
            f"--against names {vllm}, which is no wheel of vLLM that can be read ({reason}). Name "
            f"a wheel (`pip download --no-deps vllm==VERSION` gets one) or an unpacked one."
        ) from error
    raise BalancerError(
        f"--against names {vllm}, which is neither a wheel nor a folder that holds the package "
        f"vllm. Name a wheel (*.whl), or the folder that it was unpacked into."
    )


def _parameters(target: str, read: Callable[[str], str]) -> list[str] | str | None:
    module, _, path = target.partition(":")
    *classes, name = path.split(".")
    file = module.replace(".", "/") + ".py"
    try:
        body = ast.parse(read(file)).body
    except (KeyError, FileNotFoundError):
        return f"this vLLM has no file {file}"
    except SyntaxError as error:
        return f"{file} cannot be parsed by this Python ({error.msg})"
    for class_name in classes:
        found = [n for n in body if isinstance(n, ast.ClassDef) and n.name == class_name]
        if not found:
            return f"this vLLM has no class {class_name} in {file}"
        body = found[-1].body
    defined = _defined(body, name)
    if not defined:
        return None
    return [parameter for parameter in defined[-1] if all(parameter in each for each in defined)]


def _defined(body: list[ast.stmt], name: str) -> list[list[str]]:
    """Parameters of a function, of each of the definitions of which an `if` chooses one; of those
    one behind the other, which are overloads, only the last counts."""
    found: list[list[str]] = []
    for node in body:
        if isinstance(node, ast.If):
            chosen = _defined(node.body, name) + _defined(node.orelse, name)
            found = chosen or found
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
            arguments = node.args
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            found = [[argument.arg for argument in every]]
    return found
