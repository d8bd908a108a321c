"""Recording files: read back as written, cut at any byte, merged over ranks, never too large."""

import errno
import io
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_balance import recorded, recording, traces
from vllm_balance.errors import BalancerError
from vllm_balance.recording import Phase, RecordingFile, RecordSettings, path_of_rank

LAYERS, EXPERTS, TOP_K = 2, 5, 2
HEADER = {
    "num_experts": EXPERTS,
    "top_k": TOP_K,
    "rank": 0,
    "num_ranks": 1,
    "layer_index": np.array([1, 3]),
}


def counts_chunk(first_step: int, num_steps: int, seed: int = 0, phase: int = 1) -> dict:
    random = np.random.default_rng(seed)
    return {
        "step": np.arange(first_step, first_step + num_steps),
        "phase": np.full(num_steps, phase, np.uint8),
        "counts": random.integers(0, 9, (num_steps, LAYERS, EXPERTS)).astype(np.uint16),
    }


def ids_chunk(first_step: int, tokens_N: list[int], seed: int = 0) -> dict:
    total = sum(tokens_N)
    noise = np.random.default_rng(seed).random((total, LAYERS, EXPERTS))
    return {
        "step": np.arange(first_step, first_step + len(tokens_N)),
        "num_tokens": np.array(tokens_N),
        "request_id": np.arange(total),
        "position": np.arange(total, dtype=np.int32),
        "phase": np.ones(total, np.uint8),
        "topk_ids": noise.argsort(2)[..., :TOP_K].astype(np.uint8),
    }


def write(path, chunks: list[dict], closed: bool = True, **header) -> RecordingFile:
    what = "ids" if "topk_ids" in chunks[0] else "counts"
    file = RecordingFile(path, what, 2**20, HEADER | header)
    assert all(file.append(chunk) for chunk in chunks)
    if closed:
        file.close()
    return file


@pytest.mark.parametrize("closed", [True, False])
def test_counts_come_back_and_numpy_opens_a_closed_file(tmp_path, closed):
    path = tmp_path / "t.npz"
    chunks = [counts_chunk(7, 3), counts_chunk(10, 1, seed=1, phase=0)]
    file = write(path, chunks, closed)
    trace = traces.load(path)
    assert np.array_equal(trace.counts_NLE, np.concatenate([c["counts"] for c in chunks]))
    assert trace.phase_N.tolist() == [1, 1, 1, 0]
    assert trace.layer_index_L.tolist() == [1, 3]
    assert (trace.name, trace.num_experts, trace.top_k) == ("t", EXPERTS, TOP_K)
    if closed:
        with np.load(path) as archive:
            assert np.array_equal(archive["counts.000001"], chunks[1]["counts"])
    else:
        assert not zipfile.is_zipfile(path)
        file.close()


def test_ids_come_back(tmp_path):
    chunks = [ids_chunk(0, [3, 0, 2]), ids_chunk(3, [4], seed=1)]
    write(tmp_path / "t.npz", chunks)
    trace = traces.load(tmp_path / "t.npz")
    assert np.array_equal(trace.topk_ids_TLK, np.concatenate([c["topk_ids"] for c in chunks]))
    assert trace.request_id_T.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert trace.position_T.tolist() == trace.request_id_T.tolist()
    assert (trace.phase_T == Phase.DECODE).all() and trace.phase_N is None


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("make", [counts_chunk, lambda first, n: ids_chunk(first, [1] * n)])
def test_a_file_cut_at_any_byte_is_read_up_to_its_last_whole_chunk(tmp_path, make, closed):
    """Every byte around the ends of chunks, and every seventh of the others."""
    path, cut = tmp_path / "t.npz", tmp_path / "cut.npz"
    file = RecordingFile(path, "ids" if "topk_ids" in make(0, 1) else "counts", 2**20, HEADER)
    ends = [path.stat().st_size]
    for chunk in (make(0, 2), make(2, 2), make(4, 2)):
        assert file.append(chunk)
        ends.append(path.stat().st_size)
    if closed:
        file.close()
    data = path.read_bytes()
    whole = traces.load(path)
    near = {end + off for end in ends for off in range(-64, 65)}
    for length in sorted(near.intersection(range(len(data))) | {*range(0, len(data), 7)}):
        cut.write_bytes(data[:length])
        num_chunks = sum(length >= end for end in ends) - 1
        if num_chunks < 1:
            with pytest.raises(BalancerError):
                traces.load(cut)
            continue
        assert np.array_equal(traces.load(cut).chunks(1), whole.chunks(1)[: 2 * num_chunks])


