"""What a profile is bound to: the processor and the kernel that vLLM chooses on it."""

from __future__ import annotations

import platform
from pathlib import Path

from vllm_balance.errors import BalancerError, unknown

DTYPES = {
    "half": "float16",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float": "float32",
    "float32": "float32",
}
"""vLLM's names for `--dtype` beside `auto`, and what torch calls each."""
_NAMES = ("auto", *DTYPES)
CPUINFO = Path("/proc/cpuinfo")


def served_dtype(asked: str, of_model: str) -> str:
    """What vLLM serves a model's weights in, as in `torch.bfloat16`.

    Args:
        asked: `auto`, which is the model's own except for float32, or a key of DTYPES.
        of_model: the dtype in its config.json.

    Raises:
        BalancerError: another name.
    """
    if asked in DTYPES:
        return DTYPES[asked]
    if asked != "auto":
        raise BalancerError(f"--dtype asks for {asked!r}. {unknown('dtype', asked, _NAMES)}")
    if of_model != "float32":
        return of_model
    from vllm.platforms import current_platform

    return str(current_platform.supported_dtypes[0]).removeprefix("torch.")


def unprofiled_device() -> str | None:
    """What this device is, if it is no x86 CPU: others cannot be profiled yet."""
    from vllm.platforms import CpuArchEnum, current_platform

    if not current_platform.is_cpu():
        return str(current_platform.get_device_name())
    is_x86 = current_platform.get_cpu_architecture() == CpuArchEnum.X86
    return None if is_x86 else f"a CPU of type {platform.machine()}"


def has_amx_kernel(dtype: str) -> bool:
    """Whether vLLM's CPU experts run on AMX here, which computes bfloat16 only."""
    import torch

    return dtype == "bfloat16" and torch.cpu._is_amx_tile_supported()


def kernel_isa(dtype: str) -> str:
    """Which of its CPU kernels vLLM chooses for unquantised experts here: amx or vec.

    Args:
        dtype: of the weights, as in `torch.bfloat16`.

    Raises:
        BalancerError: this is no x86 CPU; other devices are not profiled yet.
    """
    if (found := unprofiled_device()) is not None:
        raise BalancerError(
            f"`vllm-balance profile` measures vLLM's expert kernels on x86 CPUs only; this is "
            f"{found}. `vllm-balance place --model MODEL --speeds ...` places experts without a "
            f"profile."
        )
    return "amx" if has_amx_kernel(dtype) else "vec"


def processor() -> str | None:
    """This machine's processor, as Linux tells it of x86: brand and generation, as in "AMD EPYC
    (family 26, model 2)"; None if it does not.

    On virtual machines the brand is often that alone, and one generation of it may do products
    twice as fast as another with the same vector units.
    """
    fields = dict(
        (part.strip() for part in line.partition(":")[::2])
        for line in reversed(CPUINFO.read_text().splitlines())
    )
    if {"model name", "cpu family", "model"} <= fields.keys():
        return f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']})"
    return fields.get("model name")


def device_name(dtype: str) -> str:
    """Processor of this machine and kernel for experts of a dtype. Raises BalancerError as
    `kernel_isa` does."""
    return f"{processor() or 'unknown processor'}, {kernel_isa(dtype)}"
