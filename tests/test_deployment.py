"""The checks that need to know model, ranks and memory: each mistake has its paragraph."""

import re

import pytest
from deployments import deployment, refusal
from hypothesis import assume, given
from hypothesis import strategies as st

from vllm_balance.config import (
    BALANCERS,
    DEFAULT_REDUNDANCY,
    FETCHES,
    LOADED_BY_MAP,
    BalancerConfig,
)
from vllm_balance.deployment import (
    MAX_REDUNDANT,
    Deployment,
    check_eplb_limit,
    check_gpu_limits,
    exchange_bytes,
    num_redundant_experts,
)

REPLICATING = [
    name for name in BALANCERS if name not in ("static", *LOADED_BY_MAP) and name not in FETCHES
]


def refused(config: BalancerConfig, found: Deployment) -> str:
    return refusal(num_redundant_experts, config, found)


@pytest.mark.parametrize("name", BALANCERS)
def test_layouts_that_cannot_be_balanced(name):
    config = BalancerConfig(name=name)
    dense = refused(config, deployment(num_experts=0))
    assert "some/model is a dense model" in dense and f"--moe-balancer {name}" in dense
    off = refused(config, deployment(enable_expert_parallel=False))
    assert "Add --enable-expert-parallel" in off
    one = refused(config, deployment(num_ranks=1))
    assert "at least two expert-parallel ranks" in one and "--tensor-parallel-size 2" in one


def test_the_first_thing_that_is_wrong_is_named():
    """A dense model on one rank without expert parallelism: the model is what cannot be helped."""
    worst = deployment(num_experts=0, num_ranks=1, enable_expert_parallel=False)
    assert "dense model" in refused(BalancerConfig(name="metro"), worst)


@pytest.mark.parametrize("setting", [{"num_redundant_experts": 64}, {"redundancy": 1.5}])
def test_one_redundancy_for_all_balancers(setting):
    for name in REPLICATING:
        assert num_redundant_experts(BalancerConfig(name=name, **setting), deployment()) == 64
    text = refused(BalancerConfig(name="static", **setting), deployment())
    assert "static keeps one copy" in text and "64 redundant experts were asked for" in text


def test_static_may_say_that_it_has_no_redundancy():
    for setting in ({}, {"num_redundant_experts": 0}, {"redundancy": 1.0}):
        assert num_redundant_experts(BalancerConfig(name="static", **setting), deployment()) == 0


@given(st.integers(2, 512), st.integers(2, 64), st.sampled_from(REPLICATING))
def test_the_default_always_fits_the_ranks(num_experts, num_ranks, name):
    found = deployment(num_experts=num_experts, num_ranks=num_ranks)
    redundant = num_redundant_experts(BalancerConfig(name=name), found)
    assert (num_experts + redundant) % num_ranks == 0
    least = num_experts * (DEFAULT_REDUNDANCY - 1)
    assert least <= redundant < least + num_ranks


def test_one_copy_of_each_cannot_be_helped_by_redundant_experts():
    text = refused(BalancerConfig(name="static"), deployment(num_experts=60, num_ranks=8))
    assert "60 experts do not divide over 8 ranks" in text
    assert "number of ranks that divides 60" in text and "num_redundant_experts" not in text


def test_more_redundant_experts_than_vllms_eplb_makes_maps_for():
    check_eplb_limit(BalancerConfig(name="metro"), MAX_REDUNDANT)
    check_eplb_limit(BalancerConfig(name="static"), 2000)
    for name in ("metro", "even_split"):
        text = refusal(check_eplb_limit, BalancerConfig(name=name), MAX_REDUNDANT + 1)
        assert f"{name} asks for 1,024 slots" in text and "at most 1,023" in text


def test_count_and_ratio_must_agree():
    both = BalancerConfig(name="eplb", num_redundant_experts=64, redundancy=1.5)
    assert num_redundant_experts(both, deployment()) == 64
    differ = BalancerConfig(name="eplb", num_redundant_experts=60, redundancy=1.5)
    text = refused(differ, deployment())
    assert "`num_redundant_experts` = 60" in text and "means 64 redundant experts" in text


@given(st.integers(2, 512), st.integers(2, 64), st.integers(0, 7000))
def test_the_nearest_values_named_are_valid_and_nearest(num_experts, num_ranks, redundant):
    found = deployment(num_experts=num_experts, num_ranks=num_ranks)
    assume(num_ranks <= num_experts and redundant / num_experts < 14)
    assume((num_experts + redundant) % num_ranks)
    config = BalancerConfig(name="metro", num_redundant_experts=redundant)
    text = refused(config, found)
    assert f"make {num_experts + redundant} physical experts" in text
    named = re.findall(r"(\d+) \(redundancy ([\d.]+)\)", text)
    for count, ratio in named:
        by_count = BalancerConfig(name="metro", num_redundant_experts=int(count))
        by_ratio = BalancerConfig(name="metro", redundancy=float(ratio))
        assert num_redundant_experts(by_count, found) == int(count)
        assert num_redundant_experts(by_ratio, found) == int(count)
    fits = [n for n in range(redundant + num_ranks + 1) if (num_experts + n) % num_ranks == 0]
    nearest = [n for n in fits if n < redundant][-1:] + [n for n in fits if n > redundant][:1]
    assert [int(count) for count, _ in named] == nearest


