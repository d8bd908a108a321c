"""Compiles METRO's Triton kernel for GPUs that are not here and reports what the compiler made.

``python -m bench.metro_gpu`` compiles, writes bench/results/metro_gpu.jsonl and docs/metro-gpu.md;
``--render`` writes the document from the committed JSON lines. Nothing here runs on a GPU:
latencies are modelled (bench/sass.py) and labelled so.
"""

from __future__ import annotations

import argparse
import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.provenance import ROOT, config_hash, provenance

RESULTS = ROOT / "bench/results/metro_gpu.jsonl"
DOCUMENT = ROOT / "docs/metro-gpu.md"
TARGETS = {80: ("A100", 1.41), 90: ("H100", 1.755), 100: ("B200", 1.85)}
"""Compute capability: example card and its boost clock in GHz, for the model."""
CASES = [
    # experts, slots, ranks, columns of the map that are read (of vLLM's 1,024), pairs
    (64, 96, 8, 8, 64 * 6),
    (128, 192, 2, 8, 32 * 8),
    (128, 192, 8, 8, 256 * 8),
    (256, 384, 32, 8, 256 * 8),
    (256, 512, 64, 8, 256 * 8),
    (512, 1024, 64, 8, 512 * 8),
]
STAGES = {
    "count_ids": "count",
    "load_ranks": "load the map",
    "_claim": "claim",
    "_accept": "accept",
    "_search": "search",
    "_place": "place",
    "_shift_tokens": "shift",
    "_partners": "partners",
    "sum_on_ranks": "sums",
    "map_pairs": "map",
    "add_batch": "record",
    "split_expert": "even",
    "record_even": "even",
    "write_non_experts": "even",
    "occurrences": "even",
    "even_share": "even",
    "choose_columns": "once",
    "route_kernel": "once",
    "valid_pairs_of": "once",
    "recording": "once",
}
"""Device function to stage; helpers count for the stage that calls them."""
TYPES = {
    "ids": "*i32",
    "table": "*i64",
    "replicas": "*i64",
    "load": "*i32",
    "record_enabled": "*i1",
    "valid": "*i32",
    "counters": "*i64",
    "out": "*i32",
    "knee_tokens": "fp32",
    "split": "*i32",
    "offset": "*i32",
    "tokens": "*i32",
    "counted": "*i32",
}
"""Of the arguments of all kernels that are no int32: vLLM's types of maps and ids."""
OPTIONS = ("num_warps", "maxnreg")


def compile_route(capability: int, sizes: dict[str, int]):
    """The route kernel with all that it can record, compiled for ``sm_<capability>``."""
    from vllm_balance.kernels.metro.triton_gpu import BLOCK_PAIRS, route_kernel

    flags = {"HAS_LOAD": True, "HAS_RECORD": True, "HAS_VALID": True}
    return compile_kernel(route_kernel, capability, sizes | flags | {"BLOCK": BLOCK_PAIRS})


