"""The part of our worker classes that does not depend on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

from vllm_balance.balancer import LayerBalancer, warm_up
from vllm_balance.config import BalancerConfig
from vllm_balance.errors import BalancerError
from vllm_balance.experts.local_pairs import PairBuffers
from vllm_balance.experts.prefetch import Prefetch
from vllm_balance.replay_rows import ReplaySettings
from vllm_balance.routing import FETCHING, make_policy
from vllm_balance.seams.agreement import (
    KneeAndFree,
    agreed_knee,
    ranks_are_alike,
    recording_of_all_ranks,
    verified_placement,
)
from vllm_balance.seams.deployment import settings_of
from vllm_balance.seams.layer_binding import attach, bind_layer
from vllm_balance.seams.loading import PlacedLoading, load_by
from vllm_balance.seams.online import move_to_map, online_placement
from vllm_balance.seams.recording import RecordingWorker
from vllm_balance.seams.settings_files import initial_placement, measured_costs
from vllm_balance.seams.slots import ModelSlots
from vllm_balance.seams.without_eplb import without_eplb
from vllm_balance.seams.worker_end import WATCHED, ends_process, for_executor
from vllm_balance.worker_balancer import WorkerBalancer


@contextmanager
def explaining_eplb(config: BalancerConfig) -> Iterator[None]:
    """Inside, what vLLM says against EPLB while it builds a model comes with what to do.

    Raises:
        BalancerError: vLLM's EPLB, which the balancer needs, cannot move this kind of weights.
    """
    try:
        yield
    except NotImplementedError as error:
        if not config.uses_eplb or "EPLB" not in str(error):
            raise
        said = str(error).rstrip(".")
        raise without_eplb(config.name, f"vLLM says: {said}") from error


class BalancedWorker(RecordingWorker):
    """Mixed in front of a vLLM worker class: binds the balancer to the model once it is loaded."""

    balancer_config: BalancerConfig
    worker_balancer: WorkerBalancer
    loading: PlacedLoading | None
    _replay_as: Callable[[ReplaySettings], None] | None = None
    """Routes by these settings from now on; None if the model's own router decides."""
    _runners: Sequence[Any] = ()
    """vLLM's MoE layers, in the order of those of `worker_balancer`."""
    _prefetch: Prefetch | None = None
    """Of a balancer that fetches."""
    _knee: KneeAndFree
    """The same on all ranks where it decides; there once the device is set up."""
    model_runner: Any
    vllm_config: Any
    model_config: Any
    parallel_config: Any
    rank: int
    """vLLM's, of the worker class that this is mixed into."""

    def read_settings(self, vllm_config: Any) -> None:
        """Takes the balancer's settings out of the config that reached this process."""
        config = settings_of(vllm_config)
        if config is None:
            raise BalancerError(
                f"{type(self).__name__} was asked for without settings of a MoE balancer. "
                f"Use --moe-balancer NAME instead of --worker-cls."
            )
        self.balancer_config = config
        placement = initial_placement(config, vllm_config)
        self.loading = None if placement is None else PlacedLoading(placement)
        load_by(self.loading)

    def init_device(self) -> None:
        """vLLM's, behind which ranks can talk: what they must agree on is known before loading."""
        super().init_device()  # type: ignore[misc]
        self._knee = agreed_knee(self.balancer_config, self.model_config.dtype)

    def bind(self, vllm_config: Any, model: torch.nn.Module) -> None:
        """Gives every MoE layer of the model its balancer.

        Raises:
            BalancerError: the model has no MoE layer that can be balanced, or the weights are
                not where the initial placement wants them.
        """
        from vllm.distributed import get_ep_group
        from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

        runners = [module for module in model.modules() if isinstance(module, MoERunner)]
        if not runners:
            raise BalancerError(
                f"--moe-balancer {self.balancer_config.name} found no MoE layer in "
                f"{type(model).__name__} that vLLM's MoERunner executes. This model cannot be "
                f"balanced; remove the flag."
            )
        self._runners = runners
        require_alike(runners)
        if self.balancer_config.replay is not None:
            self._replay_as = partial(_register_replay, vllm_config, runners)
            self._replay_as(self.balancer_config.replay)
        self.worker_balancer = WorkerBalancer(
            balancer=self.balancer_config.name,
            rank=get_ep_group().rank_in_group,
            placement=verified_placement(
                self.loading, str(vllm_config.load_config.load_format), runners
            ),
        )
        if self.balancer_config.fetches:
            self._bind_slots(vllm_config, runners)
        else:
            self._bind_layers(vllm_config, runners)
        self._tell_whether_ranks_are_alike()
        warm_up(self.worker_balancer.layers[0], top_k=runners[0].moe_config.experts_per_token)
        self.attach_recorder(
            vllm_config,
            runners,
            self.worker_balancer.layers,
            recording_of_all_ranks(self.balancer_config.record),
        )
        if self.balancer_config.online is not None:
            self.worker_balancer.online = online_placement(
                self.balancer_config,
                vllm_config,
                self.model_runner.eplb_state,
                self.worker_balancer.layers,
            )

    def compile_or_warm_up_model(self) -> Any:
        """vLLM's; what was routed up to its end was no request's."""
        times = super().compile_or_warm_up_model()
        self.worker_balancer.start_serving()
        return times

    def shutdown(self) -> None:
        """vLLM's, behind the end of what copies experts."""
        load_by(None)
        try:
            if self._prefetch is not None:
                self._prefetch.close()
        finally:
            super().shutdown()

    def _tell_whether_ranks_are_alike(self) -> None:
        """Tells the layers, if they ask: where CPU ranks choose experts for the same tokens."""
        layers = self.worker_balancer.layers
        if layers[0].way == "replicated" and layers[0].tables.counters.is_cpu:
            alike = ranks_are_alike()
            for layer in layers:
                layer.ranks_are_alike = alike

    def _bind_layers(self, vllm_config: Any, runners: list[Any]) -> None:
        """Gives the layers balancers whose experts stay where they are within a batch."""
        policy = make_policy(self.balancer_config.name, *self._knee)
        make, buffers = partial(LayerBalancer, policy=policy), PairBuffers()
        largest_graph = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        for runner in runners:
            layer = bind_layer(
                runner,
                make,
                self.balancer_config,
                buffers,
                self.loading,
                largest_graph=largest_graph,
            )
            self.worker_balancer.layers.append(layer)

    def _bind_slots(self, vllm_config: Any, runners: list[Any]) -> None:
        from vllm.distributed import get_ep_group

        config = self.balancer_config
        shared = ModelSlots(runners, config, get_ep_group())
        shared.prefetch = for_executor(
            shared.prefetch, vllm_config.parallel_config.distributed_executor_backend
        )
        self._prefetch = shared.prefetch
        knee_tokens, _ = self._knee
        rules = shared.rules(knee_tokens, measured_costs(config, vllm_config))
        policy = FETCHING[config.name](rules)
        layers, buffers = [], PairBuffers()
        for index, runner in enumerate(runners):
            make = partial(shared.maker(index), policy=policy)
            layers.append(bind_layer(runner, make, config, buffers, self.loading))
        shared.connect(layers, knee_tokens)
        self.worker_balancer.layers.extend(layers)

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        """vLLM's, where weights are still in the slots that they were loaded to.

        Raises:
            BalancerError: the balancer fetches experts, or moves them while serving; or the device
                is a CPU.
        """
        if self.balancer_config.moves:
            raise BalancerError(
                f"--moe-balancer {self.balancer_config.name} moves experts between slots while "
                f"serving, and vLLM reloads weights into the slots they had at first, so answers "
                f"would be wrong. Restart the server, or use a balancer that moves nothing."
            )
        if self.balancer_config.fetches:
            raise BalancerError(
                f"--moe-balancer {self.balancer_config.name} fetches experts from a host store "
                f"that is filled once, so weights cannot be reloaded. Restart the server."
            )
        if self.worker_balancer.layers[0].tables.counters.is_cpu:
            raise BalancerError(
                "vLLM packs experts for its CPU kernels when it loads them first, and puts "
                "reloaded weights there unpacked, with a balancer or without, so answers would be "
                "wrong. Restart the server."
            )
        super().reload_weights(*args, **kwargs)  # type: ignore[misc]
        self._attach_again()

    def finish_weight_update(self) -> None:
        """vLLM's, of weights that another process sent."""
        super().finish_weight_update()  # type: ignore[misc]
        self._attach_again()

    def _attach_again(self) -> None:
        for runner, layer in zip(self._runners, self.worker_balancer.layers, strict=True):
            attach(runner, layer)

    def sleep(self, level: int = 1) -> None:
        """vLLM's, where what it gives away can be had again.

        Raises:
            BalancerError: level 2 would lose the maps of vLLM's EPLB, which nothing restores.
        """
        if level > 1 and self.balancer_config.uses_eplb:
            raise BalancerError(
                f"--moe-balancer {self.balancer_config.name} needs the maps of vLLM's EPLB, which "
                f"sleep level {level} gives away with the weights. vLLM has paused the engine and "
                f"ended its requests before it asked: POST /wake_up lets it go on. Use level 1."
            )
        super().sleep(level)  # type: ignore[misc]

    def execute_model(self, scheduler_output: Any) -> Any:
        with self._fails_aloud():
            output = super().execute_model(scheduler_output)
            self.worker_balancer.after_step()
        return output

    def sample_tokens(self, grammar_output: Any) -> Any:
        """vLLM's, which on GPUs also rearranges experts."""
        with self._fails_aloud():
            return super().sample_tokens(grammar_output)  # type: ignore[misc]

    def execute_dummy_batch(self) -> None:
        with self._fails_aloud():
            super().execute_dummy_batch()
            self.worker_balancer.after_step()

    def _fails_aloud(self) -> AbstractContextManager[None]:
        """Ends the process if the inside fails on a rank whose exceptions vLLM does not report."""
        executor = self.parallel_config.distributed_executor_backend
        is_heard = self.rank == 0 or executor not in WATCHED
        return nullcontext() if is_heard else ends_process(Exception)

    def moe_balancer_status(self, per_layer: bool = False) -> dict[str, Any]:
        """What this rank's balancer did; for ``collective_rpc("moe_balancer_status")``."""
        status = self.worker_balancer.status(per_layer=per_layer)
        return {**status, "recording": self.moe_record_status()}

    def moe_balancer_reset(self) -> None:
        """Sets this rank's counters to zero; for ``collective_rpc("moe_balancer_reset")``."""
        self.worker_balancer.reset()

    def moe_balancer_map(self, file: str) -> dict[str, Any]:
        """Moves the experts to where a map has them; for ``collective_rpc("moe_balancer_map")``.

        What was moved, or under ``error`` the reason why nothing was.
        """
        return move_to_map(file, self.worker_balancer, self.balancer_config, self.vllm_config)

    def moe_balancer_replay(self, settings: dict[str, Any]) -> dict[str, str] | None:
        """Replays another skew from now on; for ``collective_rpc`` of benchmarks.

        None, or under ``error`` the reason: the server was started without `replay`, or the
        settings do not fit.
        """
        if self._replay_as is None:
            return {
                "error": "The routing is the model's own, so no other skew can be replayed. Start "
                "the server with `replay` in --moe-balancer-config."
            }
        try:
            self._replay_as(ReplaySettings.model_validate(settings))
        except ValueError as error:
            return {"error": f"`replay` cannot be changed: {error}."}
        return None


def require_alike(runners: Sequence[Any]) -> None:
    """Returns if all MoE layers have as many experts. Raises BalancerError if not."""
    counts = {runner.moe_config.num_experts for runner in runners}
    if len(counts) > 1:
        raise BalancerError(
            f"The MoE layers of this model have different numbers of slots "
            f"({', '.join(map(str, sorted(counts)))}), and --moe-balancer, its recordings and "
            f"maps take one number for all layers. Remove the flag for this model."
        )


def _register_replay(vllm_config: Any, runners: list[Any], settings: ReplaySettings) -> None:
    from vllm_balance import replay

    replay.register(
        settings,
        num_layers=len(runners),
        num_experts=vllm_config.model_config.get_num_experts(),
        top_k=runners[0].moe_config.experts_per_token,
        rank=vllm_config.parallel_config.data_parallel_rank,
    )
