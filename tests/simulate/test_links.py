"""Collectives: closed forms, and never slower with more bandwidth."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_balance.errors import BalancerError
from vllm_balance.simulate.hardware import Link
from vllm_balance.simulate.links import Network
from vllm_balance.simulate.quantities import BytesPerSecond, Microseconds

OPERATIONS = ("all_reduce_us", "all_gather_us", "reduce_scatter_us", "all_to_all_us")


def link(latency_us, bytes_per_s):
    return Link(
        latency=Microseconds(value=latency_us, unit="us", source="test"),
        bandwidth=BytesPerSecond(value=bytes_per_s, unit="byte/s", source="test"),
    )


def network(up=1e9, out=1e8, size=4):
    """1 byte takes 1 ns inside a node, 10 ns between nodes."""
    return Network(ranks_per_node=size, up=link(5, up), out=None if out is None else link(40, out))


def test_inside_a_node():
    inside = network()
    assert inside.all_reduce_us(4000, 4) == pytest.approx(5 + 2 * 3 / 4 * 4)
    assert inside.all_gather_us(4000, 4) == pytest.approx(5 + 3 / 4 * 4)
    assert inside.reduce_scatter_us(4000, 2) == pytest.approx(5 + 1 / 2 * 4)
    assert inside.all_to_all_us(4000, 4) == pytest.approx(5 + 3 / 4 * 4)


def test_between_nodes():
    wide = network()
    assert wide.all_reduce_us(4000, 8) == pytest.approx(
        5 + 2 * 3 / 4 * 4 + 40 + 2 * 1 / 2 * 1000 / 100
    )
    assert wide.all_gather_us(8000, 8) == pytest.approx(5 + 7 / 8 * 8 + 40 + 1 / 2 * 8000 / 4 / 100)
    assert wide.all_to_all_us(8000, 8) == pytest.approx(5 + 3 / 8 * 8 + 40 + 4 / 8 * 8000 / 100)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_rank_sends_nothing(operation):
    assert getattr(network(), operation)(1e9, 1) == 0


def test_what_the_machine_does_not_have_is_refused():
    with pytest.raises(BalancerError, match="do not fill nodes of 4"):
        network().all_reduce_us(1, 6)
    with pytest.raises(BalancerError, match="no scale_out"):
        network(out=None).all_gather_us(1, 8)
    assert network(out=None).all_gather_us(0, 4) == 5


@given(
    st.sampled_from(OPERATIONS),
    st.floats(0, 1e9),
    st.sampled_from([1, 2, 4, 8, 32]),
    st.floats(1, 100),
    st.floats(1, 100),
)
def test_more_bandwidth_is_never_slower(operation, num_bytes, ranks, faster_up, faster_out):
    slow = getattr(network(), operation)(num_bytes, ranks)
    fast = getattr(network(1e9 * faster_up, 1e8 * faster_out), operation)(num_bytes, ranks)
    assert fast <= slow * (1 + 1e-12)
