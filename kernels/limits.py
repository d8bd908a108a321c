"""The largest layers and batches that the GPU kernels take.

One program holds a layer in registers without spilling. Here without Triton, for those who must
know it before anything runs on a GPU.
"""

MAX_EXPERTS = 512
"""Logical experts of a layer; METRO only."""
MAX_PHYSICAL = 1024
"""Physical experts of a layer."""
MAX_RANKS = 64
MAX_PAIRS = 2**20
"""(Token, choice) pairs that METRO maps at once."""
