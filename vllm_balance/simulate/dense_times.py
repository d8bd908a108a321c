"""Time of everything but the routed experts: attention, shared experts, dense layers, the head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_balance.simulate.hardware import Hardware
from vllm_balance.simulate.layout import Layout
from vllm_balance.simulate.links import Network
from vllm_balance.simulate.models import Model
from vllm_balance.simulate.steps import Steps

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseTimes:
    """Rooflines of the parts whose work does not depend on routing; times of a whole step."""

    model: Model
    hardware: Hardware
    layout: Layout
    network: Network

    def attention_us(self, steps: Steps) -> Array:
        """Projections, cache and scores of all layers, and their all-reduce, [N]."""
        model, tensor = self.model, self.layout.tensor
        tokens_N = self._own(steps)
        whole = model.replicated_weights
        per_layer_N = self._product(whole + (model.attention_weights - whole) / tensor, tokens_N)
        windowed = 0 if model.window is None else model.window.layers.value
        total_N = per_layer_N * model.num_layers.value
        decode_N = steps.attended_N - steps.prompt_attended_N
        width, prompt_width = model.attention_width, model.prompt_attention_width
        far_N = self._scores(
            width * decode_N + prompt_width * steps.prompt_attended_N, steps.reads_N
        )
        near_N = self._scores(width * steps.window_attended_N, steps.window_reads_N)
        total_N += (model.num_layers.value - windowed) * far_N + windowed * near_N
        return np.asarray(total_N + model.num_layers.value * self._all_reduce(tokens_N))

    def rest_us(self, steps: Steps) -> Array:
        """Router, shared experts, dense feed-forward layers, norms and head, [N]."""
        model, tensor, hidden = self.model, self.layout.tensor, self.model.hidden.value
        tokens_N, sampled_N = self._own(steps), np.ceil(steps.sampled_N / self.layout.data)
        router_N = self._product(hidden * model.num_experts.value, tokens_N, narrow=False)
        shared_N = self._product(hidden * model.shared_width / tensor, tokens_N)
        dense_N = self._product(hidden * model.dense_width / tensor, tokens_N)
        dense_N += self._all_reduce(tokens_N)
        head_N = self._product(model.vocabulary.value * hidden / tensor, sampled_N, narrow=False)
        total_N = model.num_moe_layers * (router_N + shared_N) + head_N
        total_N += model.num_dense_layers.value * dense_N
        layer_N = self.hardware.fixed.layer.value + self._elementwise_us * steps.engine_prefill_N
        return np.asarray(total_N + model.num_layers.value * layer_N)

    def served_us(self, steps: Steps) -> Array:
        """What scheduler and API server take for a step and its answers, [N]."""
        fixed = self.hardware.fixed
        sampled_N = np.ceil(steps.sampled_N / self.layout.data)
        return np.asarray(fixed.step.value + fixed.token.value * sampled_N)

    @property
    def _elementwise_us(self) -> float:
        """Norms, residuals and rotary embedding of a prompt's token in one layer."""
        value_us = self.hardware.fixed.prompt_value
        width = self.model.elementwise_width(self.layout.tensor)
        return 0.0 if value_us is None else value_us.value * width

    def _own(self, steps: Steps) -> Array:
        """Tokens of the engine with most: an equal part of those that decode, and its prompts'."""
        return np.ceil(steps.decode_N / self.layout.data) + steps.engine_prefill_N

    def _all_reduce(self, tokens_N: Array) -> Array:
        """Over the tensor-parallel ranks, of the hidden states of so many tokens."""
        state = self.model.hidden.value * self.model.activation_bytes
        reduce_us = self.network.all_reduce_us(0, self.layout.tensor)
        slope = self.network.all_reduce_us(state, self.layout.tensor) - reduce_us
        return reduce_us + slope * tokens_N

    def _product(self, weights: float, tokens_N: Array, *, narrow: bool = True) -> Array:
        """A matrix product: its weights streamed, or multiplied after what cannot be hidden.

        narrow: in the format of the dense weights, which may have 8 bits.
        """
        share, model = self.hardware.efficiency, self.model
        stream = weights * (model.dense_weight if narrow else model.head_weight).value
        stream /= self.hardware.memory_bandwidth.per_us * share.dense_streaming.value
        number = model.dense_number if narrow else model.wide_number
        peak = self.hardware.peak(number).per_us * share.dense_compute.value
        compute_N = share.dense_exposed.value * stream + 2 * weights * tokens_N / peak
        return np.where(tokens_N > 0, np.maximum(stream, compute_N), 0.0)

    def _scores(self, multiplied_N: Array, reads_N: Array) -> Array:
        """Attention proper of one layer.

        multiplied_N: multiplications per head; reads_N: cached tokens read from memory.
        """
        model, layout, share = self.model, self.layout, self.hardware.efficiency
        split = 1 if model.latent else min(layout.tensor, model.num_kv_heads.value)
        moved_N = reads_N * model.cache_width * model.cache_element.value / split
        stream_N = moved_N / (self.hardware.memory_bandwidth.per_us * share.dense_streaming.value)
        flop_N = 2 * model.num_heads.value / layout.tensor * multiplied_N
        peak = self.hardware.peak(model.wide_number).per_us * share.attention_compute.value
        return np.maximum(stream_N, flop_N / peak)
