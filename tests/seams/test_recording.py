"""The recorder in a worker: steps, phases, requests and positions as the scheduler planned them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from vllm_balance import traces
from vllm_balance.recording import Phase, RecordSettings
from vllm_balance.seams.recording import RecordingWorker

EXPERTS, TOP_K = 4, 2
LAYERS = ("model.layers.1.mlp.experts", "model.layers.3.mlp.experts")


class StockWorker:
    """Routes every token of a step to experts that follow from its layer: 0 and 1, or 2 and 3."""

    warmed_up = ended = False

    def compile_or_warm_up_model(self):
        self.execute_model(output(new={"warm-up": 5}))
        self.warmed_up = True
        return "times"

    def execute_model(self, scheduler_output):
        num_tokens = scheduler_output.total_num_scheduled_tokens
        self.model_runner.input_batch.req_ids = self.order or list(
            scheduler_output.num_scheduled_tokens
        )
        self.route(num_tokens)
        return "output"

    def execute_dummy_batch(self):
        self.route(1)

    def route(self, num_tokens: int) -> None:
        for index, layer in enumerate(self.layers):
            ids_TK = torch.tensor([[0, 1], [2, 3]][index]).expand(num_tokens, TOP_K)
            layer.record and layer.record(ids_TK, None)

    def shutdown(self):
        self.ended = True


class Worker(RecordingWorker, StockWorker):
    def __init__(self, settings, *, rank=0, way="replicated", num_ranks=2):
        self.order = None
        self.model_config = SimpleNamespace(runner_type="generate")
        self.model_runner = SimpleNamespace(
            execute_model_state=None, input_batch=SimpleNamespace(req_ids=[])
        )
        tables = SimpleNamespace(num_logical=EXPERTS, counters=torch.zeros(1), num_ranks=num_ranks)
        self.layers = [
            SimpleNamespace(way=way, rank=rank, tables=tables, record=None) for _ in LAYERS
        ]
        moe = SimpleNamespace(experts_per_token=TOP_K)
        config = SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_batched_tokens=64),
            compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode.NONE),
        )
        runners = [SimpleNamespace(layer_name=name, moe_config=moe) for name in LAYERS]
        self.attach_recorder(config, runners, self.layers, settings)


def output(new=None, cached=None, finished=()) -> SchedulerOutput:
    """new: request -> tokens. cached: request -> (tokens, computed before, output tokens)."""
    new, cached = new or {}, cached or {}
    made = SchedulerOutput.make_empty()
    made.num_scheduled_tokens = new | {name: tokens for name, (tokens, _, _) in cached.items()}
    made.total_num_scheduled_tokens = sum(made.num_scheduled_tokens.values())
    made.scheduled_new_reqs = [
        NewRequestData(
            req_id=name,
            prompt_token_ids=[1] * tokens,
            mm_features=[],
            sampling_params=None,
            pooling_params=None,
            block_ids=([],),
            num_computed_tokens=0,
            lora_request=None,
        )
        for name, tokens in new.items()
    ]
    made.scheduled_cached_reqs = CachedRequestData(
        req_ids=list(cached),
        resumed_req_ids=set(),
        new_token_ids=[],
        all_token_ids={},
        new_block_ids=[None] * len(cached),
        num_computed_tokens=[computed for _, computed, _ in cached.values()],
        num_output_tokens=[outputs for _, _, outputs in cached.values()],
    )
    made.finished_req_ids = set(finished)
    return made


def steps() -> list[SchedulerOutput]:
    """A prompt in two pieces, a second request, decoding, and nothing to do."""
    return [
        output(new={"a": 3}),
        output(new={"b": 2}, cached={"a": (1, 3, 0)}),
        output(),
        output(new={"c": 1}, cached={"a": (1, 4, 1), "b": (1, 2, 1)}),
        output(cached={"b": (1, 3, 2), "c": (1, 1, 1)}, finished=["a"]),
        output(new={"a": 2}),
    ]


def test_counts_and_phases_of_steps_without_the_warm_up(tmp_path):
    worker = Worker(RecordSettings(file=tmp_path / "t.npz"))
    assert worker.compile_or_warm_up_model() == "times" and worker.warmed_up
    for step in steps():
        assert worker.execute_model(step) == "output"
    worker.shutdown()
    assert worker.ended
    trace = traces.load(tmp_path / "t.npz")
    assert trace.layer_index_L.tolist() == [1, 3]
    sizes = [3, 3, 3, 2, 2]
    assert trace.counts_NLE[:, 0].tolist() == [[n, n, 0, 0] for n in sizes]
    assert trace.counts_NLE[:, 1].tolist() == [[0, 0, n, n] for n in sizes]
    prefill, decode, mixed = Phase.PREFILL, Phase.DECODE, Phase.MIXED
    assert trace.phase_N.tolist() == [prefill, prefill, mixed, decode, prefill]


def test_requests_positions_and_phases_of_tokens_in_the_batch_s_order(tmp_path):
    worker = Worker(RecordSettings(file=tmp_path / "t.npz", what="ids"))
    worker.compile_or_warm_up_model()
    orders = [["a"], ["b", "a"], [], ["c", "b", "a"], ["c", "b"], ["a"]]
    for step, worker.order in zip(steps(), orders, strict=True):
        worker.execute_model(step)
    worker.shutdown()
    trace = traces.load(tmp_path / "t.npz")
    # A name that comes again is another request.
    assert trace.request_id_T.tolist() == [0, 0, 0, 1, 1, 0, 2, 1, 0, 2, 1, 3, 3]
    assert trace.position_T.tolist() == [0, 1, 2, 0, 1, 3, 0, 2, 4, 1, 3, 0, 1]
    assert trace.phase_T.tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0]
    assert (trace.topk_ids_TLK[:, 1] == [2, 3]).all()


def test_one_rank_records_where_all_hold_the_same_tokens():
    first, second = Worker(None, rank=0), Worker(None, rank=1)
    assert first.moe_record_status() == {"state": "off"}
    assert second.recorder is None
    assert second.moe_record_start({"file": "t.npz"}) is None
    assert second.moe_record_stop() is None and second.moe_record_status() is None
    second.compile_or_warm_up_model()
    assert second.execute_model(steps()[0]) == "output"
    second.shutdown()


@pytest.mark.parametrize("way", ["after_gather", "all_reduce"])
def test_data_parallel_ranks_record_their_own_tokens_in_step(tmp_path, way):
    """Rank 1 starts a step later and idles while rank 0 computes, and the other way round."""
    first, second = (Worker(None, rank=rank, way=way) for rank in (0, 1))
    for worker in (first, second):
        worker.compile_or_warm_up_model()
    file = {"file": str(tmp_path / "t.npz")}
    assert first.moe_record_start(file)["state"] == "recording"
    first.execute_model(output(new={"a": 4}))
    second.execute_dummy_batch()
    assert second.moe_record_start(file)["file"].endswith("t.rank1.npz")
    first.execute_model(output(cached={"a": (1, 4, 1)}))
    second.execute_model(output(new={"b": 3}))
    first.execute_dummy_batch()
    second.execute_model(output(cached={"b": (1, 3, 1)}))
    second.moe_record_stop()
    assert first.moe_record_stop()["steps"] == 3
    trace = traces.load(tmp_path / "t.npz")
    assert trace.counts_NLE[:, 0, 0].tolist() == [4, 1]
    assert trace.phase_N.tolist() == [Phase.MIXED, Phase.DECODE]


def test_a_start_is_taken_back_by_who_asked_for_it_and_nobody_else(tmp_path):
    """A rank that records already refuses, and goes on when the others' start is taken back."""
    running, other = (
        Worker(None, rank=0, way="after_gather"),
        Worker(None, rank=1, way="after_gather"),
    )
    assert running.moe_record_start({"file": str(tmp_path / "a.npz")}, "first")["state"] == (
        "recording"
    )
    asked = {"file": str(tmp_path / "b.npz")}, "second"
    assert "is running" in running.moe_record_start(*asked)["error"]
    assert other.moe_record_start(*asked)["state"] == "recording"
    for worker in (running, other):
        worker.moe_record_cancel("second")
    assert running.moe_record_status()["state"] == "recording"
    assert other.moe_record_status() == {"state": "off"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    assert other.moe_record_start(*asked)["state"] == "recording", "its file is not in the way"
    running.shutdown()
    other.shutdown()


def test_a_preempted_request_that_is_computed_anew_does_not_decode(tmp_path):
    worker = Worker(RecordSettings(file=tmp_path / "t.npz", what="ids"))
    worker.compile_or_warm_up_model()
    for step, worker.order in (
        (output(new={"a": 3}), ["a"]),
        (output(cached={"a": (1, 3, 1)}), ["a"]),
        (output(cached={"a": (5, 0, 2)}), ["a"]),
        (output(cached={"a": (1, 5, 2)}), ["a"]),
    ):
        worker.execute_model(step)
    worker.shutdown()
    assert traces.load(tmp_path / "t.npz").phase_T.tolist() == [0] * 3 + [1] + [0] * 5 + [1]


def test_a_start_that_fails_is_an_answer_and_not_an_exception(tmp_path):
    worker = Worker(None)
    (tmp_path / "t.npz").touch()
    assert "File exists" in worker.moe_record_start({"file": str(tmp_path / "t.npz")})["error"]
    assert worker.moe_record_start({"file": str(tmp_path / "new.npz")})["state"] == "recording"
    assert "is running" in worker.moe_record_start({"file": str(tmp_path / "x.npz")})["error"]
    worker.shutdown()
    assert np.load(tmp_path / "new.npz")["num_experts"] == EXPERTS


def test_a_pooling_model_has_counts_without_the_order_of_requests(tmp_path):
    """Its runner has forgotten the order when a step ends."""
    worker = Worker(None)
    worker.compile_or_warm_up_model()
    worker.model_config.runner_type = "pooling"
    asked = {"file": str(tmp_path / "r.npz")}
    assert "not `ids`" in worker.moe_record_start(asked | {"what": "ids"})["error"]
    assert worker.moe_record_start(asked)["state"] == "recording"
    route = worker.route

    def forgetting(num_tokens: int) -> None:
        route(num_tokens)
        worker.model_runner = None

    worker.route = forgetting
    worker.execute_model(output(new={"a": 3, "b": 2}))
    worker.moe_record_stop()
    found = traces.load(tmp_path / "r.npz")
    assert found.counts_NLE.sum() == 5 * TOP_K * len(LAYERS)
