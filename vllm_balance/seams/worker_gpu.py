"""vLLM's GPU worker with a balancer."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu_worker import Worker

from vllm_balance.seams import install
from vllm_balance.seams.gpu import GPU_SEAMS
from vllm_balance.seams.loading import LOADING_SEAMS
from vllm_balance.seams.router import ROUTER_SEAMS
from vllm_balance.seams.worker import BalancedWorker, explaining_eplb
from vllm_balance.seams.worker_end import own_signals


class BalancedGPUWorker(BalancedWorker, Worker):
    """A GPU rank whose MoE layers are balanced."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        self.read_settings(vllm_config)
        own_signals(vllm_config.parallel_config.distributed_executor_backend)
        install((*ROUTER_SEAMS, *LOADING_SEAMS, *GPU_SEAMS))
        super().__init__(vllm_config, *args, **kwargs)

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        with explaining_eplb(self.balancer_config):
            super().load_model(load_dummy_weights=load_dummy_weights)
        self.bind(self.vllm_config, self.model_runner.get_model())