def test_a_write_that_was_cut_before_its_sizes_were_filled_in_is_left_out(tmp_path):
    """zipfile writes a header without sizes, the content, and then the sizes."""
    path = tmp_path / "t.npz"
    file = write(path, [counts_chunk(0, 2)], closed=False)
    whole = path.read_bytes()
    file.append(counts_chunk(2, 2))
    unfinished = bytearray(path.read_bytes())
    unfinished[len(whole) + 14 : len(whole) + 26] = bytes(12)
    path.write_bytes(unfinished)
    assert len(traces.load(path).counts_NLE) == 2
    file.close()


@given(st.data())
def test_a_flipped_byte_is_refused_or_harmless(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "flipped.npz"
    path.unlink(missing_ok=True)
    write(path, [counts_chunk(0, 3)])
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        found = traces.load(path)
    except BalancerError:
        return
    assert np.array_equal(found.counts_NLE, counts_chunk(0, 3)["counts"])


SHORTER = {
    "counts": ("step", "phase", "counts"),
    "ids": ("step", "num_tokens", "request_id", "position", "phase", "topk_ids"),
}


@pytest.mark.parametrize(("what", "name"), [(w, n) for w, names in SHORTER.items() for n in names])
def test_a_recording_whose_arrays_differ_in_length_is_refused(tmp_path, what, name):
    chunk = counts_chunk(0, 3) if what == "counts" else ids_chunk(0, [1, 1, 1])
    write(tmp_path / "t.npz", [chunk | {name: chunk[name][:2]}])
    with pytest.raises(BalancerError, match=rf"t\.npz is damaged: it holds .*{name} \[2"):
        traces.load(tmp_path / "t.npz")


def test_numbers_of_tokens_that_do_not_add_up_are_refused(tmp_path):
    write(tmp_path / "t.npz", [ids_chunk(0, [2, 1]) | {"num_tokens": np.array([2, 2])}])
    with pytest.raises(BalancerError, match="one for each of its tokens"):
        traces.load(tmp_path / "t.npz")


ARRAYS = st.builds(
    lambda dtype, shape, fill: np.full(shape, fill).astype(dtype),
    st.sampled_from(["u1", "i1", "<u8", ">i4", "f4", "?", "S3", "U2", "M8[s]", "c8"]),
    st.lists(st.integers(0, 4), max_size=4),
    st.integers(-3, 9),
)
HEADERS = st.sampled_from(["num_experts", "top_k", "rank", "num_ranks", "layer_index", "recording"])


@given(st.data())
def test_any_array_under_a_right_checksum_is_refused_or_read(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzzed.npz"
    path.unlink(missing_ok=True)
    chunk = data.draw(st.sampled_from([counts_chunk(0, 3), ids_chunk(0, [1, 0, 2])]))
    odd = data.draw(st.dictionaries(st.sampled_from(sorted(chunk)), ARRAYS, max_size=2))
    header = data.draw(st.dictionaries(HEADERS, ARRAYS, max_size=1 if odd else 2))
    write(path, [chunk | odd], **header)
    try:
        trace = traces.load(path)
    except BalancerError as refused:
        assert "fuzzed.npz" in str(refused)
        return
    first, _ = trace.split() if trace.num_tokens > 1 and len(chunk["step"]) > 1 else (trace, None)
    assert first.chunks(1).shape[1:] == (trace.num_layers, trace.num_experts)


@given(st.data())
def test_any_content_under_a_right_checksum_is_refused_or_read(tmp_path_factory, data):
    """Bytes of one member's own header or content changed before it is packed."""
    path = tmp_path_factory.getbasetemp() / "repacked.npz"
    path.unlink(missing_ok=True)
    write(path, [counts_chunk(0, 3)])
    with zipfile.ZipFile(path) as archive:
        members = {name: bytearray(archive.read(name)) for name in archive.namelist()}
    name = data.draw(st.sampled_from(sorted(members)))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(members[name]) - 1))
        members[name][place] = data.draw(st.integers(0, 255))
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, bytes(content))
    try:
        traces.load(path)
    except BalancerError as refused:
        assert "repacked.npz" in str(refused)


