"""vLLM versions we were not checked against: refused with the flag, untouched without it."""

import pytest
import vllm
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_balance import plugin, seams
from vllm_balance.errors import BalancerError
from vllm_balance.seams.arguments import REFUSING_SEAMS
from vllm_balance.seams.cpu import CPU_SEAMS
from vllm_balance.seams.router import ROUTER_SEAMS
from vllm_balance.seams.versions import unsupported_version

TOO_OLD = ["0.31.2", "0.9.0.1", "0.31.0+cpu"]
TOO_NEW = ["0.34.0", "0.34.0rc1", "1.0.0", "0.40.1.dev7+g1234"]
UNKNOWN = ["dev"]
TWO_RANKS = {"tensor_parallel_size": 2, "enable_expert_parallel": True}


@pytest.mark.parametrize(
    "version", ["0.32.0", "0.32.0+cpu", "0.32.1", "0.33.0", "0.33.0rc2", "0.33.1.dev3+gabc.cu130"]
)
def test_supported_versions(monkeypatch, version):
    monkeypatch.setattr(vllm, "__version__", version)
    assert unsupported_version() is None


@pytest.mark.parametrize("version", TOO_OLD + TOO_NEW + UNKNOWN)
def test_unsupported_versions_are_named_with_a_way_out(monkeypatch, version):
    monkeypatch.setattr(vllm, "__version__", version)
    text = unsupported_version()
    assert f"vLLM {version} is installed" in text
    assert "\n" not in text and "leave --moe-balancer off." in text
    assert ("upgrade vllm-balance" in text) == (version in TOO_NEW)


@pytest.mark.parametrize("version", ["0.31.0", "0.35.0"])
def test_with_the_flag_one_paragraph_and_status_2(monkeypatch, capfd, moe_model, version):
    monkeypatch.setattr(vllm, "__version__", version)
    plugin.register()
    parser = make_arg_parser(FlexibleArgumentParser())
    arguments = parser.parse_args(["--model", moe_model, "--moe-balancer", "metro"])
    engine_args = AsyncEngineArgs.from_cli_args(arguments)
    capfd.readouterr()
    with pytest.raises(SystemExit) as raised:
        engine_args.create_engine_config()
    assert raised.value.code == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("vllm: error: vllm-balance supports vLLM")
    assert f"vLLM {version} is installed" in lines[0]


@pytest.mark.parametrize("version", ["0.31.0", "0.35.0"])
def test_library_users_get_an_exception(monkeypatch, moe_model, version):
    monkeypatch.setattr(vllm, "__version__", version)
    plugin.register()
    wanted = EngineArgs(
        model=moe_model, **TWO_RANKS, additional_config={"moe_balancer": {"name": "static"}}
    )
    with pytest.raises(BalancerError, match=f"vLLM {version} is installed"):
        wanted.create_engine_config()


@pytest.mark.parametrize("version", ["0.31.0", "0.35.0"])
def test_without_the_flag_vllm_is_as_it_was(monkeypatch, moe_model, version):
    arguments = {
        "model": moe_model,
        "skip_tokenizer_init": True,
        "max_model_len": 64,
        **TWO_RANKS,
    }
    monkeypatch.setattr(vllm, "__version__", version)
    stock = EngineArgs(**arguments).create_engine_config()
    plugin.register()
    assert all(map(seams.is_installed, REFUSING_SEAMS))
    ours = EngineArgs(**arguments).create_engine_config()
    stock.instance_id = ours.instance_id = ""
    assert stock == ours
    assert not any(map(seams.is_installed, (*ROUTER_SEAMS, *CPU_SEAMS)))
