"""What ranks agree on, and what a worker refuses, without a model."""

import importlib
from types import SimpleNamespace

import pytest
import torch

from vllm_balance.config import BalancerConfig
from vllm_balance.errors import BalancerError
from vllm_balance.seams import device
from vllm_balance.seams import worker as worker_module
from vllm_balance.seams.agreement import agreed_knee, knee_and_free, ranks_are_alike
from vllm_balance.seams.device import processor
from vllm_balance.seams.worker import BalancedWorker, explaining_eplb, require_alike


def config(name: str, **settings) -> BalancerConfig:
    return BalancerConfig(name=name, **settings)


def worker(name: str) -> BalancedWorker:
    made = BalancedWorker()
    made.balancer_config = config(name)
    return made


@pytest.fixture
def ranks_find(monkeypatch):
    """Two ranks, of which the other finds this."""

    def run(other) -> None:
        def all_gather_object(found, own, group) -> None:
            found[:] = [own, other]

        group = SimpleNamespace(world_size=2, cpu_group=None)
        monkeypatch.setattr("vllm.distributed.get_ep_group", lambda: group)
        monkeypatch.setattr("torch.distributed.all_gather_object", all_gather_object)

    return run


def test_only_bfloat16_is_computed_by_amx(monkeypatch):
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: True)
    metro = BalancerConfig(name="metro")
    assert knee_and_free(metro, torch.bfloat16) == (43.0, 20.0)
    assert knee_and_free(metro, torch.float32) == knee_and_free(metro, torch.float16) == (4.0, 2.0)
    assert knee_and_free(BalancerConfig(name="harmoeny"), torch.bfloat16) == (43.0, None)


@pytest.mark.parametrize("name", ["metro", "harmoeny"])
def test_ranks_with_other_processors_do_not_route_apart(name, ranks_find):
    own = knee_and_free(BalancerConfig(name=name), torch.float32)
    ranks_find(own)
    assert agreed_knee(config(name), torch.float32) == own
    ranks_find((own[0] + 1, own[1]))
    both = "`knee_tokens` and `free_tokens`" if name == "metro" else "`knee_tokens`"
    with pytest.raises(BalancerError, match=f"rank 1: .*Set {both} in --moe-balancer-config"):
        agreed_knee(config(name), torch.float32)
    settled = config(name, knee_tokens=own[0] + 1, free_tokens=own[1])
    assert agreed_knee(settled, torch.float32) == (own[0] + 1, own[1])


@pytest.mark.parametrize("kind", ["worker_cpu:BalancedCPUWorker", "worker_gpu:BalancedGPUWorker"])
def test_ranks_agree_before_weights_are_loaded(monkeypatch, ranks_find, kind):
    """vLLM's executors let a worker set its device up before it loads the model."""
    module, _, name = kind.partition(":")
    cls = getattr(importlib.import_module(f"vllm_balance.seams.{module}"), name)
    vllms = next(c for c in cls.__mro__ if c.__module__.startswith("vllm.v1.worker."))
    monkeypatch.setattr(vllms, "init_device", lambda self: None)
    made = object.__new__(cls)
    made.balancer_config = BalancerConfig(name="metro")
    made.model_config = SimpleNamespace(dtype=torch.float32)
    own = knee_and_free(made.balancer_config, torch.float32)
    ranks_find(own)
    made.init_device()
    assert made._knee == own
    ranks_find((own[0] + 1, own[1]))
    with pytest.raises(BalancerError, match=r"Set .* in --moe-balancer-config"):
        made.init_device()


def test_who_routes_by_no_knee_needs_no_agreement(ranks_find):
    ranks_find((1e9, None))
    assert agreed_knee(config("static"), torch.float32)


@pytest.mark.parametrize("name", ["metro", "eplb", "first_copy"])
def test_weights_are_not_reloaded_into_slots_that_experts_have_left(name):
    with pytest.raises(BalancerError, match=f"{name} moves experts between slots"):
        worker(name).reload_weights()


def test_sleep_gives_no_maps_away():
    slept = []

    class Stock:
        def sleep(self, level: int = 1) -> None:
            slept.append(level)

    class Worker(BalancedWorker, Stock):
        pass

    made = Worker()
    made.balancer_config = BalancerConfig(name="metro")
    with pytest.raises(BalancerError, match="Use level 1"):
        made.sleep(2)
    made.sleep()
    made.balancer_config = BalancerConfig(name="static")
    made.sleep(2)
    assert slept == [1, 2]


@pytest.mark.parametrize("step", ["execute_model", "sample_tokens"])
@pytest.mark.parametrize(
    ("rank", "executor", "ends"),
    [(1, "mp", True), (1, "ray", True), (0, "mp", False), (1, "external_launcher", False)],
)
def test_a_rank_whose_exceptions_nobody_hears_ends(monkeypatch, rank, executor, ends, step):
    """vLLM's executor answers for rank 0 alone; peers would wait for the others for minutes."""

    class Ended(BaseException):
        pass

    def end(status: int) -> None:
        assert status == 1
        raise Ended

    class Stock:
        def execute_model(self, scheduler_output) -> None:
            raise MemoryError("no buffer")

        def sample_tokens(self, grammar_output) -> None:
            raise MemoryError("no buffer")

    class Worker(BalancedWorker, Stock):
        pass

    monkeypatch.setattr("os._exit", end)
    made = Worker()
    made.rank, made.recorder = rank, None
    made.parallel_config = SimpleNamespace(distributed_executor_backend=executor)
    made.balancer_config = BalancerConfig(name="metro")
    with pytest.raises(Ended if ends else MemoryError):
        getattr(made, step)(SimpleNamespace(total_num_scheduled_tokens=0))


