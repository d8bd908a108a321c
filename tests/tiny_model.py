"""A tiny MoE model, as much of it as commands read."""

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_hidden_layers": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_size": 128,
    "moe_intermediate_size": 64,
}
