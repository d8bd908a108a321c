"""Runs the Triton kernels in Triton's interpreter on random cases and compares every integer.

Run as ``TRITON_INTERPRET=1 python interpreted.py KERNEL CASES FIRST_SEED FOLDER``: the variable
must be set before Triton is imported, hence a process of its own. Several kernels and numbers are
separated by commas; eplb_hash must be the last, since it changes the interpreter. Prints each
kernel with the number of cases compared.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from vllm_balance.kernels.assign import reference as assign_reference
from vllm_balance.kernels.assign import triton_gpu as assign_gpu
from vllm_balance.kernels.eplb_hash import reference as hash_reference
from vllm_balance.kernels.metro import parallel_reference, triton_gpu
from vllm_balance.kernels.metro import reference as metro_reference
from vllm_balance.kernels.record import Regime, counters_size
from vllm_balance.kernels.record import reference as record_reference
from vllm_balance.kernels.record import triton_gpu as record_gpu

_spec = importlib.util.spec_from_file_location("cases", Path(__file__).parents[1] / "cases.py")
sys.modules["cases"] = _cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_cases)
Case, bounded_replicas, random_case = _cases.Case, _cases.bounded_replicas, _cases.random_case
POISON = -(2**30)
SMALL = {"max_experts": 12, "max_tokens": 24}
"""Where every expert is a program, the interpreter runs these one by one: fewer of them."""


def cases(number: int, first: int, **shape: int) -> Iterator[tuple[int, Case]]:
    """``number`` random cases within the kernels' limits, and their seeds."""
    seed = first
    while number:
        case = random_case(seed, **shape)
        fits = case.placement.num_physical <= triton_gpu.MAX_PHYSICAL
        if fits and bounded_replicas(case, triton_gpu.MAX_REPLICAS):
            number -= 1
            yield seed, case
        seed += 1


def column_of(case: Case, tokens_E: np.ndarray) -> np.ndarray:
    placement = case.placement
    return parallel_reference.choose(
        tokens_E, case.table_ER, case.num_replicas_E, placement.num_ranks, placement.num_physical
    )


def check_choose(seed: int, case: Case) -> None:
    placement = case.placement
    tokens_E = metro_reference.count(case.topk_ids_TK, placement.num_logical, case.num_valid_tokens)
    out_E = torch.full((placement.num_logical,), POISON, dtype=torch.int32)
    triton_gpu.choose(
        torch.from_numpy(tokens_E).int(),
        placement.logical_to_physical_ER,
        placement.num_replicas_E,
        placement.num_ranks,
        placement.num_physical,
        out_E,
    )
    expected_E = column_of(case, tokens_E)
    assert (out_E.numpy() == expected_E).all(), seed
    shape = (case.table_ER, case.num_replicas_E, placement.num_ranks, placement.num_physical)
    activated_S, _ = metro_reference.loads(expected_E, tokens_E, shape[0], *shape[2:])
    assert activated_S.max() == metro_reference.optimal_activated(tokens_E, *shape), seed


class Buffers:
    """Random state before a batch, and the same after it by the reference."""

    def __init__(self, seed: int, case: Case) -> None:
        rng = np.random.default_rng(seed)
        self.case = case
        self.load_P = rng.integers(0, 9, case.placement.num_physical + 2).astype(np.int32)
        self.counters = rng.integers(0, 9, counters_size(case.placement.num_ranks))
        self.has_load, self.has_flag, self.flag = rng.integers(2, size=3)
        self.wide = bool(rng.integers(2))
        self.ids_TK = torch.from_numpy(case.topk_ids_TK.astype(np.int64 if self.wide else np.int32))
        self.load = torch.from_numpy(self.load_P.copy()) if self.has_load else None
        self.record_enabled = torch.tensor([bool(self.flag)]) if self.has_flag else None
        valid = case.num_valid_tokens
        self.valid = None if valid is None else torch.tensor(valid, dtype=torch.int32)
        self.counted = torch.from_numpy(self.counters.copy())

    def check(self, seed: int, slots_TK: np.ndarray, regime: Regime) -> None:
        record_reference.record(
            slots_TK,
            num_physical=self.case.placement.num_physical,
            num_ranks=self.case.placement.num_ranks,
            load_P=self.load_P,
            record_enabled=bool(self.has_load and (self.flag or not self.has_flag)),
            num_valid_tokens=self.case.num_valid_tokens,
            counters=self.counters,
            regime=regime,
        )
        assert (self.counted.numpy() == self.counters).all(), seed
        if self.load is not None:
            assert (self.load.numpy() == self.load_P).all(), seed


