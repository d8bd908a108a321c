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
ACTIVATION_BYTES = 2
"""Per value of a hidden state: they travel in 16 bits."""


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
        tokens_N = self._own(steps.tokens_N)
        per_layer_N = self._product(model.attention_weights / tensor, tokens_N)
        windowed = 0 if model.window is None else model.window.layers.value
        total_N = per_layer_N * model.num_layers.value
        total_N += (model.num_layers.value - windowed) * self._scores(
            steps.attended_N, steps.reads_N
        )
        total_N += windowed * self._scores(steps.window_attended_N, steps.window_reads_N)
        reduce_us = self.network.all_reduce_us(0, tensor)
        slope = self.network.all_reduce_us(self._state_bytes, tensor) - reduce_us
        return np.asarray(total_N + model.num_layers.value * (reduce_us + slope * tokens_N))

    def rest_us(self, steps: Steps) -> Array:
        """Router, shared experts, dense feed-forward layers, norms, head and the step, [N]."""
        model, tensor, hidden = self.model, self.layout.tensor, self.model.hidden.value
        tokens_N = self._own(steps.tokens_N)
        router_N = self._product(hidden * model.num_experts.value, tokens_N)
        shared_N = self._product(hidden * model.shared_width / tensor, tokens_N)
        dense_N = self._product(hidden * model.dense_width / tensor, tokens_N)
        head_N = self._product(model.vocabulary.value * hidden / tensor, self._own(steps.sampled_N))
        total_N = model.num_moe_layers * (router_N + shared_N) + head_N
        total_N += model.num_dense_layers.value * dense_N
        fixed = self.hardware.fixed
        total_N += fixed.step.value + fixed.token.value * steps.sampled_N
        return np.asarray(total_N + model.num_layers.value * fixed.layer.value)

    @property
    def _state_bytes(self) -> int:
        return self.model.hidden.value * ACTIVATION_BYTES

    def _own(self, tokens_N: Array) -> Array:
        """Tokens of one data-parallel rank, which are taken to be equally many on each."""
        return np.ceil(tokens_N / self.layout.data)

    def _product(self, weights: float, tokens_N: Array) -> Array:
        """A matrix product: its weights streamed, or multiplied after what cannot be hidden."""
        share, number = self.hardware.efficiency, self.model.dense_number
        stream = weights * self.model.dense_weight.value
        stream /= self.hardware.memory_bandwidth.per_us * share.dense_streaming.value
        peak = self.hardware.peak(number).per_us * share.dense_compute.value
        compute_N = share.dense_exposed.value * stream + 2 * weights * tokens_N / peak
        return np.where(tokens_N > 0, np.maximum(stream, compute_N), 0.0)

    def _scores(self, attended_N: Array, reads_N: Array) -> Array:
        """Attention proper of one layer.

        attended_N: pairs of a query and a cached token; reads_N: cached tokens read from memory.
        """
        model, layout, share = self.model, self.layout, self.hardware.efficiency
        split = 1 if model.latent else min(layout.tensor, model.num_kv_heads.value)
        moved_N = reads_N / layout.data * model.cache_width * model.cache_element.value / split
        stream_N = moved_N / (self.hardware.memory_bandwidth.per_us * share.dense_streaming.value)
        heads = model.num_heads.value / layout.tensor
        flop_N = 2 * heads * model.attention_width * attended_N / layout.data
        number = "float16" if "float16" in self.hardware.compute else model.dense_number
        peak = self.hardware.peak(number).per_us * share.attention_compute.value
        return np.maximum(stream_N, flop_N / peak)
