"""The recorder of one rank: what its layers added is in the file, and serving never waits."""

import itertools
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from vllm_balance import recorder as recorder_module
from vllm_balance import step_writer, traces
from vllm_balance.errors import BalancerError
from vllm_balance.recorder import RecordedModel, Recorder
from vllm_balance.recording import Phase, RecordingFile, RecordSettings
from vllm_balance.step_writer import Step

LAYERS, EXPERTS, TOP_K = 3, 7, 2


def recorder(**changes) -> Recorder:
    model = RecordedModel(
        num_experts=EXPERTS,
        top_k=TOP_K,
        layer_index=tuple(range(1, LAYERS + 1)),
        rank=0,
        num_ranks=1,
        max_step_tokens=16,
        device=torch.device("cpu"),
    )
    return Recorder(model, **changes)


def settings(path, what: str = "counts", max_bytes: int = 2**20) -> RecordSettings:
    return RecordSettings(file=path / "t.npz", what=what, max_bytes=max_bytes)


def random_ids(num_tokens: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(LAYERS, num_tokens, EXPERTS, generator=generator)
    return noise.argsort(2)[..., :TOP_K]


def step_of(number: int, num_tokens: int, phase: Phase = Phase.DECODE) -> Step:
    return Step(
        number=number,
        phase=phase,
        num_tokens=num_tokens,
        request_id_T=np.arange(num_tokens),
        position_T=np.full(num_tokens, number),
        phase_T=np.full(num_tokens, phase),
    )


def run(chosen: Recorder, number: int, ids_LTK: torch.Tensor, **step) -> None:
    """One forward pass through all layers."""
    chosen.begin_step()
    for layer, ids_TK in enumerate(ids_LTK):
        chosen.add(layer, ids_TK, None)
    chosen.end_step(step_of(number, ids_LTK.shape[1], **step))


def wait_until(holds: Callable[[], bool]) -> None:
    """Returns when it holds, and fails after half a minute."""
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline, "the recorder did not come to it"
        time.sleep(0.001)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("sizes", [[0], [1], [16], [3, 0, 16, 1, 5] * 30])
@pytest.mark.parametrize("what", ["counts", "ids"])
def test_what_layers_add_is_in_the_file(tmp_path, monkeypatch, dtype, sizes, what):
    """Also over many blocks: they hold three steps, or sixteen tokens."""
    monkeypatch.setattr(recorder_module, "BLOCK_BYTES", 3 * 4 * LAYERS * (EXPERTS + 1))
    chosen = recorder()
    chosen.start(settings(tmp_path, what))
    batches = [random_ids(size, seed).to(dtype) for seed, size in enumerate(sizes)]
    for number, ids_LTK in enumerate(batches):
        wait_until(lambda: bool(chosen._writer._free))
        run(chosen, number, ids_LTK)
    chosen.stop()
    status = chosen.status()
    assert (status["state"], status["dropped_steps"]) == ("stopped", 0)
    assert (status["steps"], status["tokens"]) == (len(sizes), sum(sizes))
    assert status["bytes"] <= status["max_bytes"]
    if what == "ids" and sum(sizes) == 0:
        return
    trace = traces.load(tmp_path / "t.npz")
    assert trace.layer_index_L.tolist() == [1, 2, 3]
    if what == "ids":
        expected = torch.cat(batches, dim=1).transpose(0, 1)
        assert np.array_equal(trace.topk_ids_TLK, expected)
        assert trace.position_T.tolist() == [n for n, size in enumerate(sizes) for _ in range(size)]
        return
    for counts_LE, ids_LTK in zip(trace.counts_NLE, batches, strict=True):
        expected_LE = [np.bincount(ids.ravel(), minlength=EXPERTS) for ids in ids_LTK.numpy()]
        assert np.array_equal(counts_LE, expected_LE)


def test_padding_and_what_dummy_batches_left_do_not_count(tmp_path):
    chosen = recorder()
    chosen.start(settings(tmp_path))
    ids_LTK = random_ids(6, 0)
    for layer in range(LAYERS):
        chosen.add(layer, ids_LTK[layer], None)
    ids_LTK[:, 3:] = -1
    ids_LTK[:, 4:] = -2 - 5  # As padding of expert 5 comes on GPUs.
    run(chosen, 0, ids_LTK)
    chosen.begin_step()
    for layer in range(LAYERS):
        chosen.add(layer, random_ids(6, 1)[layer], torch.tensor([2]))
    chosen.end_step(step_of(1, 2))
    chosen.add(0, ids_LTK[0], None)
    chosen.end_step(Step(number=2, phase=Phase.IDLE, num_tokens=0))
    chosen.stop()
    trace = traces.load(tmp_path / "t.npz")
    assert trace.counts_NLE.sum(2).tolist() == [[6] * LAYERS, [4] * LAYERS]
    expected_E = np.bincount(random_ids(6, 1)[1, :2].ravel(), minlength=EXPERTS)
    assert np.array_equal(trace.counts_NLE[1, 1], expected_E)


def test_all_tokens_to_one_expert_beyond_sixteen_bits(tmp_path):
    chosen = recorder()
    chosen.start(settings(tmp_path))
    run(chosen, 0, torch.full((LAYERS, 40_000, TOP_K), 4))
    chosen.stop()
    assert traces.load(tmp_path / "t.npz").counts_NLE[0, 2].tolist() == [0, 0, 0, 0, 80_000, 0, 0]


@pytest.mark.parametrize("waits", [{"FLUSH_S": 0.01}, {"LOOK_S": 0.01, "FLUSH_S": 600.0}])
def test_it_is_written_without_a_stop(tmp_path, monkeypatch, waits):
    """What a killed server leaves: a thread writes what there is every few seconds, and at once if
    no more steps come."""
    for name, seconds in waits.items():
        monkeypatch.setattr(step_writer, name, seconds)
    chosen = recorder()
    chosen.start(settings(tmp_path))
    run(chosen, 0, random_ids(4, 0))
    wait_until(lambda: chosen.status()["steps"] > 0)
    assert traces.load(tmp_path / "t.npz").counts_NLE.sum() == 4 * TOP_K * LAYERS
    chosen.stop()


def test_steps_are_gathered_while_they_come(tmp_path, monkeypatch):
    """A member of the archive for each step would be larger than its counts."""
    monkeypatch.setattr(step_writer, "FLUSH_S", 600.0)
    monkeypatch.setattr(step_writer, "LOOK_S", 0.3)
    chosen = recorder()
    chosen.start(settings(tmp_path))
    for number in range(150):
        run(chosen, number, random_ids(4, number))
        time.sleep(0.02)
    chosen.stop()
    with np.load(tmp_path / "t.npz") as archive:
        chunks = [name for name in archive if name.startswith("counts.")]
    assert len(traces.load(tmp_path / "t.npz").counts_NLE) == 150
    # At every look there would be 10; this process may be off its core for some.
    assert len(chunks) < 6


def test_steps_without_tokens_do_not_keep_others_from_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(step_writer, "FLUSH_S", 600.0)
    monkeypatch.setattr(step_writer, "LOOK_S", 0.05)
    chosen = recorder()
    chosen.start(settings(tmp_path))
    run(chosen, 0, random_ids(4, 0))
    numbers = itertools.count(1)

    def is_written_after_an_idle_step() -> bool:
        chosen.end_step(Step(number=next(numbers), phase=Phase.IDLE, num_tokens=0))
        return chosen.status()["steps"] > 0

    wait_until(is_written_after_an_idle_step)
    chosen.stop()


def test_steps_that_found_no_room_in_the_file_are_counted(tmp_path):
    """One chunk, larger than the file may be: all of it is left out, and what waited behind it."""
    chosen = recorder()
    chosen.start(settings(tmp_path, "ids", 2**16))
    for number in range(3000):
        run(chosen, number, random_ids(16, number))
        if not chosen.is_recording:
            break
    chosen.stop()
    status = chosen.status()
    assert status["state"] == "full" and status["dropped_steps"] > 0
    assert status["steps"] + status["dropped_steps"] in (number, number + 1)


def test_it_stops_at_the_limit_says_so_and_can_start_again(tmp_path, monkeypatch):
    monkeypatch.setattr(step_writer, "FLUSH_S", 0.01)
    lines = []
    chosen = recorder(log=lines.append)
    limit = 2**16
    chosen.start(settings(tmp_path, "ids", limit))
    numbers = itertools.count()

    def is_full_after_a_step() -> bool:
        number = next(numbers)
        run(chosen, number, random_ids(16, number))
        return not chosen.is_recording

    wait_until(is_full_after_a_step)
    chosen.stop()
    status = chosen.status()
    assert status["state"] == "full"
    assert limit // 3 < (tmp_path / "t.npz").stat().st_size <= status["bytes"] <= limit
    assert len(lines) == 1 and "65,536 bytes" in lines[0]
    assert len(traces.load(tmp_path / "t.npz").topk_ids_TLK) == status["tokens"]
    chosen.start(RecordSettings(file=tmp_path / "next.npz"))
    run(chosen, next(numbers), random_ids(2, 0))
    chosen.stop()
    assert len(traces.load(tmp_path / "next.npz").counts_NLE) == 1


def test_steps_are_dropped_and_counted_if_the_writer_is_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(recorder_module, "BLOCK_BYTES", 4 * LAYERS * (EXPERTS + 1))
    may_write = threading.Event()
    append = RecordingFile.append

    def slow_append(self, chunk):
        may_write.wait(30)
        return append(self, chunk)

    monkeypatch.setattr(RecordingFile, "append", slow_append)
    chosen = recorder()
    chosen.start(settings(tmp_path))
    for number in range(10):
        run(chosen, number, random_ids(3, number))
    may_write.set()
    chosen.stop()
    assert chosen.status()["steps"] == 2 and chosen.status()["dropped_steps"] == 8
    assert len(traces.load(tmp_path / "t.npz").counts_NLE) == 2


@pytest.mark.parametrize("fails_in", ["append", "_write"])
def test_a_disk_that_fails_ends_the_recording_and_not_the_server(tmp_path, monkeypatch, fails_in):
    """The file is closed, and what was written before can be read."""
    monkeypatch.setattr(step_writer, "FLUSH_S", 0.01)
    lines, opened = [], []
    chosen = recorder(log=lines.append)
    chosen.start(settings(tmp_path))
    run(chosen, 0, random_ids(3, 0))
    wait_until(lambda: chosen.status()["steps"] == 1)

    def full_disk(self, *_):
        opened.append(self)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordingFile, fails_in, full_disk)
    run(chosen, 1, random_ids(3, 0))
    chosen.stop()
    assert chosen.status()["state"] == "failed" and chosen.status()["dropped_steps"] == 1
    assert "No space left" in lines[0]
    run(chosen, 2, random_ids(3, 0))
    assert opened[0]._file.closed
    assert traces.load(tmp_path / "t.npz").counts_NLE.sum() == 3 * TOP_K * LAYERS
    with np.load(tmp_path / "t.npz") as archive:
        assert "counts.000000" in archive.files and "counts.000001" not in archive.files


