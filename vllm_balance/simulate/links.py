"""What collective operations over a two-level network take, in microseconds."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_balance.errors import BalancerError
from vllm_balance.simulate.hardware import Hardware, Link


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Ranks in nodes of equal size; latencies are of whole operations."""

    ranks_per_node: int
    up: Link
    out: Link | None

    @classmethod
    def of(cls, hardware: Hardware, ranks_per_node: int | None = None) -> Network:
        """The network of a machine; larger nodes if `ranks_per_node` says so."""
        size = ranks_per_node or hardware.ranks_per_node.value
        return cls(ranks_per_node=size, up=hardware.scale_up, out=hardware.scale_out)

    def all_reduce_us(self, num_bytes: float, ranks: int) -> float:
        """Of `num_bytes` on every rank: a ring inside the node, then one between nodes."""
        if ranks == 1:
            return 0.0
        local, nodes = self._split(ranks)
        time = self._up_us(2 * (local - 1) / local * num_bytes)
        return time + self._out_us(2 * (nodes - 1) / nodes * num_bytes / local, nodes)

    def all_gather_us(self, num_bytes: float, ranks: int) -> float:
        """Until every rank has all `num_bytes`, of which each held an equal part."""
        if ranks == 1:
            return 0.0
        local, nodes = self._split(ranks)
        time = self._up_us((ranks - 1) / ranks * num_bytes)
        return time + self._out_us((nodes - 1) / nodes * num_bytes / local, nodes)

    def reduce_scatter_us(self, num_bytes: float, ranks: int) -> float:
        """The reverse of an all-gather: the same bytes on the same links."""
        return self.all_gather_us(num_bytes, ranks)

    def all_to_all_us(self, num_bytes: float, ranks: int) -> float:
        """If the busiest rank receives, or sends, `num_bytes`, evenly from, or to, all ranks."""
        if ranks == 1:
            return 0.0
        local, nodes = self._split(ranks)
        time = self._up_us((local - 1) / ranks * num_bytes)
        return time + self._out_us((ranks - local) / ranks * num_bytes, nodes)

    def _split(self, ranks: int) -> tuple[int, int]:
        local = min(ranks, self.ranks_per_node)
        if ranks % local:
            raise BalancerError(
                f"{ranks} ranks do not fill nodes of {self.ranks_per_node}; use a multiple."
            )
        return local, ranks // local

    def _up_us(self, num_bytes: float) -> float:
        return self.up.latency.value + num_bytes / self.up.bandwidth.per_us

    def _out_us(self, num_bytes: float, nodes: int) -> float:
        if nodes == 1:
            return 0.0
        if self.out is None:
            raise BalancerError(
                f"{nodes} nodes were asked for, and the hardware file describes no scale_out link. "
                f"Stay within {self.ranks_per_node} ranks or add the link."
            )
        return self.out.latency.value + num_bytes / self.out.bandwidth.per_us