def test_ranks_are_alike_with_one_processor_and_number_of_threads(ranks_find):
    own = (processor(), torch.get_num_threads())
    ranks_find(own)
    assert ranks_are_alike()
    ranks_find((own[0], own[1] + 1))
    assert not ranks_are_alike()


CPUINFO = """processor\t: 0
cpu family\t: {family}
model\t\t: {model}
model name\t: AMD EPYC
flags\t\t: avx512_bf16

processor\t: 1
cpu family\t: {family}
model\t\t: {model}
model name\t: AMD EPYC
"""


def test_generations_of_one_brand_are_other_processors(monkeypatch, tmp_path):
    """A profile of one of them is refused on another, and ranks on two of them are not alike."""
    file, names = tmp_path / "cpuinfo", set()
    monkeypatch.setattr(device, "CPUINFO", file)
    for family, model in ((25, 17), (26, 2)):
        file.write_text(CPUINFO.format(family=family, model=model))
        names.add(device.processor())
    assert names == {"AMD EPYC (family 25, model 17)", "AMD EPYC (family 26, model 2)"}
    file.write_text("processor : 0\nmodel name : A CPU\n")
    assert device.processor() == "A CPU"


@pytest.fixture
def arm(monkeypatch, tmp_path):
    """The processor's file as Linux writes it on Arm: without a name."""
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n")
    monkeypatch.setattr(device, "CPUINFO", file)


def test_processors_without_a_name_may_differ(ranks_find, arm):
    assert device.processor() is None
    assert device.device_name("float32") == "unknown processor, vec"
    ranks_find((None, torch.get_num_threads()))
    assert not ranks_are_alike()


@pytest.mark.parametrize(
    ("way", "is_cpu", "asks"),
    [("replicated", True, True), ("replicated", False, False), ("all_reduce", True, False)],
)
def test_ranks_are_compared_only_where_their_sums_may_differ(monkeypatch, way, is_cpu, asks):
    made, asked = worker("metro"), []
    counters = SimpleNamespace(is_cpu=is_cpu)
    layers = [SimpleNamespace(way=way, tables=SimpleNamespace(counters=counters)) for _ in "ab"]
    made.worker_balancer = SimpleNamespace(layers=layers)
    monkeypatch.setattr(worker_module, "ranks_are_alike", lambda: bool(asked.append(1)))
    made._tell_whether_ranks_are_alike()
    assert len(asked) == asks
    assert [getattr(layer, "ranks_are_alike", None) for layer in layers] == (
        [False, False] if asks else [None, None]
    )


def test_layers_of_different_sizes_are_refused():
    layers = [SimpleNamespace(moe_config=SimpleNamespace(num_experts=n)) for n in (8, 8, 16)]
    require_alike(layers[:2])
    with pytest.raises(BalancerError, match=r"different numbers of slots \(8, 16\)"):
        require_alike(layers)


class Stock:
    """What is left of vLLM's worker: new weights come with new kernels."""

    runner: SimpleNamespace
    reloaded = 0

    def reload_weights(self) -> None:
        kernel = SimpleNamespace(prepare_finalize=SimpleNamespace())
        self.runner.routed_experts.quant_method.moe_kernel = kernel
        self.reloaded += 1

    finish_weight_update = reload_weights


class WithStock(BalancedWorker, Stock):
    """A worker of one layer."""

    def __init__(self, settings: dict, *, is_cpu: bool) -> None:
        self.balancer_config = BalancerConfig(**settings)
        method = SimpleNamespace(moe_kernel=None)
        experts = SimpleNamespace(quant_method=method)
        self.runner = SimpleNamespace(router=SimpleNamespace(), routed_experts=experts)
        tables = SimpleNamespace(counters=SimpleNamespace(is_cpu=is_cpu))
        layer = SimpleNamespace(way="after_gather", experts=None, tables=tables)
        self.worker_balancer = SimpleNamespace(layers=[layer])
        self._runners = [self.runner]


@pytest.mark.parametrize("settings", [{"name": "static"}, {"name": "gem", "map": "m.json"}])
@pytest.mark.parametrize("change", ["reload_weights", "finish_weight_update"])
def test_weights_are_reloaded_where_experts_stay_and_new_kernels_get_the_balancer(settings, change):
    made = WithStock(settings, is_cpu=False)
    getattr(made, change)()
    (layer,) = made.worker_balancer.layers
    kernel = made.runner.routed_experts.quant_method.moe_kernel
    assert made.reloaded == 1
    assert made.runner.router.moe_balancer is kernel.prepare_finalize.moe_balancer is layer


def test_vllms_cpu_kernels_take_no_reloaded_weights():
    made = WithStock({"name": "static"}, is_cpu=True)
    with pytest.raises(BalancerError, match=r"there unpacked"):
        made.reload_weights()
    assert made.reloaded == 0


def test_vllms_word_against_eplb_comes_with_what_to_do():
    said = NotImplementedError("EPLB is not supported AutoGPTQMoEMethod.")
    metro, static = BalancerConfig(name="metro"), BalancerConfig(name="static")
    remedy = r"AutoGPTQMoEMethod\. Use --moe-balancer static"
    with pytest.raises(BalancerError, match=remedy), explaining_eplb(metro):
        raise said
    with pytest.raises(NotImplementedError, match="other"), explaining_eplb(metro):
        raise NotImplementedError("other")
    with pytest.raises(NotImplementedError, match="EPLB"), explaining_eplb(static):
        raise said
