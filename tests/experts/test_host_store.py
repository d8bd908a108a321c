"""The host store: every tensor of an expert comes back bit by bit, from any process, and goes."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_balance.errors import BalancerError
from vllm_balance.experts import shared_memory
from vllm_balance.experts.host_store import ALIGNMENT_BYTES, ExpertLayout, HostStore, Machine
from vllm_balance.experts.shared_memory import SharedMemory

ALONE = Machine(rank=0, share=lambda mine: [mine])


def experts(seed: int, num_local: int = 3) -> list[torch.Tensor]:
    """Tensors of a quantised layer: packed weights, float8 weights, scales, a bias, zero points."""
    generator = torch.Generator().manual_seed(seed)

    def bits(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, (num_local, *shape), generator=generator, dtype=torch.uint8)

    return [
        bits(5, 14).view(torch.bfloat16),
        bits(7, 3).view(torch.float8_e4m3fn),
        bits(12).view(torch.float32),
        bits(1),
        bits(3, 8).view(torch.int64),
    ]


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


def test_every_tensor_of_every_expert_comes_back():
    layers = [experts(layer, num_local=6) for layer in range(2)]
    store = HostStore.shared(ExpertLayout.of(layers[0]), num_layers=2, num_experts=6, machine=ALONE)
    for layer, tensors in enumerate(layers):
        for expert in range(6):
            store.write(layer, expert, expert, tensors)
    slots = experts(9, num_local=2)
    other = [tensor[1].clone() for tensor in slots]
    for layer in (1, 0):
        for expert in (5, 0, 3):
            store.read(layer, expert, 0, slots)
            for slot, tensor in zip(slots, layers[layer], strict=True):
                assert same_bits(slot[0], tensor[expert])
            assert all(same_bits(slot[1], kept) for slot, kept in zip(slots, other, strict=True))


@given(st.lists(st.integers(1, 200), min_size=1, max_size=6))
def test_parts_of_a_row_are_aligned_and_do_not_overlap(sizes):
    layout = ExpertLayout(sizes_bytes=tuple(sizes))
    ends = [start + size for start, size in zip(layout.offsets_bytes, sizes, strict=True)]
    assert all(
        offset % ALIGNMENT_BYTES == 0 for offset in (*layout.offsets_bytes, layout.row_bytes)
    )
    assert all(end <= start for end, start in zip(ends, layout.offsets_bytes[1:], strict=False))
    assert ends[-1] <= layout.row_bytes < ends[-1] + ALIGNMENT_BYTES
    assert layout.expert_bytes == sum(sizes)


CHILD = """
import sys, torch
from vllm_balance.experts.shared_memory import Address, SharedMemory
machine, pid, descriptor, size = sys.argv[1], *map(int, sys.argv[2:])
shared = SharedMemory.open(
    Address(machine=machine, pid=pid, descriptor=descriptor, size_bytes=size))
assert shared.bytes_N[7] == 77
shared.bytes_N[8] = 88
shared.close_file()
print("opened", flush=True)
input()
assert shared.bytes_N[9] == 99
print("kept", flush=True)
"""


def test_another_process_sees_the_memory_and_keeps_it_after_the_owner_closed_its_file():
    shared = SharedMemory.allocate(1 << 20)
    shared.bytes_N[7] = 77
    address = shared.address
    arguments = [str(v) for v in (address.pid, address.descriptor, address.size_bytes)]
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, address.machine, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "opened\n"
    assert shared.bytes_N[8] == 88
    shared.close_file()
    shared.bytes_N[9] = 99
    assert child.communicate("\n", timeout=60)[0] == "kept\n"
    assert child.returncode == 0


OWNER = """
import sys
from vllm_balance.experts.shared_memory import SharedMemory
shared = SharedMemory.allocate(1 << 24)
shared.bytes_N.fill_(77)
print(shared.address.descriptor, flush=True)
sys.stdin.read()
"""
READER = """
import sys
from vllm_balance.experts.shared_memory import Address, SharedMemory, machine
pid, descriptor = map(int, sys.argv[1:])
shared = SharedMemory.open(
    Address(machine=machine(), pid=pid, descriptor=descriptor, size_bytes=1 << 24))
