"""Balance the experts of expert-parallel MoE models served by stock vLLM."""

__version__ = "0.1.0"