def test_damage_inside_is_told_with_its_place(tmp_path):
    path = tmp_path / "t.npz"
    write(path, [counts_chunk(0, 3)])
    content = bytearray(path.read_bytes())
    content[content.index(b"counts.000000.npy") + 40] ^= 255
    path.write_bytes(content)
    with pytest.raises(BalancerError, match="damaged at byte"):
        traces.load(path)


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.integers(0, 2**31),
    st.sampled_from([np.uint16, np.int32]),
)
def test_round_trip(tmp_path_factory, sizes, seed, dtype):
    path = tmp_path_factory.getbasetemp() / "round.npz"
    path.unlink(missing_ok=True)
    random, chunks, first = np.random.default_rng(seed), [], 0
    for size in sizes:
        counts = random.integers(0, np.iinfo(dtype).max, (size, LAYERS, EXPERTS)).astype(dtype)
        phase = random.integers(0, 3, size).astype(np.uint8)
        chunks.append({"step": np.arange(first, first + size), "phase": phase, "counts": counts})
        first += size
    write(path, chunks)
    trace = traces.load(path)
    assert np.array_equal(trace.counts_NLE, np.concatenate([c["counts"] for c in chunks]))
    assert np.array_equal(trace.phase_N, np.concatenate([c["phase"] for c in chunks]))


@given(st.integers(2**12, 2**15), st.integers(1, 40))
def test_the_limit_holds_also_for_what_cannot_be_compressed(tmp_path_factory, limit, num_steps):
    path = tmp_path_factory.getbasetemp() / "limit.npz"
    path.unlink(missing_ok=True)
    file = RecordingFile(path, "counts", limit, HEADER)
    random = np.random.default_rng(limit)
    written = 0
    for first in range(0, 100 * num_steps, num_steps):
        chunk = counts_chunk(first, num_steps)
        chunk["counts"] = random.integers(0, 2**16, chunk["counts"].shape).astype(np.uint16)
        before = path.stat().st_size
        if not file.append(chunk):
            assert path.stat().st_size == before
            break
        written += num_steps
    file.close()
    assert path.stat().st_size <= limit
    assert written < 100 * num_steps
    if written:
        assert len(traces.load(path).counts_NLE) == written


def test_ranks_are_summed_over_the_steps_that_all_of_them_hold(tmp_path):
    """Rank 1 starts a step later, is idle in step 7, and was killed before step 9."""
    first, second = counts_chunk(5, 5), counts_chunk(6, 3, seed=1, phase=0)
    second["counts"][1], second["phase"][1] = 0, Phase.IDLE
    first["counts"][3] = second["counts"][2] = 0
    first["phase"][3] = second["phase"][2] = Phase.IDLE
    write(tmp_path / "t.npz", [first], num_ranks=2)
    write(tmp_path / "t.rank1.npz", [second], num_ranks=2, rank=1)
    trace = traces.load(tmp_path / "t.npz")
    expected = first["counts"][1:3].astype(int) + second["counts"][:2]
    assert np.array_equal(trace.counts_NLE, expected)
    assert trace.phase_N.tolist() == [Phase.MIXED, Phase.DECODE]


def test_tokens_of_ranks_are_put_together_step_by_step(tmp_path):
    first, second = ids_chunk(5, [2, 1, 1]), ids_chunk(6, [0, 3], seed=1)
    write(tmp_path / "t.npz", [first], num_ranks=2)
    write(tmp_path / "t.rank1.npz", [second], num_ranks=2, rank=1)
    trace = traces.load(tmp_path / "t.npz")
    expected = np.concatenate([first["topk_ids"][2:], second["topk_ids"]])
    assert np.array_equal(trace.topk_ids_TLK, expected)
    assert trace.request_id_T.tolist() == [4, 6, 1, 3, 5]


def test_sums_beyond_16_bits_are_right_and_beyond_32_are_refused(tmp_path):
    first, second = counts_chunk(5, 2), counts_chunk(5, 2)
    first["counts"][:], second["counts"][:] = 60_000, 50_000
    for folder, factor in (("small", 1), ("large", 20_000)):
        (tmp_path / folder).mkdir()
        for rank, part in enumerate((first, second)):
            counts = {"counts": part["counts"].astype(np.int32) * factor}
            path = path_of_rank(tmp_path / folder / "t.npz", rank)
            write(path, [part | counts], num_ranks=2, rank=rank)
    assert (traces.load(tmp_path / "small" / "t.npz").counts_NLE == 110_000).all()
    with pytest.raises(BalancerError, match="allowed are 0 to 2147483647"):
        traces.load(tmp_path / "large" / "t.npz")