shared.close_file()
assert shared.bytes_N[-1] == 77
print("mapped", flush=True)
sys.stdin.read()
"""


def holders(inode: int) -> set[int]:
    """Processes that map the memory file or have it open: Linux frees it with the last of them."""
    name, found = "/memfd:moe_balancer_experts", set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # Processes of others, and some that have just ended.
            lines = [line for line in (folder / "maps").read_text().splitlines() if name in line]
            files = [file for file in (folder / "fd").iterdir() if name in os.readlink(file)]
            if inode in (*(int(line.split()[4]) for line in lines), *map(inode_of, files)):
                found.add(int(folder.name))
    return found


def inode_of(file: Path) -> int:
    return file.stat().st_ino


def test_memory_is_freed_when_all_that_map_it_are_killed():
    def start(code: str, *arguments: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    with start(OWNER) as owner:
        descriptor = int(owner.stdout.readline())
        inode = inode_of(Path(f"/proc/{owner.pid}/fd/{descriptor}"))
        assert holders(inode) == {owner.pid}
        with start(READER, owner.pid, descriptor) as reader:
            assert reader.stdout.readline() == "mapped\n"
            assert holders(inode) == {owner.pid, reader.pid}
            owner.kill()
            owner.wait()
            assert holders(inode) == {reader.pid}, "the other ranks keep what they map"
            reader.kill()
            reader.wait()
    assert holders(inode) == set()


MANY_CORES = """
import os, torch
from vllm_balance.experts.host_store import ExpertLayout, HostStore, Machine
from vllm_balance.experts.prefetch import Copy, ThreadPrefetch
torch.set_num_threads(3)
tensors = [torch.arange(2 << 22, dtype=torch.int32).view(2, -1)]
alone = Machine(rank=0, share=lambda mine: [mine])
store = HostStore.shared(ExpertLayout.of(tensors), num_layers=1, num_experts=2, machine=alone)
store.write(0, 0, 0, tensors)
before = len(os.listdir("/proc/self/task"))
prefetch = ThreadPrefetch(lambda copy: store.read(copy.layer, copy.expert, copy.slot, tensors))
prefetch.start([Copy(layer=0, expert=0, slot=1)])
prefetch.wait(0)
print(len(os.listdir("/proc/self/task")) - before)
assert torch.equal(tensors[0][0], tensors[0][1])
"""


def test_a_copy_beside_the_computation_takes_one_thread_on_a_rank_with_several_cores():
    """A second team of threads would fight for the cores with the one that computes."""
    command = [sys.executable, "-c", MANY_CORES]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "1\n"


@pytest.mark.parametrize("status", [0, 1])
def test_the_store_is_pinned_as_a_whole_or_the_refusal_is_named(status, monkeypatch):
    asked = []

    def register(*arguments: int) -> int:
        asked.append(arguments)
        return status

    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=register))
    store = HostStore.shared(
        ExpertLayout(sizes_bytes=(100,)), num_layers=2, num_experts=3, machine=ALONE
    )
    if status:
        with pytest.raises(BalancerError, match=r"cannot pin the 768 bytes .* \(error 1\)"):
            store.pin()
    else:
        store.pin()
    assert asked == [(store._rows_LEB.data_ptr(), 2 * 3 * 128, 0)]


def test_an_owner_that_is_gone_or_elsewhere_is_named():
    address = SharedMemory.allocate(4096).address
    for changed, words in (
        ({"machine": "other"}, "different machines"),
        ({"descriptor": 9999}, "cannot open the host store"),
    ):
        facts = {name: getattr(address, name) for name in type(address).__slots__}
        with pytest.raises(BalancerError, match=words):
            SharedMemory.open(type(address)(**(facts | changed)))


def test_more_memory_than_there_is_says_how_much(monkeypatch):
    """Linux promises a file of any size, and ends who touches its pages."""
    monkeypatch.setattr(shared_memory, "available_bytes", lambda: 4095)
    said = "needs 4,096 bytes .* 4,095 are available.* fetches no experts"
    with pytest.raises(BalancerError, match=said):
        SharedMemory.allocate(4096)
    monkeypatch.setattr(shared_memory, "available_bytes", lambda: 2**63)
    said = "needs 9,223,372,036,854,775,807 bytes .* refuses them.* fetches no experts"
    with pytest.raises(BalancerError, match=said):
        SharedMemory.allocate(2**63 - 1)


def test_every_rank_asks_for_huge_pages_of_its_own_mapping(monkeypatch):
    asked = []
    monkeypatch.setattr(shared_memory, "ask_for_huge_pages", lambda t: asked.append(t.data_ptr()))
    owner = SharedMemory.allocate(4096)
    other = SharedMemory.open(owner.address)
    assert asked == [owner.bytes_N.data_ptr(), other.bytes_N.data_ptr()]


def test_ranks_with_different_experts_are_refused():
    layout = ExpertLayout(sizes_bytes=(64,))
    other = ExpertLayout(sizes_bytes=(128,))

    def share(mine):
        return [mine, (other, mine[1], None)]

    with pytest.raises(BalancerError, match="different tensors on different ranks"):
        HostStore.shared(layout, num_layers=1, num_experts=2, machine=Machine(rank=0, share=share))
