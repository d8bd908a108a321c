"""Where experts live at load time, as the tables that layers and vLLM's EPLB read."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_balance.initial_placement import tables
from vllm_balance.types import Placement


@given(st.data(), st.integers(1, 9), st.integers(0, 12))
def test_the_slots_of_each_expert_in_order(data, num_experts, redundant):
    held = st.integers(-1, num_experts - 1)
    slots = [*range(num_experts), *(data.draw(held) for _ in range(redundant))]
    slots_P = np.array(data.draw(st.permutations(slots)), dtype=np.int32)
    table_ER, num_replicas_E = tables(slots_P, num_experts)
    slots_E = [np.flatnonzero(slots_P == expert).tolist() for expert in range(num_experts)]
    assert num_replicas_E.tolist() == [len(slots) for slots in slots_E]
    assert table_ER.shape == (num_experts, max(map(len, slots_E)))
    for row, slots in zip(table_ER.tolist(), slots_E, strict=True):
        assert row == slots + [-1] * (len(row) - len(slots))
    assert table_ER.dtype == num_replicas_E.dtype == np.int64


@given(st.permutations([0, 1, 2, 3, 3, 0]))
def test_the_same_tables_as_those_that_policies_read(slots):
    table_ER, num_replicas_E = tables(np.array(slots, dtype=np.int32), 4)
    made = Placement.from_physical_to_logical(torch.tensor(slots), num_logical=4, num_ranks=2)
    assert made.logical_to_physical_ER.tolist() == table_ER.tolist()
    assert made.num_replicas_E.tolist() == num_replicas_E.tolist()


def test_an_expert_without_a_slot_has_an_empty_row():
    table_ER, num_replicas_E = tables(np.array([2, -1, 0, 2], dtype=np.int32), 3)
    assert table_ER.tolist() == [[2, -1], [-1, -1], [0, 3]]
    assert num_replicas_E.tolist() == [1, 0, 2]