def check_route(seed: int, case: Case) -> None:
    placement, buffers = case.placement, Buffers(seed, case)
    small = placement.num_logical <= SMALL["max_experts"]
    knee = [0.0, 1.5, 4.0][seed % 3] if small else [1e9, float("inf")][seed % 2]
    tokens_E = metro_reference.count(case.topk_ids_TK, placement.num_logical, case.num_valid_tokens)
    even = metro_reference.is_compute_bound(tokens_E, knee)
    column_E = None if even else column_of(case, tokens_E)
    expected_TK = metro_reference.map_pairs(
        case.topk_ids_TK, column_E, case.table_ER, case.num_replicas_E, case.num_valid_tokens
    )
    table_ER = placement.logical_to_physical_ER
    if buffers.wide:
        table_ER = torch.nn.functional.pad(table_ER.long(), (0, 1024 - table_ER.shape[1]), value=-1)
    out_TK = torch.full_like(buffers.ids_TK, POISON)
    triton_gpu.route(
        buffers.ids_TK,
        table_ER,
        placement.num_replicas_E.to(table_ER.dtype),
        placement.num_ranks,
        placement.num_physical,
        knee,
        None,
        buffers.load,
        buffers.record_enabled,
        buffers.valid,
        buffers.counted,
        out_TK,
    )
    assert (out_TK.numpy() == expected_TK).all(), seed
    buffers.check(seed, expected_TK, Regime.COMPUTE_BOUND if even else Regime.MEMORY_BOUND)


def check_refusal() -> None:
    """A GPU's experts never run in turn: asked for, it is refused before a kernel starts."""
    for run, buffers in ((triton_gpu.route, 5), (triton_gpu.split, 1)):
        try:
            run(None, None, None, 2, 4, 4.0, 2.0, *[None] * buffers)
        except ValueError as error:
            assert "free_tokens=2 describes ranks that compute their experts in turn" in str(error)
        else:
            raise AssertionError("free_tokens was taken")


def check_split(seed: int, case: Case) -> None:
    """Also what its ``record_split`` counts."""
    placement, buffers = case.placement, Buffers(seed, case)
    knee = [0.0, 1.5, 4.0, float("inf")][seed % 4]
    tokens_E = metro_reference.count(case.topk_ids_TK, placement.num_logical, case.num_valid_tokens)
    even = metro_reference.is_compute_bound(tokens_E, knee)
    table_ER, replicas_E = placement.logical_to_physical_ER, placement.num_replicas_E
    expected_ER = metro_reference.split(
        None if even else column_of(case, tokens_E), tokens_E, replicas_E.numpy(), table_ER.shape[1]
    )
    if buffers.wide:
        table_ER = torch.nn.functional.pad(table_ER.long(), (0, 9), value=-1)[:, :-9]
    split_ER = torch.full(table_ER.shape, POISON, dtype=torch.int32)
    sizes = placement.num_ranks, placement.num_physical
    triton_gpu.split(
        torch.from_numpy(tokens_E).int(), table_ER, replicas_E, *sizes, knee, None, split_ER
    )
    assert (split_ER.numpy() == expected_ER).all(), seed
    spread = ((expected_ER > 0).sum(1) > 1).any()
    regime = Regime.COMPUTE_BOUND if (even and seed % 8 < 4) or spread else Regime.MEMORY_BOUND
    said = regime if seed % 8 < 4 else None
    record_gpu.record_split(split_ER, table_ER, *sizes[::-1], buffers.counted, said)
    held_ER = case.table_ER >= 0
    tokens_P = np.zeros(placement.num_physical, np.int64)
    tokens_P[case.table_ER[held_ER]] = expected_ER[held_ER]
    record_reference.add_batch(buffers.counters, tokens_P, placement.num_ranks, regime)
    assert (buffers.counted.numpy() == buffers.counters).all(), seed


def check_record(seed: int, case: Case) -> None:
    """Every third batch is counted in parallel, as large ones are."""
    record_gpu.BLOCK_PAIRS, record_gpu.FEW_BLOCKS = (16, 2) if seed % 3 == 0 else (1024, 4)
    placement, buffers = case.placement, Buffers(seed, case)
    rng = np.random.default_rng(seed)
    slots_TK = rng.integers(-1, placement.num_physical, case.topk_ids_TK.shape)
    regime = Regime(seed % 2)
    record_gpu.record(
        torch.from_numpy(slots_TK),
        placement.num_physical,
        placement.num_ranks,
        buffers.load,
        buffers.record_enabled,
        buffers.valid,
        buffers.counted,
        regime,
    )
    buffers.check(seed, slots_TK, regime)
    if buffers.load is not None and buffers.valid is None:
        before_P = buffers.load.clone()
        record_gpu.record_load(
            torch.from_numpy(slots_TK),
            placement.num_physical,
            buffers.load,
            buffers.record_enabled,
        )
        slots_N = slots_TK[(slots_TK >= 0) & bool(buffers.flag or not buffers.has_flag)]
        added_P = np.bincount(slots_N, minlength=len(before_P))
        assert (buffers.load.numpy() == before_P.numpy() + added_P).all(), seed