def test_reading_takes_a_few_times_what_was_recorded(tmp_path):
    """Its chunks, all of them joined, and those as 32 bits."""
    random, path = np.random.default_rng(0), tmp_path / "t.npz"
    file = RecordingFile(path, "counts", 2**25, HEADER)
    size = (500, LAYERS * 200, EXPERTS)
    for first in range(0, 2000, 500):
        counts = random.integers(0, 9, size).astype(np.uint16)
        assert file.append(counts_chunk(first, 500) | {"counts": counts})
    file.close()
    recorded.read(path)
    tracemalloc.start()
    found = recorded.read(path)["counts"]
    found = found.astype(np.int32, copy=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3.5 * 2 * found.size


def test_parts_that_do_not_belong_together_are_refused(tmp_path):
    write(tmp_path / "t.npz", [counts_chunk(0, 2)], num_ranks=2)
    with pytest.raises(BalancerError, match=r"t\.rank1\.npz is missing"):
        traces.load(tmp_path / "t.npz")
    write(tmp_path / "t.rank1.npz", [ids_chunk(0, [2])], num_ranks=2, rank=1)
    with pytest.raises(BalancerError, match="not of this recording"):
        traces.load(tmp_path / "t.npz")
    with pytest.raises(BalancerError, match="Name the file of rank 0"):
        traces.load(tmp_path / "t.rank1.npz")


@pytest.mark.parametrize("other", [{"run": "b"}, {"num_experts": EXPERTS + 1}, {"num_ranks": 3}])
def test_files_of_two_recordings_are_not_added_up(tmp_path, other):
    own = {"num_ranks": 2, "run": "a"}
    write(tmp_path / "t.npz", [counts_chunk(0, 2)], **own)
    write(tmp_path / "t.rank1.npz", [counts_chunk(0, 2)], **(own | {"rank": 1}))
    assert traces.load(tmp_path / "t.npz").counts_NLE is not None
    (tmp_path / "t.rank1.npz").unlink()
    write(tmp_path / "t.rank1.npz", [counts_chunk(0, 2)], **(own | {"rank": 1} | other))
    with pytest.raises(BalancerError, match="not of this recording"):
        traces.load(tmp_path / "t.npz")


def test_a_recording_without_a_step_and_a_newer_format_are_refused(tmp_path):
    RecordingFile(tmp_path / "empty.npz", "counts", 2**20, HEADER).close()
    with pytest.raises(BalancerError, match="no whole step"):
        traces.load(tmp_path / "empty.npz")
    write(tmp_path / "new.npz", [counts_chunk(0, 1)], recording=2)
    with pytest.raises(BalancerError, match="reads format 1"):
        traces.load(tmp_path / "new.npz")


def test_an_ordinary_archive_is_no_recording(tmp_path):
    np.savez(tmp_path / "a.npz", counts=np.ones((1, 1, 1), int))
    (tmp_path / "b.npz").write_bytes(io.BytesIO().getvalue())
    assert recorded.read(tmp_path / "a.npz") is None
    assert recorded.read(tmp_path / "b.npz") is None


def test_a_file_is_made_only_where_there_is_none(tmp_path):
    path = tmp_path / "t.npz"
    recording.require_recordable(path, range(2))
    path_of_rank(path, 1).touch()
    with pytest.raises(BalancerError, match=r"t\.rank1\.npz exists"):
        recording.require_recordable(path, range(2))
    with pytest.raises(BalancerError, match="File exists"):
        RecordingFile(path_of_rank(path, 1), "counts", 2**20, HEADER)
    with pytest.raises(BalancerError, match="does not exist"):
        recording.require_recordable(tmp_path / "missing" / "t.npz", [0])
    with pytest.raises(BalancerError, match="No such file"):
        RecordingFile(tmp_path / "missing" / "t.npz", "counts", 2**20, HEADER)


@pytest.mark.parametrize("wrong", [{"what": "tokens"}, {"max_bytes": 1}, {"max_byte": 2**20}])
def test_wrong_settings(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RecordSettings.model_validate({"file": "t.npz", **wrong})


def test_a_disk_that_is_full_at_the_start_is_a_refusal_without_a_file(tmp_path, monkeypatch):
    def full(self, name, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RecordingFile, "_write", full)
    with pytest.raises(BalancerError, match="No space left on device"):
        RecordingFile(tmp_path / "t.npz", "counts", 2**20, HEADER)
    assert not (tmp_path / "t.npz").exists()
