"""What vLLM's own settings say beside ours, in a finished VllmConfig."""

import pytest
from deployments import deployment as facts
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from vllm_balance.config import BalancerConfig
from vllm_balance.errors import BalancerError
from vllm_balance.seams import combinations, deployment


def stock_config(model: str, **arguments):
    layout = {"tensor_parallel_size": 2} | arguments
    return EngineArgs(
        model=model,
        skip_tokenizer_init=True,
        max_model_len=64,
        enable_expert_parallel=True,
        **layout,
    ).create_engine_config()


def configured(config, settings):
    config.additional_config = {"moe_balancer": settings}
    deployment.configure(config)
    return config


def with_vllms_own(model: str, settings, **eplb: int):
    """The configuration after ours, where --eplb-config names these values."""
    config = stock_config(model)
    for name, value in eplb.items():
        setattr(config.parallel_config.eplb_config, name, value)
    return configured(config, settings)


def test_vllms_own_intervals_are_taken(moe_model):
    config = with_vllms_own(moe_model, "metro", window_size=7, step_interval=9)
    eplb = config.parallel_config.eplb_config
    assert (eplb.window_size, eplb.step_interval) == (7, 9)
    settled = config.additional_config["moe_balancer"]
    assert (settled["window_size"], settled["step_interval"]) == (7, 9)


def test_an_interval_may_be_named_in_either_place_or_twice(moe_model):
    settings = {"name": "eplb", "window_size": 7, "step_interval": 8}
    config = with_vllms_own(moe_model, settings, window_size=7)
    eplb = config.parallel_config.eplb_config
    assert (eplb.window_size, eplb.step_interval) == (7, 8)


@pytest.mark.parametrize("ours", [8, 1000])
def test_two_values_for_one_interval_are_refused(moe_model, ours):
    with pytest.raises(BalancerError, match=rf"`window_size` is {ours} .* and 7 in --eplb-config"):
        with_vllms_own(moe_model, {"name": "eplb", "window_size": ours}, window_size=7)


def test_micro_batches_are_refused_however_they_are_asked_for(moe_model):
    config = stock_config(moe_model)
    config.parallel_config.ubatch_size = 3
    with pytest.raises(BalancerError, match=r"dual-batch overlap \(--enable-dbo, --ubatch-size\)"):
        configured(config, "metro")


def test_a_map_needs_all_weights_to_be_read(moe_model):
    """vLLM turns its filter off itself where EPLB is on."""
    config = stock_config(moe_model)
    config.parallel_config.enable_ep_weight_filter = True
    for name in ("gem", "exflow"):
        with pytest.raises(BalancerError, match="a map and --enable-ep-weight-filter"):
            combinations.check_combination(BalancerConfig(name=name, map="m"), config)
    for others in ({"name": "static"}, {"name": "metro", "map": "m"}):
        combinations.check_combination(BalancerConfig(**others), config)


@pytest.mark.parametrize(
    ("setting", "value", "names", "is_cpu"),
    [
        ("lora_config", "LoRA", {"metro", "gem", "harmoeny"}, True),
        ("weight_transfer_config", "weight transfer", {"metro", "harmoeny"}, False),
        ("weight_transfer_config", "weight transfer", {"static", "metro", "gem", "harmoeny"}, True),
    ],
)
def test_weights_that_follow_the_linear_placement_are_refused_where_experts_are_elsewhere(
    moe_model, monkeypatch, setting, value, names, is_cpu
):
    """And new weights on a CPU, whose kernels take them packed."""
    config = stock_config(moe_model)
    monkeypatch.setattr(current_platform, "is_cpu", lambda: is_cpu)
    setattr(config, setting, object())
    every = (
        {"name": "static"},
        {"name": "metro"},
        {"name": "gem", "map": "m"},
        {"name": "harmoeny"},
    )
    for settings in every:
        if settings["name"] in names:
            with pytest.raises(BalancerError, match=f"together with {value}"):
                combinations.check_combination(BalancerConfig(**settings), config)
        else:
            combinations.check_combination(BalancerConfig(**settings), config)


def test_steps_are_not_tried_again_by_balancers_with_a_memory_of_them(moe_model):
    """Nor where counts are exchanged: a rank that is gone would be waited for."""
    config = stock_config(moe_model)
    config.parallel_config.enable_fault_tolerance = True
    for name in ("harmoeny", "metro"):
        with pytest.raises(BalancerError, match="--enable-fault-tolerance"):
            combinations.check_combination(BalancerConfig(name=name), config)
    combinations.check_combination(BalancerConfig(name="eplb"), config)


