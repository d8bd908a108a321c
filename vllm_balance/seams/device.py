"""What a profile is bound to: the processor and the kernel that vLLM chooses on it."""

from __future__ import annotations

from pathlib import Path

from vllm_balance.errors import BalancerError


def kernel_isa() -> str:
    """Which of its CPU kernels vLLM chooses for unquantised experts here: amx or vec.

    Raises:
        BalancerError: this is no x86 CPU; other devices are not profiled yet.
    """
    import torch
    from vllm.platforms import CpuArchEnum, current_platform

    if not current_platform.is_cpu() or current_platform.get_cpu_architecture() != CpuArchEnum.X86:
        raise BalancerError(
            f"`vllm-balance profile` measures vLLM's expert kernels on x86 CPUs; this is "
            f"{current_platform.get_device_name()}. Run it on the machine that serves."
        )
    return "amx" if torch.cpu._is_amx_tile_supported() else "vec"


def device_name() -> str:
    """Processor and kernel of this machine. Raises BalancerError as `kernel_isa` does."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'unknown processor'}, {kernel_isa()}"
