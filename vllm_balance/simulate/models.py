"""The model file: numbers of a config.json, and what follows from them."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from vllm_balance.documents import Document
from vllm_balance.simulate import catalogue
from vllm_balance.simulate.hardware import Number
from vllm_balance.simulate.quantities import BytesPerWeight, Count, Sourced


class Latent(Document):
    """Multi-head latent attention (DeepSeek): low ranks of queries and of the cache."""

    query_rank: Count
    cache_rank: Count
    rotary_dim: Count
    content_dim: Count
    """Per head, of queries and keys without the rotary part."""
    value_dim: Count


class Window(Document):
    """Some layers look back only so many tokens."""

    tokens: Count
    layers: Count


Support = Literal["eplb", "no eplb", "no map", "no model"]
"""What vLLM does with an architecture: all; no EPLB, so no redundant or moving experts; no EPLB and
no maps, as all experts are loaded at once; nothing."""


class Model(Sourced):
    """One model. Weights are counted, biases and norms left out."""

    kind: Literal["vllm-balance model"]
    format: Literal[1]
    architecture: str = Field(min_length=1)
    """As config.json and vLLM name it."""
    support: Support
    """By vLLM 0.32: its EPLB, which redundant and moving experts need; the model without that; or
    nothing."""
    num_layers: Count
    num_dense_layers: Count
    """Layers whose feed-forward part is one dense network."""
    num_experts: Count
    num_groups: Count | None = None
    """Of experts (n_group in config.json), which vLLM's EPLB keeps together on nodes; None: one."""
    top_k: Count
    hidden: Count
    inner: Count
    """Of one expert."""
    expert_matrices: Count
    """3 with a gate, 2 without; of a shared expert and a dense network too."""
    shared_inner: Count
    """Inner size of the shared experts together; 0: none."""
    dense_inner: Count
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    vocabulary: Count
    latent: Latent | None = None
    window: Window | None = None
    expert_weight: BytesPerWeight
    dense_weight: BytesPerWeight
    head_weight: BytesPerWeight
    """Of embedding, head and router, which vLLM leaves in 16 bits where the others have 8."""
    cache_element: BytesPerWeight
    expert_number: Number
    dense_number: Number

    @model_validator(mode="after")
    def _plausible(self) -> Self:
        if not 1 <= self.top_k.value <= self.num_experts.value:
            raise ValueError("top_k must be between 1 and num_experts")
        if self.num_dense_layers.value >= self.num_layers.value:
            raise ValueError("at least one layer must have experts")
        sizes = ("hidden", "inner", "expert_matrices", "num_heads", "num_kv_heads", "head_dim")
        for name in (*sizes, "vocabulary"):
            if getattr(self, name).value < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.window is not None and self.window.layers.value > self.num_layers.value:
            raise ValueError("window.layers must be at most num_layers")
        if self.latent is not None and min(size.value for _, size in self.latent) < 1:
            raise ValueError("the sizes of latent attention must be at least 1")
        if self.num_groups is not None and (
            self.num_groups.value < 1 or self.num_experts.value % self.num_groups.value
        ):
            raise ValueError("num_experts must divide into num_groups")
        return self

    def with_counts(self, **values: int) -> Model:
        """The model with other whole numbers, e.g. the few layers that a CPU serves."""
        counts = {
            name: self.num_layers.model_copy(update={"value": value})
            for name, value in values.items()
        }
        return self.model_copy(update=counts)

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers.value - self.num_dense_layers.value

    @property
    def expert_weights(self) -> int:
        """Weights of one expert."""
        return self.expert_matrices.value * self.hidden.value * self.inner.value

    @property
    def expert_bytes(self) -> float:
        """Bytes of one expert in memory."""
        return self.expert_weights * self.expert_weight.value

    @property
    def attention_weights(self) -> int:
        """Weights of one layer's projections."""
        hidden, heads = self.hidden.value, self.num_heads.value
        if self.latent is None:
            width = self.head_dim.value
            return hidden * width * (2 * heads + 2 * self.num_kv_heads.value)
        part = self.latent
        query = part.query_rank.value * (
            hidden + heads * (part.content_dim.value + part.rotary_dim.value)
        )
        cache = hidden * (part.cache_rank.value + part.rotary_dim.value)
        unpacked = part.cache_rank.value * heads * (part.content_dim.value + part.value_dim.value)
        return query + cache + unpacked + heads * part.value_dim.value * hidden

    @property
    def replicated_weights(self) -> int:
        """Those of them that every tensor-parallel rank has whole: down to the ranks of queries and
        of the cache."""
        if self.latent is None:
            return 0
        part = self.latent
        ranks = part.query_rank.value + part.cache_rank.value + part.rotary_dim.value
        return self.hidden.value * ranks

    def elementwise_width(self, tensor: int) -> float:
        """Values of one token that a layer's norms, residuals and rotary embedding go over on one
        of the tensor-parallel ranks: hidden states twice, queries and keys."""
        heads = self.num_heads.value + self.num_kv_heads.value
        return 2 * self.hidden.value + heads * self.head_dim.value / tensor

    @property
    def cache_width(self) -> int:
        """Cached elements of one token in one layer."""
        if self.latent is None:
            return 2 * self.num_kv_heads.value * self.head_dim.value
        return self.latent.cache_rank.value + self.latent.rotary_dim.value

    @property
    def attention_width(self) -> int:
        """Multiplications of one head for one pair of a decoding token and a cached one: query by
        key, weight by value. Latent attention decodes in the cache's rank."""
        if self.latent is None:
            return 2 * self.head_dim.value
        return 2 * self.latent.cache_rank.value + self.latent.rotary_dim.value

    @property
    def prompt_attention_width(self) -> int:
        """The same for a prompt's token, for which vLLM unpacks latent keys and values."""
        if self.latent is None:
            return self.attention_width
        part = self.latent
        return part.content_dim.value + part.rotary_dim.value + part.value_dim.value

    @property
    def wide_number(self) -> Number:
        """Format of what is not quantised: attention, router and head."""
        return "float16" if self.dense_number == "float8" else self.dense_number

    @property
    def activation_bytes(self) -> int:
        """Per value of a hidden state, which is not quantised between layers."""
        return 4 if self.wide_number == "float32" else 2

    def cache_bytes(self, tokens: int) -> float:
        """Of a request in all layers; those with a window keep no more of it."""
        kept = self.num_layers.value * tokens
        if self.window is not None:
            kept -= self.window.layers.value * max(0, tokens - self.window.tokens.value)
        return kept * self.cache_width * self.cache_element.value

    @property
    def weight_bytes(self) -> float:
        """Of the whole model, one copy of every expert."""
        experts = self.num_moe_layers * self.num_experts.value * self.expert_bytes
        return experts + self.dense_bytes

    @property
    def dense_bytes(self) -> float:
        """Of everything but the routed experts."""
        hidden = self.hidden.value
        weights = self.num_layers.value * self.attention_weights
        weights += self.num_moe_layers * hidden * self.shared_width
        weights += self.num_dense_layers.value * hidden * self.dense_width
        wide = self.num_moe_layers * self.num_experts.value + 2 * self.vocabulary.value
        return weights * self.dense_weight.value + wide * hidden * self.head_weight.value

    @property
    def shared_width(self) -> int:
        """Weights of the shared experts, per hidden element."""
        return self.expert_matrices.value * self.shared_inner.value

    @property
    def dense_width(self) -> int:
        """Weights of a dense network, per hidden element."""
        return self.expert_matrices.value * self.dense_inner.value


def load(name: str) -> Model:
    """A model file by name or path. Raises BalancerError if it is missing or malformed."""
    return catalogue.find("model", name, Model)[0]
