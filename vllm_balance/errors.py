"""The one exception users see: what was asked, found and allowed, and what to do."""


class BalancerError(ValueError):
    """A request that vllm-balance refuses, raised before weights are loaded."""
