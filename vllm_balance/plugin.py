"""Entry point of ``vllm.general_plugins``: puts the flags into vLLM and nothing else.

vLLM calls :func:`register` in every process (API server, engine core, workers), often more than
once. Without ``--moe-balancer`` the three wrapped functions behave as the originals; everything
that touches a running model is installed by the worker class that the flag selects
(``seams/worker.py``).
"""

from __future__ import annotations


def register() -> None:
    """Installs the argument seams. Safe to call again; imports our settings and their checks, which
    need nothing that vLLM does not import itself, and no numba.

    A vLLM into which they do not fit must still start for everybody who does not balance: it gets
    a warning and no flags, so that vLLM's parser refuses ``--moe-balancer``.
    """
    from vllm_balance.errors import BalancerError
    from vllm_balance.seams import install
    from vllm_balance.seams.arguments import ARGUMENT_SEAMS, REFUSING_SEAMS
    from vllm_balance.seams.versions import unsupported_version

    try:
        install(ARGUMENT_SEAMS if unsupported_version() is None else REFUSING_SEAMS)
    except BalancerError as error:
        from vllm.logger import init_logger

        init_logger(f"vllm.{__name__}").warning("--moe-balancer is not available. %s", error)
