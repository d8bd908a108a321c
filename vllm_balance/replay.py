"""Routing from a seeded skew or a recorded trace instead of the model's router, for benchmarks.

vLLM routes by a registered strategy when VLLM_MOE_ROUTING_SIMULATION_STRATEGY names it: `register`
puts ours there, under STRATEGY. Outputs are then meaningless; shapes, costs and load are real.

Every layer has a table of sampled rows, [rows, top_k], each with distinct experts, made before the
first batch. A batch of T tokens takes the next T rows of its layer's table, and starts over at the
end, so routing costs one row look-up. Two processes that see the same batches in the same order
(the ranks of a tensor-parallel group) take the same rows, and nothing has to be sent.
"""

import torch

from vllm_balance.replay_rows import ReplaySettings, draw, name_experts

STRATEGY = "vllm_balance_replay"
_CALLS = "vllm_balance_replay_calls"


class Replay:
    """The tables of all layers and the position in each. See the module's first paragraph.

    rank: ranks with different numbers draw different tokens from the same distributions. Give the
    data-parallel rank where routers see local tokens, and 0 on every rank where they see the
    gathered batch or where ranks share their tokens (tensor parallelism).
    Raises ValueError if the settings do not fit a model of this shape, or the trace is unusable.
    """

    def __init__(
        self,
        settings: ReplaySettings,
        *,
        num_layers: int,
        num_experts: int,
        top_k: int,
        rank: int = 0,
    ) -> None:
        self.num_layers, self.num_experts, self.top_k = num_layers, num_experts, top_k
        self._settings = settings
        self._change_every = settings.change_every
        phases = settings.phases
        self._drawn_PLNK = torch.stack(
            [draw(phase, num_layers, num_experts, top_k, rank) for phase in phases]
        )
        self._rows_LNK = self._drawn_PLNK[0].clone()
        self._position_L = [0] * num_layers
        self._batches_L = [0] * num_layers
        if settings.trace is None:
            for layer in range(num_layers):
                self._name_experts(layer, phase=0)

    def rows(self, layer: int, num_tokens: int) -> torch.Tensor:
        """The next experts of `layer`: int32 [num_tokens, top_k], distinct within a row; a copy."""
        if self._change_every and self._batches_L[layer] % self._change_every == 0:
            self._name_experts(layer, phase=self._batches_L[layer] // self._change_every)
        self._batches_L[layer] += 1
        rows_NK = self._rows_LNK[layer]
        start, end = self._position_L[layer], self._position_L[layer] + num_tokens
        self._position_L[layer] = end % len(rows_NK)
        if end <= len(rows_NK):
            return rows_NK[start:end].clone()
        return rows_NK[torch.arange(start, end, device=rows_NK.device) % len(rows_NK)]

    def to(self, device: torch.device) -> None:
        """Move the tables to `device`."""
        self._drawn_PLNK = self._drawn_PLNK.to(device)
        self._rows_LNK = self._rows_LNK.to(device)

    def _name_experts(self, layer: int, phase: int) -> None:
        """Let other experts be the popular ones, and as popular; the same on every rank."""
        names_E = torch.from_numpy(name_experts(self._settings, self.num_experts, layer, phase))
        drawn_NK = self._drawn_PLNK[phase % len(self._drawn_PLNK), layer]
        self._rows_LNK[layer] = names_E.to(drawn_NK.device)[drawn_NK.long()]


def register(
    settings: ReplaySettings,
    *,
    num_layers: int,
    num_experts: int,
    top_k: int,
    rank: int = 0,
) -> Replay:
    """Make STRATEGY known to vLLM in this process, and return what it replays.

    num_layers counts MoE layers, in the order in which a forward pass calls them; num_experts and
    top_k are the logical ones. Raises ValueError as `Replay` does. Registering again replaces.

    vLLM does not tell a strategy its layer, so calls are counted within the forward pass, in its
    own ForwardContext: a pass that was cut short (profiling, an error) leaves nothing behind. On
    GPUs the model must run eagerly or with piecewise CUDA graphs that leave the MoE layers out: a
    captured graph repeats the rows of its capture.
    """
    from vllm.model_executor.layers.fused_moe.router.routing_simulator_router import (
        RoutingSimulator,
        RoutingStrategy,
    )

    replay = Replay(
        settings, num_layers=num_layers, num_experts=num_experts, top_k=top_k, rank=rank
    )

    class ReplayStrategy(RoutingStrategy):  # type: ignore[misc]
        def route_tokens(
            self,
            hidden_states: torch.Tensor,
            router_logits: torch.Tensor,
            top_k: int,
            indices_type: torch.dtype | None = None,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            layer = layer_of_forward_pass(num_layers)
            return route(replay, layer, router_logits, top_k, indices_type)

    RoutingSimulator.register_strategy(STRATEGY, ReplayStrategy())
    return replay


def route(
    replay: Replay,
    layer: int,
    router_logits: torch.Tensor,
    top_k: int,
    indices_type: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(topk_weights float32, all 1 / top_k; topk_ids of `indices_type`, by default int64).

    router_logits: [T, E], used for its shape and device only. Raises ValueError if E or top_k are
    not those of the replay.
    """
    num_tokens, num_experts = router_logits.shape
    if (num_experts, top_k) != (replay.num_experts, replay.top_k):
        raise ValueError(
            f"the router has {num_experts} experts and top-{top_k}, but the replay was registered "
            f"for {replay.num_experts} experts and top-{replay.top_k}"
        )
    replay.to(router_logits.device)
    ids_TK = replay.rows(layer, num_tokens).to(indices_type or torch.int64)
    weights_TK = torch.full(
        (num_tokens, top_k), 1.0 / top_k, dtype=torch.float32, device=router_logits.device
    )
    return weights_TK, ids_TK


def layer_of_forward_pass(num_layers: int) -> int:
    """How many times this was called before in this forward pass, modulo num_layers.

    Raises AssertionError (vLLM's) outside a forward pass.
    """
    from vllm.forward_context import get_forward_context

    calls = get_forward_context().additional_kwargs
    layer: int = calls.get(_CALLS, 0)
    calls[_CALLS] = layer + 1
    return layer % num_layers
