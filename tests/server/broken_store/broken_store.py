"""For vLLM's --worker-extension-cls: a worker whose host store can be broken while it serves."""

from typing import Any, NoReturn

from vllm.distributed import get_ep_group

from vllm_balance.experts.host_store import HostStore


class BreaksStore:
    """Mixed into the worker class."""

    def break_store(self, rank: int) -> None:
        """From now on this rank cannot get an expert; for ``collective_rpc``."""
        if get_ep_group().rank_in_group == rank:
            HostStore.read = _fails


def _fails(self: HostStore, *of_expert: Any) -> NoReturn:
    raise OSError("page is gone")
