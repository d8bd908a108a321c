"""What a profile is bound to: the processor or GPU and the kernel that vLLM chooses on it."""

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


def is_gpu() -> bool:
    """Whether experts run on GPUs here, by vLLM's Triton kernels."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cuda_alike())


def untested_device() -> str | None:
    """What this device is, if it is no x86 CPU: servers were run on those alone."""
    from vllm.platforms import CpuArchEnum, current_platform

    if not current_platform.is_cpu():
        return str(current_platform.get_device_name())
    is_x86 = current_platform.get_cpu_architecture() == CpuArchEnum.X86
    return None if is_x86 else f"a CPU of type {platform.machine()}"


def unprofiled_device() -> str | None:
    """What this device is, if it is neither an x86 CPU nor a GPU: others cannot be profiled."""
    return None if is_gpu() else untested_device()


def has_amx_kernel(dtype: str) -> bool:
    """Whether vLLM's CPU experts run on AMX here, which computes bfloat16 only."""
    import torch

    return dtype == "bfloat16" and torch.cpu._is_amx_tile_supported()


def kernel_isa(dtype: str) -> str:
    """Which of its CPU kernels vLLM chooses for unquantised experts here: amx or vec.

    Args:
        dtype: of the weights, as in `torch.bfloat16`.

    Raises:
        BalancerError: this is no x86 CPU.
    """
    if (found := untested_device()) is not None:
        raise BalancerError(
            f"`vllm-balance profile` measures vLLM's expert kernels on x86 CPUs and GPUs only; "
            f"this is {found}. `vllm-balance place --model MODEL --speeds ...` places experts "
            f"without a profile."
        )
    return "amx" if has_amx_kernel(dtype) else "vec"


def processor() -> str | None:
    """This machine's processor, as Linux tells it of x86: brand and generation, as in "AMD EPYC
    (family 26, model 2)"; None if it does not.

    On virtual machines the brand is often that alone, and one generation of it may do products
    twice as fast as another with the same vector units.
    """
    lines = reversed(CPUINFO.read_text().splitlines())
    parts = (line.partition(":") for line in lines)
    fields = {name.strip(): value.strip() for name, _, value in parts}
    if {"model name", "cpu family", "model"} <= fields.keys():
        return f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']})"
    return fields.get("model name")


def device_name(dtype: str) -> str:
    """Processor or GPU of this rank and kernel for experts of a dtype.

    Raises:
        BalancerError: neither an x86 CPU nor a GPU, as of `kernel_isa`.
    """
    if is_gpu():
        from vllm.platforms import current_platform

        return f"{current_platform.get_device_name()}, triton"
    return f"{processor() or 'unknown processor'}, {kernel_isa(dtype)}"
