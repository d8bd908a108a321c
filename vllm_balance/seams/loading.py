"""Weights go to the slots of our placement while they are loaded, not by a shuffle afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from vllm_balance.errors import BalancerError
from vllm_balance.initial_placement import VLLMS_OWN, Array, InitialPlacement, tables
from vllm_balance.seams import Seam


class PlacedLoading:
    """Loads a model into the slots of a placement, and remembers what was put where."""

    def __init__(self, placement: InitialPlacement) -> None:
        self.placement = placement
        self._loaded: dict[tuple[str, int], Counter[tuple[str, str]]] = {}
        """Layer name and slot -> how often each part of an expert was put there."""
        self._is_vllms = placement.origin == VLLMS_OWN

    def load(self, original: Callable[..., Any], layer: Any, call: dict[str, Any]) -> bool:
        """Puts a logical expert's weight into every slot of this rank that is to hold it.

        vLLM asks once for each *physical* expert of its own initial placement, in which the
        first E are the logical ones in order; what it asks for beyond them is loaded already.

        Returns whether anything was loaded here.

        Raises:
            BalancerError: the weight is of several experts at once, or of a shared one, and the
                placement is not vLLM's own.
        """
        problem = _unlike_single_expert(layer, call)
        if problem is not None:
            if self._is_vllms:
                return bool(original(layer, **call, return_success=True))
            raise BalancerError(
                f"An initial placement of experts was asked for, and {layer.layer_name} cannot "
                f"take one: {problem}. {self.placement.remedy} for this model."
            )
        logical = call["expert_id"]
        if logical >= layer.moe_config.num_logical_experts:
            return False
        slots_P = self.placement.slots_P(layer_index(layer.layer_name))
        part = (str(call["weight_name"]).rpartition(".")[2], str(call["shard_id"]))
        done = False
        for slot in np.flatnonzero(slots_P == logical).tolist():
            if original(layer, **{**call, "expert_id": slot, "return_success": True}):
                done = True
                if is_local(layer, slot):
                    self._loaded.setdefault((layer.layer_name, slot), Counter())[part] += 1
        return done

    def place_state(self, model: Any, state: Any) -> None:
        """Writes the placement into the maps of vLLM's EPLB, in place; its own is there already."""
        if self._is_vllms:
            return
        for row, layer in enumerate(model.moe_layers):
            slots_P = self.placement.slots_P(layer_index(layer.layer_name))
            write_maps(state, row, slots_P, model.num_logical_experts)

    def problem(self, layers: Iterable[Any], load_format: str) -> str | None:
        """What did not arrive on this rank, or None: every slot has every part equally often."""
        for layer in layers:
            slots_P = self.placement.slots_P(layer_index(layer.layer_name))
            parts = {
                slot: self._loaded.get((layer.layer_name, slot), Counter())
                for slot in np.flatnonzero(slots_P >= 0).tolist()
                if is_local(layer, slot)
            }
            # Once, or twice where vLLM quantises while loading: then it measures each part first.
            whole: Counter[tuple[str, str]] = Counter()
            for found in parts.values():
                whole |= found
            # vLLM's own placement is left to loaders that go other ways.
            if not whole and (load_format == "dummy" or self._is_vllms):
                continue
            if not whole:
                return (
                    f"no weight of {layer.layer_name} went through vLLM's RoutedExperts, which "
                    f"puts experts in place (load format {load_format!r})"
                )
            for slot, found in parts.items():
                if found != whole:
                    return (
                        f"slot {slot} of {layer.layer_name}, which is to hold expert "
                        f"{slots_P[slot]}, got {_named(found)} instead of {_named(whole)}"
                    )
        return None


def write_maps(state: Any, row: int, slots_P: Array, num_experts: int) -> None:
    """Writes the placement of one layer into vLLM's EplbModelState, in place."""
    table_ER, num_replicas_E = tables(slots_P, num_experts)
    state.physical_to_logical_map[row].copy_(torch.from_numpy(slots_P))
    state.logical_to_physical_map[row].fill_(-1)
    width = table_ER.shape[1]
    state.logical_to_physical_map[row, :, :width].copy_(torch.from_numpy(table_ER))
    state.logical_replica_count[row].copy_(torch.from_numpy(num_replicas_E))


def layer_index(layer_name: str) -> int:
    """Index in the model of the layer with this name, as vLLM reads it."""
    from vllm.model_executor.models.utils import extract_layer_index

    return int(extract_layer_index(layer_name))


def is_local(layer: Any, slot: int) -> bool:
    """Whether this rank owns the slot."""
    return bool(layer._map_global_expert_id_to_local_expert_id(slot) >= 0)


def _named(parts: Counter[tuple[str, str]]) -> str:
    names = [f"{name} {shard} x{count}" for (name, shard), count in sorted(parts.items())]
    return ", ".join(names) or "nothing"


def _unlike_single_expert(layer: Any, call: dict[str, Any]) -> str | None:
    """Why a weight cannot be put into slots of our choice, or None."""
    quantised = layer.quant_config and layer.quant_config.get_name()
    if quantised == "gpt_oss_mxfp4" or call["loaded_weight"].dim() > 2:
        return "this checkpoint's experts are loaded all at once"
    if layer.expert_map_manager.num_fused_shared_experts:
        return "shared experts are fused into the routed ones"
    return None


_loading: PlacedLoading | None = None
"""What this process loads its model by; None without an initial placement."""


def load_by(loading: PlacedLoading | None) -> None:
    """Makes the models that are loaded from now on, in this process, follow a placement."""
    global _loading
    _loading = loading


def _weight_loader(original: Callable[..., Any]) -> Callable[..., Any]:
    def weight_loader(
        self: Any,
        param: Any,
        loaded_weight: Any,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        call = {
            "param": param,
            "loaded_weight": loaded_weight,
            "weight_name": weight_name,
            "shard_id": shard_id,
            "expert_id": expert_id,
        }
        if _loading is None:
            result: bool | None = original(self, **call, return_success=return_success)
            return result
        done = _loading.load(original, self, call)
        return done if return_success else None

    # vLLM marks the function; models ask for the mark before they load experts by it.
    vars(weight_loader).update(vars(original))
    return weight_loader


def _add_model(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_model(self: Any, model: Any, model_config: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, model, model_config, *args, **kwargs)
        if _loading is not None:
            _loading.place_state(model, self.model_states[model_config.compute_hash()])
        return result

    return add_model


LOADING_SEAMS = (
    Seam(
        target="vllm.model_executor.layers.fused_moe.routed_experts:RoutedExperts.weight_loader",
        parameters=("param", "loaded_weight", "weight_name", "shard_id", "expert_id"),
        wrap=_weight_loader,
        why="puts every expert's weights into the slots that the initial placement gives it",
        delete_when="vLLM takes an initial placement of experts as an argument",
    ),
    Seam(
        target="vllm.distributed.eplb.eplb_state:EplbState.add_model",
        parameters=("model", "model_config"),
        wrap=_add_model,
        why="tells vLLM's EPLB the same initial placement",
        delete_when="vLLM takes an initial placement of experts as an argument",
    ),
)