def test_a_file_is_closed_although_its_directory_cannot_be_written(tmp_path, monkeypatch):
    chosen = recorder()
    chosen.start(settings(tmp_path))
    run(chosen, 0, random_ids(3, 0))
    opened = []
    close = RecordingFile.close

    def full_disk(self):
        opened.append(self)
        self._archive._write_end_record = no_room
        close(self)

    def no_room():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordingFile, "close", full_disk)
    chosen.stop()
    assert chosen.status()["state"] == "failed" and opened[0]._file.closed
    assert len(traces.load(tmp_path / "t.npz").counts_NLE) == 1


def test_a_failure_of_the_writing_thread_ends_the_recording_with_its_reason(tmp_path, monkeypatch):
    def lost_device(self, block, stream):
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(step_writer.StepWriter, "_chunk", lost_device)
    lines = []
    chosen = recorder(log=lines.append)
    chosen.start(settings(tmp_path))
    assert chosen.status()["reason"] is None
    run(chosen, 0, random_ids(3, 0))
    chosen.stop()
    assert not chosen.is_recording and chosen.status()["state"] == "failed"
    assert chosen.status()["reason"] == "could not be written (RuntimeError: the device is lost)"
    assert len(lines) == 1 and chosen.status()["reason"] in lines[0]