@given(st.integers(1, 16), st.sampled_from([1, 2]), st.integers(0, 64))
def test_memory_is_refused_one_byte_too_early_and_names_the_bytes(expert_bytes, sharing, slots):
    facts = {"num_experts": 64, "expert_bytes": expert_bytes, "ranks_sharing_memory": sharing}
    config = BalancerConfig(name="metro", num_redundant_experts=2 * slots)
    of_a_layer = (64 + 2 * slots) // 2 * expert_bytes * sharing
    needed = (3 + 1) * of_a_layer  # The layers, and the buffer of vLLM's exchanges.
    assert num_redundant_experts(config, deployment(**facts, free_bytes=needed)) == 2 * slots
    text = refused(config, deployment(**facts, free_bytes=needed - 1))
    assert f"need {needed:,} bytes" in text
    assert f"and {needed - 1:,} bytes" in text
    assert "Lower `num_redundant_experts` or `redundancy`" in text


@pytest.mark.parametrize(
    ("settings", "on_gpu", "on_cpu"),
    [
        ({"name": "static"}, 0, 0),
        ({"name": "gem", "map": "m"}, 0, 0),
        ({"name": "gem", "map": "m", "num_redundant_experts": 4}, 66, 0),
        ({"name": "gem", "online": {}}, 64, 64),
        ({"name": "eplb", "num_redundant_experts": 4}, 66, 66),
        ({"name": "metro", "redundancy": 1.0}, 64, 64),
        ({"name": "harmoeny", "dynamic_slots": 2}, 66, 0),
    ],
)
def test_the_buffer_of_vllms_exchanges_holds_the_slots_of_a_layer(settings, on_gpu, on_cpu):
    """128 experts of 1,000 bytes on two ranks; a CPU writes to it only when experts move."""
    config = BalancerConfig(**settings)
    extra = 4 if on_gpu == 66 else 0
    for device, slots in ((False, on_gpu), (True, on_cpu)):
        assert exchange_bytes(config, deployment(on_cpu=device), extra) == 1000 * slots


def test_memory_is_refused_for_static_too():
    text = refused(BalancerConfig(name="static"), deployment(free_bytes=10))
    assert f"need {128 * 3 * 1000:,} bytes" in text


def test_what_is_free_beside_ranks_that_hold_their_memory_is_no_reason():
    later = deployment(free_bytes=10, ranks_hold_memory=True)
    assert num_redundant_experts(BalancerConfig(name="static"), later) == 0


@pytest.mark.parametrize("key", ["dynamic_slots", "threshold_tokens", "prefetch", "look_ahead"])
def test_what_says_how_to_fetch_needs_a_balancer_that_fetches(key):
    value = {"prefetch": "sync", "look_ahead": "off"}.get(key, 4)
    text = refused(BalancerConfig(name="metro", **{key: value}), deployment())
    assert f"`{key}`" in text and "harmoeny" in text


@pytest.mark.parametrize(
    ("name", "facts", "sizes", "named"),
    [
        ("metro", {"num_experts": 514}, {}, "514 experts,"),
        ("eplb", {}, {"num_redundant": 1024 - 128 + 2}, "1,026 physical experts,"),
        ("eplb", {"num_ranks": 128}, {}, "128 ranks,"),
    ],
)
def test_what_the_gpu_kernels_do_not_take(name, facts, sizes, named):
    def check(config: BalancerConfig, changes: dict, num_redundant: int = 0) -> None:
        check_gpu_limits(config, deployment(on_cpu=False, **changes), num_redundant)

    config = BalancerConfig(name=name)
    text = refusal(lambda: check(config, facts, **sizes))
    assert f"would route some/model with {named}" in text and "take at most 64 ranks" in text
    check(config, {"num_experts": 512, "num_ranks": 64}, num_redundant=512)
    check(BalancerConfig(name="static"), {"num_experts": 1024})


def test_who_takes_a_map():
    exflow = refused(BalancerConfig(name="exflow"), deployment())
    assert "place --policy exflow" in exflow
    gem = refused(BalancerConfig(name="gem"), deployment())
    assert "`map` is missing" in gem and "vllm-balance place" in gem
    static = refused(BalancerConfig(name="static", map="m.json"), deployment())
    assert "Use --moe-balancer gem" in static
    for name, redundant in (("gem", 0), ("metro", 32), ("eplb", 32), ("first_copy", 32)):
        config = BalancerConfig(name=name, map="m.json")
        assert num_redundant_experts(config, deployment()) == redundant


def test_gem_replicates_what_its_map_replicates():
    assert not BalancerConfig(name="gem", map="m.json", num_redundant_experts=0).replicates
    config = BalancerConfig(name="gem", map="m.json", num_redundant_experts=64)
    assert config.replicates and num_redundant_experts(config, deployment()) == 64