def test_slots_are_not_offloaded(moe_model):
    config = stock_config(moe_model)
    config.offload_config.uva.cpu_offload_gb = 1.0
    with pytest.raises(BalancerError, match="--cpu-offload-gb"):
        combinations.check_combination(BalancerConfig(name="harmoeny"), config)
    combinations.check_combination(BalancerConfig(name="metro"), config)


@pytest.mark.parametrize(
    ("backend", "layers", "is_on"), [("auto", 2, True), ("prefetch", 2, True), ("uva", 2, False)]
)
def test_weights_in_buffers_that_layers_share_cannot_be_fetched_or_moved(
    moe_model, backend, layers, is_on
):
    config = stock_config(moe_model)
    combinations.check_combination(BalancerConfig(name="harmoeny"), config)
    config.offload_config.offload_backend = backend
    config.offload_config.prefetch.offload_group_size = layers
    combinations.check_combination(BalancerConfig(name="static"), config)
    for name in ("harmoeny", "metro"):
        if is_on:
            with pytest.raises(BalancerError, match="offloading by prefetch"):
                combinations.check_combination(BalancerConfig(name=name), config)
        else:
            combinations.check_combination(BalancerConfig(name=name), config)


def test_of_a_pooling_model_counts_are_recorded_and_no_ids(moe_model, tmp_path):
    config = stock_config(moe_model)
    config.model_config.runner_type = "pooling"
    record = {"file": str(tmp_path / "r.npz")}
    combinations.check_combination(BalancerConfig(name="static", record=record), config)
    with pytest.raises(BalancerError, match="recording ids of a pooling model"):
        asked = BalancerConfig(name="static", record=record | {"what": "ids"})
        combinations.check_combination(asked, config)


@pytest.mark.parametrize(
    ("on_cpu", "is_eager", "is_refused"),
    [(True, False, False), (False, True, False), (False, False, True)],
)
def test_a_captured_graph_cannot_replay(moe_model, on_cpu, is_eager, is_refused):
    model = stock_config(moe_model).model_config
    replayed = BalancerConfig(name="metro", replay={"zipf": 0.8, "seed": 1})
    asked = (replayed, model, facts(on_cpu=on_cpu, is_eager=is_eager, num_experts=8))
    if is_refused:
        with pytest.raises(BalancerError, match="would repeat those of its capture"):
            combinations.check_replay(*asked)
    else:
        combinations.check_replay(*asked)


@pytest.fixture
def on_gpus(monkeypatch):
    found = facts(on_cpu=False, num_experts=8)
    monkeypatch.setattr(deployment, "read_deployment", lambda config, ranks_hold_memory: found)


def test_batches_of_any_size_are_mapped_on_gpus(moe_model, on_gpus):
    layout = {"tensor_parallel_size": 1, "data_parallel_size": 2}
    configured(stock_config(moe_model, max_num_batched_tokens=2**21, **layout), "metro")


def test_a_backend_whose_weights_eplb_does_not_know_is_refused_with_it_alone(moe_model):
    """vLLM's own check runs before EPLB is turned on."""
    config = stock_config(moe_model)
    config.parallel_config.all2all_backend = "moonep"
    with pytest.raises(BalancerError, match="together with --all2all-backend moonep"):
        configured(config, "metro")
    configured(config, "static")


@pytest.mark.parametrize(("name", "logs"), [("harmoeny", False), ("metro", True)])
def test_balancedness_is_not_exchanged_where_nothing_is_rebalanced(moe_model, name, logs):
    config = with_vllms_own(moe_model, name, log_balancedness=True)
    assert config.parallel_config.eplb_config.log_balancedness == logs


def test_eplb_on_gpus_is_checked_and_leaves_the_ports_that_others_know(moe_model, monkeypatch):
    config = stock_config(moe_model, tensor_parallel_size=1, data_parallel_size=2)
    parallel = config.parallel_config
    port = parallel.data_parallel_master_port
    monkeypatch.setattr(current_platform, "is_cpu", lambda: False)
    monkeypatch.setattr(current_platform, "is_cuda_alike", lambda: True)
    deployment._enable_eplb(config, BalancerConfig(name="metro"), 4)
    assert config.parallel_config is parallel and parallel.enable_eplb
    assert parallel.eplb_config.num_redundant_experts == 4
    assert parallel.eplb_config.communicator is not None
    assert parallel.data_parallel_master_port == port
