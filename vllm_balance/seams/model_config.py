"""What vLLM's configuration says of the model that is served and of its ranks, in our terms."""

from __future__ import annotations

from typing import Any

from vllm_balance.model_shape import ModelShape, from_mapping, name_of


def num_ranks(vllm_config: Any) -> int:
    """Expert-parallel ranks of a ``VllmConfig``."""
    parallel = vllm_config.parallel_config
    return int(parallel.tensor_parallel_size * parallel.data_parallel_size)


def read_shape(model_config: Any) -> ModelShape:
    """The shape of the model in a ``ModelConfig``, as profiles and maps name it."""
    return from_mapping(
        model_config.hf_config.to_dict(),
        name=name_of(model_config.model),
        where=str(model_config.model),
    )