def compile_kernel(kernel, capability: int, settings: dict[str, int | None], **types: str):
    """A kernel compiled for ``sm_<capability>``.

    Args:
        settings: options of the compiler and values known to it; an absent argument is None.
        types: of arguments, in place of those in TYPES.
    """
    types = TYPES | types
    options = {name: settings[name] for name in OPTIONS if name in settings}
    constants = {name: value for name, value in settings.items() if name not in OPTIONS}
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={
            name: "constexpr" if name in constants else types.get(name, "i32") for name in names
        },
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    # Not from Triton's cache: what it holds may name the files of another clone.
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.always_compile = True
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def passes(case: tuple[int, ...], sizes: dict[str, int], seed: int) -> dict[str, float]:
    """How often each stage runs for a Zipf 0.8 batch, from the numpy twin of the kernel."""
    import numpy as np

    from tests.cases import draw_topk, place, popularity
    from vllm_balance.kernels.metro import parallel_reference, reference
    from vllm_balance.kernels.metro.triton_gpu import BLOCK_PAIRS

    experts, physical, ranks, columns, pairs = case
    rng = np.random.default_rng(seed)
    weights_E = popularity(experts, 0.8, rng)
    placement = place(weights_E, physical, ranks, rng)
    ids_TK = draw_topk(pairs // 8, 8, weights_E, rng)
    tokens_E = reference.count(ids_TK, experts, None)
    table_ER = placement.logical_to_physical_ER.numpy()[:, :columns]
    replicas_E = np.minimum(placement.num_replicas_E.numpy(), columns)
    state = parallel_reference.solve(tokens_E, table_ER, replicas_E, ranks, physical)
    chunks = sizes["SB"] // sizes["SC"]
    claims = state.rounds + state.raises + 1
    shifts = min(state.shifts + 1, parallel_reference.MAX_SHIFTS)
    blocks = -(-pairs // BLOCK_PAIRS)
    return {
        "count": blocks,
        "map": blocks,
        "claim": claims,
        "accept": state.rounds * chunks,
        "search": max(state.layers, state.searches),
        "place": state.moves,
        "shift": shifts,
        "partners": shifts * chunks,
        # Four and two copies are in the code, half of them for batches split evenly.
        "sums": chunks / 2,
        "record": 1 / 2,
        "even": 0,
    }


def measure(case: tuple[int, ...], capability: int, num_seeds: int) -> dict:
    """One row: what the compiler made of a case, and the modelled latency."""
    from bench import sass
    from vllm_balance.kernels.metro.triton_gpu import block_sizes

    sizes = block_sizes(case[0], case[3], case[2])
    kernel = compile_route(capability, sizes)
    cubin = kernel.asm["cubin"]
    blocks = sass.read_blocks(cubin, STAGES)
    cycles = sass.stage_cycles(blocks, sizes["num_warps"])
    clock = TARGETS[capability][1]
    totals = sorted(
        sum(value * passes(case, sizes, seed).get(stage, 1) for stage, value in cycles.items())
        for seed in range(num_seeds)
    )
    resources = sass.resources(cubin)
    return {
        "case": dict(zip(("E", "P", "S", "R", "pairs"), case, strict=True)),
        "capability": capability,
        "warps": sizes["num_warps"],
        "registers": resources["reg"],
        "spilled_bytes": resources["stack"] + resources["local"],
        "shared_bytes": kernel.metadata.shared + resources["shared"],
        "instructions": sum(len(block.instructions) for block in blocks),
        "longest_chain_cycles": max(sass.chain_cycles(block) for block in blocks),
        "modelled_stage_cycles": cycles,
        "modelled_us_median": round(totals[num_seeds // 2] / clock / 1000, 2),
        "modelled_us_worst": round(totals[-1] / clock / 1000, 2),
        "seeds": num_seeds,
    }


def render(rows: list[dict]) -> str:
    """docs/metro-gpu.md from the rows."""
    lines = [
        "# METRO's GPU kernel, as compiled",
        "",
        "<!-- generated by python -m bench.metro_gpu from bench/results/metro_gpu.jsonl -->",
        "",
        "**No kernel ran on a GPU for this page.** The kernel is compiled (Triton "
        f"{rows[0]['versions']['triton']}, commit {rows[0]['commit']})",
        "for each architecture on a machine without one and its",
        "machine code is read back. Registers, spills, shared memory and instructions are what",
        "the compiler reports. The latency is *modelled, not measured*: every basic block counts",
        "with its longest chain of dependent instructions (or the time to issue it for all warps),",
        "times how often its stage runs for Zipf 0.8 batches; latencies per instruction class and",
        "the clock are assumptions (`bench/sass.py`, `bench/metro_gpu.py`). Launch overhead is not",
        "in it. For comparison: the paper gives up to 26 us, measured on an A100, for its greedy.",
        "",
        "| E | P | S | pairs | arch | warps | registers | spilled bytes | shared bytes "
        "| instructions | longest chain, cycles | modelled us, median | modelled us, worst |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        case = row["case"]
        lines.append(
            f"| {case['E']} | {case['P']} | {case['S']} | {case['pairs']} | sm_{row['capability']} "
            f"| {row['warps']} | {row['registers']} | {row['spilled_bytes']} "
            f"| {row['shared_bytes']} | {row['instructions']} | {row['longest_chain_cycles']} "
            f"| {row['modelled_us_median']} | {row['modelled_us_worst']} |"
        )
    lines += [
        "",
        f"Median and worst are over {rows[0]['seeds']} batches. Clocks assumed: "
        + ", ".join(f"{clock} GHz (sm_{key}, {card})" for key, (card, clock) in TARGETS.items())
        + ".",
        "",
        "The kernel is one program of this size; in batches that may be compute-bound it is",
        "launched with one more program per expert, which leave after counting unless the batch",
        "is. tests/kernels/test_triton_compiled.py fails on any spill and on 48 KB of shared",
        "memory.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--render", action="store_true", help="only write the document")
    parser.add_argument("--seeds", type=int, default=40, help="batches per case for the model")
    arguments = parser.parse_args()
    if not arguments.render:
        settings = {"cases": CASES, "targets": TARGETS, "seeds": arguments.seeds}
        origin = {"config_hash": config_hash(settings), **provenance("triton")}
        rows = [measure(case, cap, arguments.seeds) | origin for case in CASES for cap in TARGETS]
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    DOCUMENT.write_text(render(rows))


if __name__ == "__main__":
    sys.exit(main())
