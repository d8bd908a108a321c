"""The flags: ``--moe-balancer`` in every vLLM command, checked when the engine config is made."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NoReturn

from vllm_balance import config as balancer_config
from vllm_balance.config import BALANCERS, KEY
from vllm_balance.errors import BalancerError
from vllm_balance.seams import Seam
from vllm_balance.seams.deployment import configure
from vllm_balance.seams.versions import unsupported_version


class CommandSettings(dict[str, Any]):
    """``additional_config`` that came through a command line, where a refusal ends the process.

    The type is the mark, because offline commands copy their arguments: ``LLM(**vars(args))``.
    """


_DESCRIPTION = (
    "Balances the experts of expert-parallel MoE models (vllm-balance). Needs "
    "--enable-expert-parallel and at least two ranks."
)


def _add_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        group = parser.add_argument_group(title="MoEBalancerConfig", description=_DESCRIPTION)
        group.add_argument(
            "--moe-balancer",
            metavar="NAME",
            default=None,
            help=f"How experts and tokens are balanced over ranks: {', '.join(BALANCERS)}.",
        )
        group.add_argument(
            "--moe-balancer-config",
            metavar="FILE.toml | JSON",
            default=None,
            help="Settings of the balancer, from a .toml or .json file or as a JSON string; "
            "unknown keys are errors.",
        )
        group.add_argument(
            "--moe-record",
            metavar="FILE",
            default=None,
            help="Record which experts each step uses into a new .npz file (the balancer static "
            "if none is named).",
        )
        return parser

    return add_cli_args


def _from_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_cli_args(cls: type, args: Any) -> Any:
        engine_args = original(cls, args)
        name = getattr(args, "moe_balancer", None)
        source = getattr(args, "moe_balancer_config", None)
        record = getattr(args, "moe_record", None)
        if name is None and source is None and record is None:
            return engine_args
        try:
            settings = balancer_config.read(name, source, record)
            present = (engine_args.additional_config or {}).get(KEY, settings)
            if balancer_config.parse(present) != balancer_config.parse(settings):
                raise BalancerError(
                    f"--moe-balancer and --additional-config both hold settings of the MoE "
                    f"balancer and differ: {settings} and {present}. Give them once."
                )
        except BalancerError as error:
            _exit(error)
        engine_args.additional_config = CommandSettings(
            {**(engine_args.additional_config or {}), KEY: settings}
        )
        # With several API servers each reads `args` anew in its own process, and vLLM loads
        # plugins there only while this function runs: the original must find the settings.
        args.additional_config = engine_args.additional_config
        return engine_args

    return from_cli_args


def _create_engine_config(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        vllm_config = original(self, *args, **kwargs)
        try:
            configure(vllm_config)
        except BalancerError as error:
            if isinstance(self.additional_config, CommandSettings):
                _exit(error)
            raise
        return vllm_config

    return create_engine_config


def _refuse(original: Callable[..., Any]) -> Callable[..., Any]:
    """For a vLLM version we do not know: refuses to run with a balancer, changes nothing else."""

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if KEY in (self.additional_config or {}):
            error = BalancerError(unsupported_version())
            if isinstance(self.additional_config, CommandSettings):
                _exit(error)
            raise error
        return original(self, *args, **kwargs)

    return create_engine_config


def _exit(error: BalancerError) -> NoReturn:
    """Ends a command as argparse does: one paragraph on stderr, status 2."""
    print(f"vllm: error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2)


_ENGINE_ARGS = "vllm.engine.arg_utils:EngineArgs"

_FLAGS = (
    Seam(
        target=f"{_ENGINE_ARGS}.add_cli_args",
        parameters=("parser",),
        wrap=_add_cli_args,
        why="puts --moe-balancer, --moe-balancer-config and --moe-record into every vLLM command",
        delete_when="vLLM lets plugins add arguments",
        may_be_wrapped=True,
    ),
    Seam(
        target=f"{_ENGINE_ARGS}.from_cli_args",
        parameters=("args",),
        wrap=_from_cli_args,
        why="carries the flags into additional_config, which reaches every process",
        delete_when="vLLM lets plugins add arguments",
        may_be_wrapped=True,
    ),
)


def _config_seam(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Seam:
    return Seam(
        target=f"{_ENGINE_ARGS}.create_engine_config",
        parameters=("self",),
        wrap=wrap,
        why="checks the deployment before weights are loaded, and selects worker and EPLB settings",
        delete_when="vLLM calls plugins with the finished VllmConfig",
        may_be_wrapped=True,
    )


ARGUMENT_SEAMS = (*_FLAGS, _config_seam(_create_engine_config))
REFUSING_SEAMS = (*_FLAGS, _config_seam(_refuse))
