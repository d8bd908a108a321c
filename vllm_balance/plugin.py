"""Entry point of ``vllm.general_plugins``: puts the flags into vLLM and nothing else.

vLLM calls :func:`register` in every process (API server, engine core, workers), often more than
once. Without ``--moe-balancer`` the three wrapped functions behave as the originals; everything
that touches a running model is installed by the worker class that the flag selects
(``seams/worker.py``).
"""

from __future__ import annotations


def register() -> None:
    """Installs the argument seams. Safe to call again; imports nothing heavy."""
    from vllm_balance.seams import install
    from vllm_balance.seams.arguments import ARGUMENT_SEAMS
    from vllm_balance.seams.versions import unsupported_version

    if unsupported_version() is None:
        install(ARGUMENT_SEAMS)
    else:
        from vllm_balance.seams.arguments import REFUSING_SEAMS

        install(REFUSING_SEAMS)
