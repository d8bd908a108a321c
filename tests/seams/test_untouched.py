"""What we never touch: the scheduler, the KV cache, and vLLM itself without our flag."""

import importlib
import inspect
import pkgutil
from dataclasses import fields

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_balance import plugin, seams
from vllm_balance.commands.doctor import all_seams
from vllm_balance.seams.arguments import ARGUMENT_SEAMS, REFUSING_SEAMS
from vllm_balance.seams.router import ROUTER_SEAMS

ALL_SEAMS = all_seams()


def functions_of(package_name: str) -> dict[str, object]:
    """Every function, method and class of a package's modules, by its full name."""
    package = importlib.import_module(package_name)
    names = [package_name]
    for module in pkgutil.walk_packages(package.__path__, f"{package_name}."):
        names.append(module.name)
    found = {}
    for name in names:
        for attribute, value in vars(importlib.import_module(name)).items():
            if inspect.isclass(value):
                found[f"{name}:{attribute}"] = value
                for member, function in vars(value).items():
                    found[f"{name}:{attribute}.{member}"] = function
            elif inspect.isroutine(value):
                found[f"{name}:{attribute}"] = value
    return found


@pytest.mark.parametrize("wanted", [ALL_SEAMS, REFUSING_SEAMS], ids=["all", "refusing"])
def test_scheduler_and_kv_cache_are_untouched(wanted):
    assert not [seam.target for seam in wanted if seam.target.startswith("vllm.v1.core")]
    before = functions_of("vllm.v1.core")
    for known in (
        "vllm.v1.core.sched.scheduler:Scheduler.schedule",
        "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots",
        "vllm.v1.core.block_pool:BlockPool.get_new_blocks",
    ):
        assert known in before
    seams.install(wanted)
    assert all(map(seams.is_installed, wanted))
    after = functions_of("vllm.v1.core")
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] is not after[name]] == []


def test_the_comparison_of_functions_sees_a_seam():
    """The test above could fail: the same comparison finds what a seam does replace."""
    before = functions_of("vllm.model_executor.layers.fused_moe.runner")
    seams.install(ROUTER_SEAMS)
    after = functions_of("vllm.model_executor.layers.fused_moe.runner")
    changed = {name for name in before if before[name] is not after[name]}
    assert {name.rpartition(":")[2] for name in changed} == {"MoERunner._select_forward"}


def defaults() -> dict[str, object]:
    return vars(AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args([]))


def test_register_adds_three_arguments_that_are_off_and_changes_no_default():
    stock = defaults()
    plugin.register()
    ours = defaults()
    assert ours.pop("moe_balancer") is None
    assert ours.pop("moe_balancer_config") is None
    assert ours.pop("moe_record") is None
    assert ours == stock


def test_register_again_changes_nothing():
    plugin.register()
    once = [EngineArgs.__dict__[seam.owner()[1]] for seam in ARGUMENT_SEAMS]
    plugin.register()
    assert [EngineArgs.__dict__[seam.owner()[1]] for seam in ARGUMENT_SEAMS] == once
    assert len(once) == 3


def same_config(left, right) -> list[str]:
    """Names of the parts of two VllmConfigs that differ; each config has its own instance_id."""
    assert type(left) is type(right)
    names = [field.name for field in fields(left) if field.name != "instance_id"]
    return [name for name in names if getattr(left, name) != getattr(right, name)]


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_without_the_flag_the_engine_config_is_that_of_stock_vllm(kind, dense_model, moe_model):
    model = dense_model if kind == "dense" else moe_model
    parallel = (
        {} if kind == "dense" else {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    )
    arguments = {"model": model, "skip_tokenizer_init": True, "max_model_len": 64, **parallel}

    assert not any(map(seams.is_installed, ALL_SEAMS))
    stock = EngineArgs(**arguments).create_engine_config()
    plugin.register()
    ours = EngineArgs(**arguments).create_engine_config()
    assert all(map(seams.is_installed, ARGUMENT_SEAMS))
    assert same_config(stock, ours) == []
    assert stock.compute_hash() == ours.compute_hash()
    others = [seam for seam in ALL_SEAMS if seam not in ARGUMENT_SEAMS]
    assert not any(map(seams.is_installed, others))


def test_the_comparison_of_configs_sees_a_balancer(moe_model):
    """The test above could fail: with a balancer the same comparison finds the difference."""
    arguments = {
        "model": moe_model,
        "skip_tokenizer_init": True,
        "max_model_len": 64,
        "tensor_parallel_size": 2,
        "enable_expert_parallel": True,
    }
    plugin.register()
    stock = EngineArgs(**arguments).create_engine_config()
    with_balancer = EngineArgs(**arguments, additional_config={"moe_balancer": "metro"})
    ours = with_balancer.create_engine_config()
    assert set(same_config(stock, ours)) == {"additional_config", "parallel_config"}
    assert stock.compute_hash() != ours.compute_hash()
