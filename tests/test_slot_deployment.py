"""The checks for dynamic slots: each mistake has its paragraph, and the bytes are counted."""

import pytest
from deployments import deployment, refusal
from hypothesis import given
from hypothesis import strategies as st

from vllm_balance.config import DEFAULT_DYNAMIC_SLOTS, FETCHES, BalancerConfig, parse
from vllm_balance.deployment import Deployment
from vllm_balance.errors import BalancerError
from vllm_balance.slot_deployment import num_dynamic_slots


def refused(found: Deployment, **settings) -> str:
    return refusal(num_dynamic_slots, BalancerConfig(**({"name": "harmoeny"} | settings)), found)


@pytest.mark.parametrize("name", FETCHES)
def test_a_name_is_enough(name):
    assert num_dynamic_slots(BalancerConfig(name=name), deployment()) == DEFAULT_DYNAMIC_SLOTS
    few = deployment(num_experts=4)
    assert num_dynamic_slots(BalancerConfig(name=name), few) == 2, "all experts of the other rank"


@pytest.mark.parametrize("name", FETCHES)
def test_layouts_without_anything_to_balance(name):
    assert "dense model" in refused(deployment(num_experts=0), name=name)
    off = refused(deployment(enable_expert_parallel=False), name=name)
    assert "--enable-expert-parallel" in off
    assert "at least two" in refused(deployment(num_ranks=1), name=name)


def test_one_slot_is_too_few_and_more_than_the_foreign_experts_too_many():
    with pytest.raises(BalancerError, match="dynamic_slots"):
        parse({"name": "harmoeny", "dynamic_slots": 1})
    assert num_dynamic_slots(BalancerConfig(name="harmoeny", dynamic_slots=64), deployment()) == 64
    assert "has use for 64" in refused(deployment(), dynamic_slots=65)
    assert "has use for 1," in refused(deployment(num_experts=2))


def test_experts_that_do_not_divide_over_the_ranks():
    assert "do not divide over 3 ranks" in refused(deployment(num_ranks=3))


@pytest.mark.parametrize(
    "beside", [{"map": "m.json"}, {"redundancy": 1.5}, {"num_redundant_experts": 3}], ids=str
)
def test_what_cannot_stand_beside_slots(beside):
    assert f"`{next(iter(beside))}` cannot be used" in refused(deployment(), **beside)


@pytest.mark.parametrize("name", FETCHES)
def test_experts_in_slots_are_not_moved_by_online(name):
    assert "`online` belongs to --moe-balancer gem" in refused(deployment(), name=name, online={})


def test_the_redundant_experts_that_the_slots_are_may_be_named():
    config = BalancerConfig(name="harmoeny", dynamic_slots=4, num_redundant_experts=8)
    assert num_dynamic_slots(config, deployment()) == 4


def test_graphs_and_several_machines_are_refused():
    assert "--enforce-eager" in refused(deployment(on_cpu=False))
    assert num_dynamic_slots(
        BalancerConfig(name="harmoeny"), deployment(on_cpu=False, is_eager=True)
    )
    assert "several machines" in refused(deployment(one_machine=False))


def test_a_router_is_asked_early_only_if_it_decides():
    assert "`replay`" in refused(deployment(), look_ahead="router", replay={"zipf": 1.0})
    config = BalancerConfig(name="harmoeny", look_ahead="router", dynamic_slots=4)
    assert num_dynamic_slots(config, deployment()) == 4


@given(st.integers(1, 16), st.integers(2, 32))
def test_memory_on_cpu_is_that_of_the_ranks_and_one_store(expert_bytes, slots):
    facts = {"num_experts": 64, "expert_bytes": expert_bytes, "free_host_bytes": 2**30}
    config = BalancerConfig(name="harmoeny", dynamic_slots=slots)
    needed = (2 * (32 + slots) + 64) * 3 * expert_bytes
    assert num_dynamic_slots(config, deployment(**facts, free_bytes=needed)) == slots
    text = refused(deployment(**facts, free_bytes=needed - 1), dynamic_slots=slots)
    assert f"need {needed:,} bytes" in text and f"{64 * 3 * expert_bytes:,} bytes of" in text


@pytest.mark.parametrize("on_cpu", [True, False])
def test_what_is_free_beside_ranks_that_hold_their_memory_is_no_reason(on_cpu):
    config = BalancerConfig(name="harmoeny", dynamic_slots=8)
    none = {"free_bytes": 0, "free_host_bytes": 0, "on_cpu": on_cpu, "is_eager": True}
    assert "can be used" in refused(deployment(**none), dynamic_slots=8)
    assert num_dynamic_slots(config, deployment(**none, ranks_hold_memory=True)) == 8


def test_memory_on_a_device_is_apart_from_the_store():
    device = {"on_cpu": False, "is_eager": True, "ranks_sharing_memory": 1, "num_experts": 64}
    config = BalancerConfig(name="harmoeny", dynamic_slots=8)
    enough = {"free_bytes": 40 * (3 + 1) * 1000, "free_host_bytes": 64 * 3 * 1000}
    assert num_dynamic_slots(config, deployment(**device, **enough)) == 8
    for name in enough:
        short = enough | {name: enough[name] - 1}
        what = "host store" if name == "free_host_bytes" else "experts"
        assert f"The {what} of some/model" in refused(
            deployment(**device, **short), dynamic_slots=8
        )