def check_assign(seed: int, case: Case) -> None:
    rng = np.random.default_rng(seed)
    buffers = Buffers(seed, case)
    num_experts, R = case.table_ER.shape
    split_ER = rng.integers(0, 6, (num_experts, R)).astype(np.int32)
    split_ER[(rng.random(split_ER.shape) < 0.4) | (case.table_ER < 0)] = 0
    offset_E = rng.integers(0, 6, num_experts) if seed % 2 else None
    expected_TK = assign_reference.assign(
        case.topk_ids_TK, split_ER, case.table_ER, offset_E, case.num_valid_tokens
    )
    out_TK = torch.full_like(buffers.ids_TK, POISON)
    assign_gpu.assign(
        buffers.ids_TK,
        torch.from_numpy(split_ER),
        case.placement.logical_to_physical_ER,
        None if offset_E is None else torch.from_numpy(offset_E),
        buffers.valid,
        out_TK,
    )
    assert (out_TK.numpy() == expected_TK).all(), seed


class BooleanMasks:
    """Triton's own interpreter module, with the masks of atomics made boolean: where a kernel
    combines masks as integers, the interpreter hands integers on and then refuses them."""

    def __init__(self, module) -> None:
        self.module = module

    def __getattr__(self, name: str):
        return getattr(self.module, name)

    def atomic_rmw(self, operation, pointers, values, mask, semantics):
        return self.module.atomic_rmw(operation, pointers, values, mask.astype(bool), semantics)


def vllm_hash_kernel() -> Callable:
    """vLLM's own ``_eplb_map_and_record_i32_kernel``, which vLLM defines on GPUs only, from the
    source of the installed vLLM."""
    from vllm.model_executor.layers.fused_moe.router import base_router

    name = "_eplb_map_and_record_i32_kernel"
    tree = ast.parse(inspect.getsource(base_router))
    found = [node for node in ast.walk(tree) if getattr(node, "name", "") == name]
    (node,) = found
    node.decorator_list = []
    source = ast.unparse(node)
    path = f"{sys.argv[4]}/vllm_kernel.py"
    Path(path).write_text(f"import triton.language as tl\n\n{source}\n")
    interpreter._interpreter = BooleanMasks(interpreter._interpreter)
    namespace: dict = {"tl": tl}
    exec(compile(Path(path).read_text(), path, "exec"), namespace)
    return triton.jit(namespace[name])


def check_eplb_hash(seed: int, case: Case, kernel: Callable) -> None:
    """Our definition of the EPLB mapping against vLLM's kernel itself."""
    placement, buffers = case.placement, Buffers(seed, case)
    ids_TK = torch.from_numpy(case.topk_ids_TK)
    if not ids_TK.numel():
        return
    out = torch.full((ids_TK.numel(),), POISON, dtype=torch.int32)
    load_P = torch.from_numpy(buffers.load_P[: placement.num_physical].copy())
    before_P = load_P.clone()
    kernel[(triton.cdiv(ids_TK.numel(), 256),)](
        ids_TK,
        placement.num_replicas_E,
        placement.logical_to_physical_ER,
        out,
        load_P,
        torch.tensor([1], dtype=torch.int32),
        torch.tensor([len(ids_TK) if case.num_valid_tokens is None else case.num_valid_tokens]),
        placement.num_logical,
        placement.logical_to_physical_ER.shape[1],
        placement.num_physical,
        ids_TK.numel(),
        ids_TK.shape[1],
        HAS_NUM_UNPADDED=True,
        BLOCK_SIZE=256,
    )
    expected_TK = hash_reference.map_to_physical(
        case.topk_ids_TK, case.table_ER, case.num_replicas_E
    )
    assert (out.numpy().reshape(ids_TK.shape) == expected_TK).all(), seed
    valid_TK = expected_TK[: case.num_valid_tokens]
    counts_P = np.bincount(valid_TK[valid_TK >= 0], minlength=placement.num_physical)
    assert (load_P.numpy() == before_P.numpy() + counts_P).all(), seed


def main() -> None:
    kernels, numbers, first = sys.argv[1].split(","), sys.argv[2].split(","), int(sys.argv[3])
    for kernel, number in zip(kernels, map(int, numbers), strict=True):
        compare(kernel, number, first)
        print(kernel, number)


def compare(kernel: str, number: int, first: int) -> None:
    if kernel == "eplb_hash":
        vllm_kernel = vllm_hash_kernel()
        for seed, case in cases(number, first):
            check_eplb_hash(seed, case, vllm_kernel)
    else:
        check = {
            "choose": check_choose,
            "route": check_route,
            "split": check_split,
            "record": check_record,
            "assign": check_assign,
        }[kernel]
        if kernel == "route":
            check_refusal()
        small = {"assign": number - number // 20, "route": number // 3}.get(kernel, 0)
        for seed, case in cases(small, first, **SMALL):
            check(seed, case)
        large = number // 20
        for seed, case in cases(large, first, max_experts=512, max_tokens=200):
            check(seed, case)
        for seed, case in cases(number - small - large, first):
            check(seed, case)


if __name__ == "__main__":
    main()
