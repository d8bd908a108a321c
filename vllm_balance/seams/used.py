"""What is called of vLLM and not wrapped, where vLLM promises nothing. `vllm-balance doctor` checks
it as it checks the seams, so that an upgrade which changes it can be noticed beforehand. Attributes
that are read, and what functions return, nobody checks but a server that runs."""

from __future__ import annotations

from vllm_balance.seams import Place

_EPLB = "vllm.distributed.eplb"
_MOE = "vllm.model_executor.layers.fused_moe"
_MODEL_CONFIG = "vllm.config.model:ModelConfig"
_WORKER_METHODS: dict[str, tuple[str, ...]] = {
    "init_device": (),
    "load_model": ("load_dummy_weights",),
    "compile_or_warm_up_model": (),
    "execute_model": ("scheduler_output",),
    "execute_dummy_batch": (),
    "sample_tokens": ("grammar_output",),
    "reload_weights": (),
    "sleep": ("level",),
    "shutdown": (),
}
"""What the balancer's worker classes override and call, with the parameters relied on."""

USED = (
    Place(
        target=f"{_EPLB}.eplb_state:EplbState.__init__",
        parameters=("parallel_config", "device"),
        why="EPLB on CPU",
    ),
    Place(
        target="vllm.model_executor.models.interfaces:get_mixture_of_experts_model",
        parameters=("model",),
        why="EPLB on CPU",
    ),
    Place(
        target=f"{_EPLB}.policy.default:DefaultEplbPolicy.rebalance_experts",
        parameters=("weight", "num_replicas", "num_groups", "num_nodes", "num_ranks"),
        why="vLLM's placement, in `place` and `plan`",
    ),
    Place(
        target=f"{_EPLB}.policy.default:DefaultEplbPolicy.balanced_packing",
        parameters=("weight", "num_packs"),
        why="vLLM's placement with equal loads in a fixed order, in `plan`",
    ),
    Place(
        target=f"{_EPLB}.rebalance_execute:rearrange_expert_weights_inplace",
        parameters=(
            "old_global_expert_indices",
            "new_global_expert_indices",
            "expert_weights",
            "expert_buffer",
            "ep_group",
            "communicator",
        ),
        why="gem moves experts while serving",
    ),
    Place(
        target=f"{_MOE}.fused_moe:fused_experts",
        parameters=("hidden_states", "w1", "w2", "topk_weights", "topk_ids"),
        why="`profile` times it on GPUs",
    ),
    Place(
        target=f"{_MOE}.experts.triton_moe:TritonExperts.apply",
        parameters=("output", "topk_ids", "expert_map"),
        why="experts that are there are computed before fetched ones",
    ),
    Place(
        target=f"{_MOE}.prepare_finalize.no_dp_ep:MoEPrepareAndFinalizeNoDPEPModular.prepare",
        parameters=("topk_ids",),
        why="a dispatch that leaves all tokens to the experts",
    ),
    Place(
        target=f"{_MOE}.router.fused_topk_router:FusedTopKRouter._compute_routing",
        parameters=("hidden_states", "router_logits"),
        why="takes the largest logits, so that they can be guessed early",
    ),
    Place(
        target=f"{_MOE}.router.base_router:eplb_map_to_physical_and_record",
        parameters=(
            "topk_ids",
            "expert_load_view",
            "logical_to_physical_map",
            "logical_replica_count",
            "record_enabled",
            "num_unpadded_tokens",
        ),
        why="vLLM's even choice of replicas",
    ),
    Place(
        target=f"{_MOE}.routed_experts:RoutedExperts._map_global_expert_id_to_local_expert_id",
        parameters=("expert_id",),
        why="which slots a rank loads",
    ),
    Place(
        target="vllm.model_executor.models.utils:extract_layer_index",
        parameters=("layer_name",),
        why="a layer's row of a map",
    ),
    Place(
        target=f"{_MOE}.router.routing_simulator_router:RoutingSimulator.register_strategy",
        parameters=("name", "strategy"),
        why="replayed routing",
    ),
    Place(
        target=f"{_MOE}.router.routing_simulator_router:RoutingStrategy.route_tokens",
        parameters=("hidden_states", "router_logits", "top_k", "indices_type"),
        why="replayed routing",
    ),
    Place(
        target="vllm._custom_ops:cpu_fused_moe",
        parameters=("input", "w13", "w2", "topk_weights", "topk_ids", "act", "isa"),
        why="profiles of CPUs",
    ),
    Place(
        target="vllm._custom_ops:cpu_prepack_moe_weight",
        parameters=("weight", "isa"),
        why="profiles of CPUs",
    ),
    Place(
        target="vllm.config.utils:replace",
        parameters=("dataclass_instance",),
        why="EPLB's settings, checked by vLLM",
    ),
    Place(
        target="vllm.forward_context:get_forward_context",
        parameters=(),
        why="padding of a batch, the layer of a replay",
    ),
    Place(
        target="vllm.forward_context:DPMetadata.get_chunk_sizes_across_dp_rank",
        parameters=(),
        why="whose tokens a gathered batch holds",
    ),
    *(
        Place(
            target=f"vllm.v1.worker.gpu_worker:Worker.{name}",
            parameters=parameters,
            why="the balancer's workers, on CPU and GPU, do something before or behind it",
        )
        for name, parameters in _WORKER_METHODS.items()
    ),
    Place(
        target="vllm.distributed.parallel_state:get_ep_group",
        parameters=(),
        why="the ranks that balance, and what they tell each other",
    ),
    Place(
        target="vllm.distributed.parallel_state:GroupCoordinator.all_reduce",
        parameters=("input_",),
        why="counts, and rank 0's choice of experts",
    ),
    Place(
        target="vllm.distributed.parallel_state:GroupCoordinator.barrier",
        parameters=(),
        why="gem measures what a swap takes",
    ),
    Place(
        target="vllm.config.vllm:get_current_vllm_config",
        parameters=(),
        why="the settings, while a layer is built",
    ),
    Place(
        target=f"{_MODEL_CONFIG}.get_num_experts",
        parameters=(),
        why="experts of a layer",
    ),
    Place(
        target=f"{_MODEL_CONFIG}.get_num_experts_per_tok",
        parameters=(),
        why="limits of the GPU kernels, replayed routing",
    ),
    Place(
        target=f"{_MODEL_CONFIG}.compute_hash",
        parameters=(),
        why="by which EPLB names the model whose maps are written",
    ),
    Place(
        target=f"{_MOE}.runner.moe_runner:MoERunner.get_expert_weights",
        parameters=(),
        why="experts that are fetched",
    ),
    Place(
        target="vllm.v1.core.sched.output:CachedRequestData.is_context_phase",
        parameters=("req_id",),
        why="which requests of a recorded step decode",
    ),
    Place(
        target="vllm.v1.engine.core_client:AsyncMPClient.call_utility_all_async",
        parameters=("method",),
        why="GET /moe_balancer",
    ),
    Place(
        target="vllm.v1.engine.core:EngineCore.collective_rpc",
        parameters=("method", "timeout", "args", "kwargs"),
        why="GET /moe_balancer",
    ),
)
