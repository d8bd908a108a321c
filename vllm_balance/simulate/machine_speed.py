"""How fast a machine is at one time, against its profile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class MachineSpeed:
    """How many times longer experts take than in the profile while all ranks compute them, by their
    tokens: what else runs on a machine takes memory from it, and cores.

    Experts with few tokens wait for memory. What the cores take longer for, a rank does also alone;
    what memory adds to it, only while the others read too.
    """

    tokens_K: tuple[int, ...]
    """Rising."""
    longer_K: tuple[float, ...]
    """With so many tokens each; straight in their logarithm between."""

    def at(self, tokens_N: Array) -> Array:
        """Of experts, or products, with so many tokens, [N]."""
        known_K = np.log(np.array(self.tokens_K))
        return np.interp(np.log(np.maximum(tokens_N, 1)), known_K, self.longer_K)

    @property
    def memory(self) -> float:
        """Of what multiplies next to nothing and comes with every step, as copies and schedulers:
        as experts with fewest tokens."""
        return self.longer_K[0]

    @property
    def cores(self) -> float:
        """Of what fits in caches and waits for a core, as the handling of a request: as experts
        with most tokens."""
        return self.longer_K[-1]

    def crowding(self, tokens_N: Array) -> Array:
        """The part that memory has in it, at least 1, [N]: what experts with many tokens do not
        have, which wait for cores alone."""
        return np.maximum(self.at(tokens_N) / self.cores, 1.0)


AS_PROFILED = MachineSpeed((1,), (1.0,))
