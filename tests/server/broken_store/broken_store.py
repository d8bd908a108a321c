"""For vLLM's --worker-extension-cls: a worker whose host store can be broken while it serves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm.distributed import get_ep_group

from vllm_balance.experts.host_store import HostStore


class BreaksStore:
    """Mixed into the worker class."""

    def break_store(self, rank: int, when: str) -> None:
        """This rank cannot get an expert as soon as there is a file `when`; for ``collective_rpc``.

        Not at once: engines take a call one after the other, and the broken one may end before the
        other has answered.
        """
        if get_ep_group().rank_in_group == rank:
            HostStore.read = _read_until(Path(when), HostStore.read)


def _read_until(broken: Path, read: Callable[..., Any]) -> Callable[..., Any]:
    def read_or_fail(self: HostStore, *of_expert: Any) -> Any:
        if broken.exists():
            raise OSError("page is gone")
        return read(self, *of_expert)

    return read_or_fail
