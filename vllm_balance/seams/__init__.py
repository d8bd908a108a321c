"""Every change to vLLM, as data: what is wrapped, what is relied on, why, and when to delete it.

A seam is checked before it is applied (the target exists, has the parameters we rely on, and is
not already replaced by somebody else). :func:`install` applies all seams of a set or none, does
nothing for seams already in place, and :func:`uninstall` puts the originals back.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from vllm_balance.errors import BalancerError

_MARK = "__vllm_balance_seam__"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One function of vLLM that is relied on."""

    target: str
    """``module:Class.function`` or ``module:function``."""
    parameters: tuple[str, ...]
    """Parameters of the original that are relied on."""
    why: str
    only_if_missing: bool = False
    """Wrapped only if the class does not define the function itself: a fix upstream will make."""
    may_be_wrapped: bool = False
    """Other plugins may have wrapped the target too: what is wrapped only adds to it."""

    def owner(self) -> tuple[Any, str]:
        """The class or module that holds the target, and the attribute's name.

        Raises:
            BalancerError: the module or class does not exist in this vLLM.
        """
        module_name, _, path = self.target.partition(":")
        *parents, name = path.split(".")
        try:
            owner: Any = importlib.import_module(module_name)
            for parent in parents:
                owner = getattr(owner, parent)
        except (ImportError, AttributeError) as error:
            raise BalancerError(f"{self.target} does not exist in this vLLM ({error})") from error
        return owner, name

    def problem(self) -> str | None:
        """Why this vLLM is not what is relied on, or None."""
        try:
            owner, name = self.owner()
        except BalancerError as error:
            return str(error)
        if not hasattr(owner, name):
            return f"{self.target} does not exist in this vLLM"
        function = _unwrapped(inspect.getattr_static(owner, name))
        if getattr(function, _MARK, None) == self.target:
            return None
        expected = self.target.partition(":")[2].rpartition(".")[0]
        qualname = getattr(function, "__qualname__", "")
        is_foreign = bool(expected) and qualname.rpartition(".")[0] != expected
        if is_foreign and not self.only_if_missing and not self.may_be_wrapped:
            return f"{self.target} is already replaced by {function.__module__}.{qualname}"
        present = inspect.signature(function).parameters
        if is_foreign and any(p.kind is p.VAR_KEYWORD for p in present.values()):
            return None  # a wrapper that passes everything on
        missing = [p for p in self.parameters if p not in present]
        if missing:
            return (
                f"{self.target} has no parameter {', '.join(missing)}; it has {', '.join(present)}"
            )
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Seam(Place):
    """One wrapped function of vLLM."""

    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
    """Original function -> its replacement."""
    delete_when: str

    def applies(self) -> bool:
        """False for a fix that this vLLM already contains."""
        owner, name = self.owner()
        if not self.only_if_missing or name not in vars(owner):
            return True
        return getattr(_unwrapped(vars(owner)[name]), _MARK, None) == self.target


_ORIGINALS: dict[str, tuple[Any, str, Any]] = {}
"""Target -> owner, name and what stood in the owner's namespace (None if it was inherited)."""


def install(seams: Iterable[Seam]) -> None:
    """Applies all seams that are not in place yet, or none.

    Raises:
        BalancerError: at least one seam does not fit this vLLM; nothing was changed.
        Exception: whatever a ``wrap`` raised; the seams before it were taken back.
    """
    wanted = [seam for seam in seams if seam.target not in _ORIGINALS]
    problems = [problem for seam in wanted if (problem := seam.problem())]
    if problems:
        from vllm_balance.seams.versions import installed_version

        raise BalancerError(
            f"vLLM {installed_version()} does not have the places that vllm-balance relies on: "
            f"{'; '.join(problems)}. Nothing was changed. Run `vllm-balance doctor` for the whole "
            f"list, or leave --moe-balancer off."
        )
    with ExitStack() as undo:
        for seam in wanted:
            if seam.applies():
                _apply(seam)
                undo.callback(uninstall, (seam,))
        undo.pop_all()


def uninstall(seams: Iterable[Seam]) -> None:
    """Puts the originals back."""
    for seam in seams:
        if seam.target not in _ORIGINALS:
            continue
        owner, name, original = _ORIGINALS.pop(seam.target)
        if original is None:
            delattr(owner, name)
        else:
            setattr(owner, name, original)


def is_installed(seam: Seam) -> bool:
    return seam.target in _ORIGINALS


def _apply(seam: Seam) -> None:
    owner, name = seam.owner()
    static = inspect.getattr_static(owner, name)
    function = _unwrapped(static)
    replacement: Any = seam.wrap(function)
    replacement.__name__, replacement.__doc__ = name, function.__doc__
    replacement.__wrapped__ = function
    setattr(replacement, _MARK, seam.target)
    if isinstance(static, staticmethod | classmethod):
        replacement = type(static)(replacement)
    original = vars(owner).get(name)
    setattr(owner, name, replacement)
    _ORIGINALS[seam.target] = (owner, name, original)


def _unwrapped(static: Any) -> Any:
    return static.__func__ if isinstance(static, staticmethod | classmethod) else static
