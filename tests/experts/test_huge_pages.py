"""Moving weights into huge pages changes where they lie, never what they are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain, combinations
from pathlib import Path

import pytest
import torch

from vllm_balance.experts import huge_pages
from vllm_balance.experts.huge_pages import HUGE_PAGE_BYTES, gather_into_huge_pages


def _huge_bytes(tensor: torch.Tensor) -> int:
    """Bytes in huge pages of the mappings that hold the tensor, as the system counts them."""
    first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    huge, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if head := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(head[1], 16) < last and int(head[2], 16) > first
        elif inside and line.startswith("AnonHugePages:"):
            huge += int(line.split()[1]) * 1024
    return huge


@pytest.mark.parametrize("offset", [0, 1, 4097])
def test_contents_stay_and_the_number_says_what_the_system_did(offset: int) -> None:
    memory = torch.randint(0, 255, (8 * HUGE_PAGE_BYTES + offset,), dtype=torch.uint8)
    weights = memory[offset:]
    before = weights.clone()

    gathered = gather_into_huge_pages([weights])

    torch.testing.assert_close(weights, before, rtol=0, atol=0)
    # Which pieces it moves is the system's choice, none of them included: what is said of them is
    # a sum of pieces, and a claim of any is seen in its own accounts.
    pieces = [last - first for first, last in huge_pages._pieces(weights)]
    assert sum(pieces) in (7 * HUGE_PAGE_BYTES, 8 * HUGE_PAGE_BYTES)
    assert gathered in {sum(moved) for moved in _subsets(pieces)}
    assert gathered == 0 or _huge_bytes(weights) > 0


def _subsets(pieces: list[int]) -> Iterator[tuple[int, ...]]:
    return chain.from_iterable(combinations(pieces, n) for n in range(len(pieces) + 1))


def test_a_piece_that_the_system_refuses_costs_only_itself_and_is_asked_for_again(monkeypatch):
    weights = torch.zeros(4 * huge_pages.PIECE_BYTES, dtype=torch.uint8)
    refused, asked = huge_pages._pieces(weights)[1:3], []
    assert all(last - first == huge_pages.PIECE_BYTES for first, last in refused)

    def advise(first, last, advice):
        asked.append((first, last))
        return (first, last) not in refused or (
            (first, last) == refused[1] and asked.count(refused[1]) == 3
        )

    monkeypatch.setattr(huge_pages, "_advise", advise)
    gathered = gather_into_huge_pages([weights])
    whole = sum(last - first for first, last in huge_pages._pieces(weights))
    assert gathered == whole - huge_pages.PIECE_BYTES
    assert asked.count(refused[0]) == 1 + huge_pages.ROUNDS


def test_less_than_a_huge_page_is_left_alone() -> None:
    assert gather_into_huge_pages([torch.zeros(1000), torch.zeros(0)]) == 0


def test_memory_of_a_file_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(range(256)) * (2 * HUGE_PAGE_BYTES // 256))
    weights = torch.from_file(
        str(tmp_path / "weights"), size=2 * HUGE_PAGE_BYTES, dtype=torch.uint8
    )
    found = gather_into_huge_pages([weights])
    assert found % HUGE_PAGE_BYTES == 0 and found <= weights.nbytes
    assert weights[-1] == 255 and weights[HUGE_PAGE_BYTES + 3] == 3
    assert (tmp_path / "weights").read_bytes() == weights.numpy().tobytes()
