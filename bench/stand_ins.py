"""Files that stand in, on another model, for a map and a profile that were made for one model."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from vllm_balance.cost import CostModel, Fit
from vllm_balance.maps import LayerMap, PlacementMap
from vllm_balance.model_shape import ModelShape, from_config
from vllm_balance.profiles import Curve, Point, Profile, RankProfile, Units
from vllm_balance.seams.device import device_name
from vllm_balance.seams.versions import kernel_versions


def shuffled_map(shape: ModelShape, num_redundant: int, num_ranks: int = 2) -> PlacementMap:
    """A map that puts every expert of every layer somewhere at random; the same in every call."""
    random = np.random.default_rng(7)
    every = np.arange(shape.num_experts)
    layers = [
        np.concatenate([every, random.choice(every, num_redundant, replace=False)])
        for _ in range(shape.num_layers)
    ]
    return PlacementMap(
        created=datetime.now(UTC),
        policy="gem",
        sources={},
        shape=shape,
        num_ranks=num_ranks,
        layers=[
            LayerMap(index=index, physical_to_logical=random.permutation(slots_P).tolist())
            for index, slots_P in enumerate(layers)
        ],
    ).sealed()


def made_up_profile(model: Path) -> Profile:
    """As if measured in float32; what counts is that it is accepted."""
    cost = CostModel(a_us=10.0, b_us=1.0, c_us=5.0, beta_us=1.0)
    fit = Fit(model=cost, residual_us_N=(0.0,), r2=1.0, median_relative_error=0.0)
    return Profile(
        units=Units(),
        created=datetime.now(UTC),
        device=device_name("float32"),
        versions=kernel_versions(),
        shape=from_config(model).model_copy(update={"dtype": "float32"}),
        ranks=[
            RankProfile(
                rank=0,
                place="core 0",
                curve=Curve.of(fit),
                points=[Point(tokens_E=[1], time_us=11.0, repeats=1)],
            )
        ],
    )