def test_a_recording_that_cannot_start_leaves_no_file(tmp_path, monkeypatch):
    def no_memory(*arguments, **options):
        raise RuntimeError("out of memory")

    chosen = recorder()
    with monkeypatch.context() as patch:
        patch.setattr(recorder_module, "StepWriter", no_memory)
        with pytest.raises(RuntimeError, match="out of memory"):
            chosen.start(settings(tmp_path))
    assert not any(tmp_path.iterdir()) and not chosen.is_recording
    chosen.start(settings(tmp_path))
    chosen.stop()


def test_one_recording_at_a_time_into_a_new_file(tmp_path):
    chosen = recorder()
    assert chosen.status() == {"state": "off"}
    chosen.stop()
    chosen.start(settings(tmp_path))
    with pytest.raises(BalancerError, match="is running"):
        chosen.start(settings(tmp_path))
    chosen.stop()
    with pytest.raises(BalancerError, match="File exists"):
        chosen.start(settings(tmp_path))
    assert not chosen.is_recording


def test_cuda_graphs_record_only_what_they_were_captured_with(tmp_path):
    """The buffer that graphs write to is there from the start and stays the same one."""
    chosen = recorder(captured="counts", graphs=True)
    buffer = chosen._routed
    assert buffer is not None
    with pytest.raises(BalancerError, match="without recording ids"):
        chosen.start(settings(tmp_path, "ids"))
    chosen.start(settings(tmp_path))
    run(chosen, 0, random_ids(3, 0))
    chosen.stop()
    assert chosen._routed is buffer
    with pytest.raises(BalancerError, match="without recording counts"):
        recorder(graphs=True).start(settings(tmp_path))
