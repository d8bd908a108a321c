"""The counters as Prometheus reads them: every one of them, in base units, once per rank."""

import re
from pathlib import Path

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from vllm_balance.balancer import new_counters
from vllm_balance.experts.dynamic_slots import LayerSlots
from vllm_balance.experts.prefetch import SyncPrefetch
from vllm_balance.kernels.rebalance import Rules
from vllm_balance.prometheus import COUNTERS, GAUGES, PREFIX, exposition, metric_name
from vllm_balance.routing import FETCHING, LayerTables
from vllm_balance.slot_balancer import SlotBalancer
from vllm_balance.types import DynamicSlots
from vllm_balance.worker_balancer import WorkerBalancer

E, S, D = 8, 2, 2
ASIDE = f"{PREFIX}stepped_aside_total"


class Online:
    """What moved experts while serving, by its status."""

    def after_step(self) -> None: ...

    def status(self) -> dict:
        return {
            **{"steps": 90, "decisions": 3, "moves": 1, "swaps": 2},
            **{"deciding_us": 2e6, "moving_us": 5e5, "swap_us": 100.0, "drift": 0.25},
            "slowdown_per_rank": [1.0, 1.5],
            "recent": [{"step": 30, "why": "no swap pays"}],
        }


def worker(rank: int) -> WorkerBalancer:
    """A rank with one layer that has every kind of counter."""
    layer = SlotBalancer(
        layer_name="layer",
        policy=FETCHING["harmoeny"](Rules(threshold_tokens=4, fetch_tokens=4)),
        tables=LayerTables(
            logical_to_physical_ER=torch.arange(E)[:, None],
            num_replicas_E=torch.ones(E, dtype=torch.int64),
            num_ranks=S,
            num_physical=E + S * D,
            load_P=None,
            record_enabled=None,
            counters=new_counters(S, torch.device("cpu")),
        ),
        way="replicated",
        rank=rank,
        all_reduce=lambda tensor: tensor,
        dynamic=LayerSlots(
            layer=0,
            rank=rank,
            state=DynamicSlots.empty(num_logical=E, num_ranks=S, num_dynamic=D),
            prefetch=SyncPrefetch(lambda copy: None),
            expert_bytes=100,
        ),
    )
    layer.in_router(torch.tensor([[0, 4]] * 30 + [[0, 1]] * 30), None)
    layer.decide_ns = 2_500_000
    return WorkerBalancer(
        balancer="harmoeny", rank=rank, layers=[layer], huge_page_share=0.5, online=Online()
    )


@pytest.fixture(scope="module")
def statuses() -> list[dict]:
    return [worker(rank).status() for rank in range(S)]


def samples(text: bytes) -> dict[tuple[str, str], float]:
    """Values by sample name and rank, and reason if it has one; every sample names the balancer."""
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        assert family.documentation.endswith(".")
        for sample in family.samples:
            assert sample.labels.pop("balancer") == "harmoeny"
            by_reason = ("reason",) if sample.name == ASIDE else ()
            assert sample.labels.keys() == {"rank", *by_reason}
            found[sample.name, *sample.labels.values()] = sample.value
    return found


def test_every_number_of_the_status_is_a_metric_of_its_rank(statuses):
    found = samples(exposition(statuses))
    for status in statuses:
        numbers = {key for key, value in status.items() if isinstance(value, (int, float, list))}
        numbers |= {f"online_{key}" for key in status["online"]} - {"online_recent"}
        assert numbers - {"rank"} == COUNTERS.keys() | GAUGES.keys()
    suffixed = [f"{metric_name(key)}_total" for key in COUNTERS]
    names = suffixed + [metric_name(key) for key in GAUGES]
    assert len(set(names)) == len(COUNTERS) + len(GAUGES)
    plain = {key for key in found if key[0] != ASIDE}
    assert plain == {(name, str(rank)) for name in names for rank in range(S)}
    assert all(name.startswith("vllm_moe_balancer_") for name in names)


def test_values_are_in_base_units_and_lists_are_the_rank_s_own(statuses):
    found = samples(exposition(statuses))
    for rank, status in enumerate(statuses):

        def value(name: str, of: str = str(rank)) -> float:
            return found[f"vllm_moe_balancer_{name}", of]

        assert value("decide_seconds_total") == 0.0025
        assert value("pairs_total") == 120
        assert value("rank_tokens_total") == status["tokens_per_rank"][rank]
        assert value("max_tokens_total") == max(status["tokens_per_rank"])
        assert value("fetched_bytes_total") == status["fetched_bytes"] == 100 * rank
        assert value("fetched_schedules_total") == value("layers") == 1
        assert value("physical_experts") == E + S * D
        assert value("huge_page_share") == 0.5
        assert value("online_deciding_seconds_total") == 2 and value("online_drift") == 0.25
        assert value("rank_online_slowdown") == [1.0, 1.5][rank]


def test_what_a_balancer_did_not_do_is_a_metric_for_each_reason(statuses):
    found = samples(exposition(statuses))
    for rank, status in enumerate(statuses):
        for reason, batches in status["stepped_aside"].items():
            assert found[ASIDE, str(rank), reason] == batches
    assert sum(key[0] == ASIDE for key in found) == 4 * S


def test_every_metric_is_in_the_docs():
    page = (Path(__file__).parents[1] / "docs" / "configuration.md").read_text()
    names = {f"{metric_name(key)}_total" for key in COUNTERS} | {ASIDE}
    names |= {metric_name(key) for key in GAUGES}
    listed = {PREFIX + name for name in re.findall(r"`\.\.\.([a-z_]+)`", page)}
    assert listed == names


def test_a_rank_that_sees_only_its_own_tokens_has_no_share_of_the_batch(statuses):
    partly = [status | {"counts_are_global": False} for status in statuses]
    found = samples(exposition(partly))
    assert ("vllm_moe_balancer_rank_tokens_total", "0") not in found
    assert found["vllm_moe_balancer_counts_are_global", "1"] == 0
    for whole in ("pairs", "activated", "max_tokens", "max_activated"):
        assert (f"vllm_moe_balancer_{whole}_total", "1") not in found
    assert ("vllm_moe_balancer_decisions_total", "1") in found


def test_what_no_rank_reports_is_left_out_and_the_rest_is_plain_text():
    text = exposition([{"balancer": "metro", "rank": 3, "decisions": 12, "exchange_us": 5e5}])
    assert text.decode().splitlines() == [
        "# HELP vllm_moe_balancer_decisions_total Times the policy was asked: layers x steps.",
        "# TYPE vllm_moe_balancer_decisions_total counter",
        'vllm_moe_balancer_decisions_total{balancer="metro",rank="3"} 12.0',
        "# HELP vllm_moe_balancer_exchange_seconds_total "
        "Time of exchanges beyond vLLM's own collectives.",
        "# TYPE vllm_moe_balancer_exchange_seconds_total counter",
        'vllm_moe_balancer_exchange_seconds_total{balancer="metro",rank="3"} 0.5',
    ]
    assert exposition([]) == b""
