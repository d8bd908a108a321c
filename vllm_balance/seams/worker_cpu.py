"""vLLM's CPU worker with a balancer: expert parallelism and EPLB on CPU."""

from __future__ import annotations

import time
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_balance.experts.huge_pages import gather_into_huge_pages
from vllm_balance.seams import install
from vllm_balance.seams.cpu import CPU_SEAMS
from vllm_balance.seams.loading import LOADING_SEAMS
from vllm_balance.seams.router import ROUTER_SEAMS
from vllm_balance.seams.settings_files import require_profiled_cores
from vllm_balance.seams.without_eplb import without_eplb
from vllm_balance.seams.worker import BalancedWorker, explaining_eplb
from vllm_balance.seams.worker_end import own_signals

logger = init_logger(f"vllm.{__name__}")


class BalancedCPUWorker(BalancedWorker, CPUWorker):
    """A CPU rank whose MoE layers are balanced."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        self.read_settings(vllm_config)
        own_signals(vllm_config.parallel_config.distributed_executor_backend)
        install((*ROUTER_SEAMS, *LOADING_SEAMS, *CPU_SEAMS))
        super().__init__(vllm_config, *args, **kwargs)

    def init_device(self) -> None:
        # An idle data-parallel rank may run experts before any other AMX kernel has asked for it.
        if torch.cpu._is_amx_tile_supported():
            torch.cpu._init_amx()
        super().init_device()
        require_profiled_cores(self.balancer_config, torch.get_num_threads())

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        with explaining_eplb(self.balancer_config):
            super().load_model(load_dummy_weights=load_dummy_weights)
        if self.parallel_config.enable_eplb and self.model_runner.eplb_state is None:
            self._attach_eplb()
        model = self.model_runner.get_model()
        # Before it is measured how fast experts are copied and computed.
        huge_page_share = _use_huge_pages(model)
        self.bind(self.vllm_config, model)
        self.worker_balancer.huge_page_share = huge_page_share

    def _attach_eplb(self) -> None:
        """What GPUModelRunner.load_model does for EPLB and CPUModelRunner.load_model leaves out.

        Raises:
            BalancerError: vLLM does not support EPLB for the model.
        """
        from vllm.distributed.eplb.eplb_state import EplbState
        from vllm.model_executor.models.interfaces import get_mixture_of_experts_model

        runner = self.model_runner
        runner._moe_model = get_mixture_of_experts_model(runner.get_model())
        if runner._moe_model is None:
            model = type(runner.get_model()).__name__
            raise without_eplb(self.balancer_config.name, f"{model} does not support it")
        runner.eplb_state = EplbState(self.parallel_config, self.device)
        runner.eplb_state.add_model(runner._moe_model, runner.model_config)


def _use_huge_pages(model: torch.nn.Module) -> float:
    """Puts the weights of all experts into huge pages, which every balancer streams faster.

    Returns:
        The share of the weights that lies there.
    """
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    start = time.perf_counter()
    weights = [
        weight
        for module in model.modules()
        if isinstance(module, MoERunner)
        for weight in module.routed_experts.parameters()
    ]
    asked = sum(weight.nbytes for weight in weights)
    gathered = gather_into_huge_pages(weights)
    logger.info(
        "Put %.2f of %.2f GiB of expert weights into huge pages in %.1f s",
        gathered / 2**30,
        asked / 2**30,
        time.perf_counter() - start,
    )
    return gathered / asked
