"""One rank of a gloo group, of which rank 1 cannot get an expert; started by test_failing_rank.py.

    python gloo.py failing_rank.py WORLD_SIZE FOLDER

As in slot_ranks.py, with copies that end the process where one fails, as in vLLM's workers.
"""

import sys

import ranks
import slot_ranks
import vllm.logger  # noqa: F401  (once, before the ranks are forked)

from vllm_balance.experts.prefetch import Copy, Prefetch, RunCopy
from vllm_balance.seams.worker_end import for_executor

FAILING_RANK, FAILING_COPY = 1, 2


class Model(slot_ranks.Model):
    """One whose second copy fails on rank 1."""

    copies = 0

    def running(self, run: RunCopy, copies: str) -> Prefetch:
        return for_executor(super().running(run, copies), "mp")

    def copy(self, copy: Copy) -> None:
        self.copies += 1
        if self.rank == FAILING_RANK and self.copies == FAILING_COPY:
            raise OSError("page is gone")
        super().copy(copy)


def main() -> None:
    size, rank = int(sys.argv[1]), int(sys.argv[2])
    ranks.join(size, rank, sys.argv[3], timeout_s=1000)
    link = ranks.Communicator(rank, size)
    model = Model("harmoeny", "replicated", "async", rank, size, link)
    for of_layer in slot_ranks.sequence(size):
        for index, batches in enumerate(of_layer):
            model.run(index, batches, batches.name)
