"""The one exception users see: what was asked, found and allowed, and what to do.

Raised before weights are loaded, but where only they can tell (a rank's weights did not arrive), or
while serving a fetch fails.
"""


class BalancerError(ValueError):
    """What vllm-balance refuses."""
