"""Prediction of what a balancer does on machines that are not there. docs/simulator.md."""

from __future__ import annotations

from vllm_balance.simulate.layout import Layout
from vllm_balance.simulate.outcome import Outcome
from vllm_balance.simulate.run import Arm, simulate
from vllm_balance.simulate.steps import Load
from vllm_balance.simulate.traffic import Traffic, recorded, skewed

__all__ = ["Arm", "Layout", "Load", "Outcome", "Traffic", "recorded", "simulate", "skewed"]
