"""Reads the machine code of a compiled Triton kernel: size, spills and a modelled latency.

The model is no measurement. Every basic block takes the longest chain of dependent instructions,
or the time four schedulers need to issue it for all warps if that is longer; a block runs as often
as its stage does. Latencies per class are round figures from published microbenchmarks.
"""

from __future__ import annotations

import ast
import re
import subprocess
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import triton

CYCLES = {
    "LDG": 300, "STG": 4, "LDS": 30, "STS": 20, "ATOMS": 60, "SHFL": 25, "REDUX": 25, "VOTE": 12,
    "MATCH": 25, "BAR": 30, "MUFU": 20, "I2F": 15, "F2I": 15, "POPC": 12, "FLO": 12, "LDC": 30,
    "ULDC": 30, "S2R": 25, "R2UR": 12, "STL": 4, "LDL": 35,
}  # fmt: skip
"""Modelled cycles from issue to a dependent instruction; everything else takes 5. Global loads
are taken to hit the L2 cache."""
OTHER_CYCLES = 5
SCHEDULERS = 4
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
_LOCATION = re.compile(r'//## File "([^"]+)", line (\d+)')
_REGISTER = re.compile(r"\bU?[RP]\d+\b")
_BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(slots=True)
class Block:
    """A basic block: instructions as (opcode, written, read), and the stage of each."""

    instructions: list[tuple[str, set[str], set[str]]] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)

    @property
    def stage(self) -> str:
        return max(set(self.stages), key=self.stages.count)


def functions_of(path: str) -> list[tuple[int, int, str]]:
    """First line, last line and name of every function of a source file."""
    tree = ast.parse(Path(path).read_text())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [(node.lineno, node.end_lineno or node.lineno, node.name) for node in found]


def _stage(path: str, line: int, current: str, stages: dict[str, str], sources: dict) -> str:
    """Stage of a source line: that of its function, or the current one in shared helpers."""
    if path not in sources:
        sources[path] = functions_of(path)
    for first, last, name in sources[path]:
        if first <= line <= last and name in stages:
            return stages[name]
    return current


def _operands(opcode: str, text: str) -> tuple[set[str], set[str]]:
    """Registers written and read; 64-bit operands count with both halves."""
    parts = [part.strip() for part in text.split(",")]
    wide = ".64" in opcode or "WIDE" in opcode
    stores = opcode.split(".")[0] in ("STG", "STS", "STL", "BAR", "BRA", "EXIT", "RED", "BSYNC")

    def names(part: str) -> set[str]:
        found = set(_REGISTER.findall(part))
        pairs = {name for name in found if wide or ".64" in part}
        return found | {f"{name.rstrip('0123456789')}{int(re.sub(r'[^0-9]', '', name)) + 1}"
                        for name in pairs}  # fmt: skip

    split = 0 if stores else 1
    if not stores and "SETP" in opcode and len(parts) > 1 and parts[1].startswith(("P", "UP")):
        split = 2
    written = set().union(*(names(part) for part in parts[:split]))
    return written, set().union(*(names(part) for part in parts[split:]))


def read_blocks(cubin: bytes, stages: dict[str, str]) -> list[Block]:
    """Basic blocks of the kernel with their stages, from nvdisasm."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run(
            [_BINARIES / "nvdisasm", "-g", "-c", file.name], capture_output=True, text=True
        ).stdout
    blocks, sources, stage = [Block()], {}, "once"
    for line in listing.splitlines():
        if location := _LOCATION.search(line):
            stage = _stage(location[1], int(location[2]), stage, stages, sources)
        elif found := _INSTRUCTION.search(line):
            guard, opcode, text = found.groups()
            if opcode == "NOP":
                continue
            written, read = _operands(opcode, text)
            read |= set(_REGISTER.findall(guard or ""))
            blocks[-1].instructions.append((opcode, written, read))
            blocks[-1].stages.append(stage)
            if opcode.split(".")[0] in ("BRA", "EXIT", "BSYNC"):
                blocks.append(Block())
        elif line.startswith(".L_"):
            blocks.append(Block())
    return [block for block in blocks if block.instructions]


def chain_cycles(block: Block) -> int:
    """Modelled cycles of the longest dependent chain; a barrier waits for all before it."""
    ready: dict[str, int] = defaultdict(int)
    floor = longest = 0
    for opcode, written, read in block.instructions:
        kind = opcode.split(".")[0]
        start = max([floor, *(ready[name] for name in read)])
        if kind == "BAR":
            start = longest
        end = start + CYCLES.get(kind, OTHER_CYCLES)
        for name in written:
            ready[name] = end
        longest = max(longest, end)
        if kind == "BAR":
            floor = end
    return longest


def stage_cycles(blocks: list[Block], num_warps: int) -> dict[str, int]:
    """Modelled cycles of one pass through each stage."""
    cycles: dict[str, int] = defaultdict(int)
    for block in blocks:
        issue = len(block.instructions) * num_warps // SCHEDULERS
        cycles[block.stage] += max(chain_cycles(block), issue)
    return dict(cycles)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread, bytes of stack (spills) and static shared memory, from cuobjdump."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [_BINARIES / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True
        ).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text))
    return {name.lower(): int(value) for name, value in found.items()}
