"""How a network is computed on a device: its precision, and the order of its images in memory.

A fixed rule decides, not a measured speed. Therefore the same seed gives the same weights on every machine of
the same kind.
"""

import torch
from torch import Tensor


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return "bf16" or "fp32" for the precision of a study; "auto" is bf16 where the device has units for it.

    Without such units bf16 is emulated, which is slower than fp32 (half the speed on a processor with AVX-512 but
    without AVX512-BF16).
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return "bf16" if any(capabilities.get(unit) for unit in ("avx512_bf16", "amx_bf16", "bf16")) else "fp32"
    return "fp32"


def autocast_options(precision: str, device: torch.device) -> dict[str, object]:
    """Return the arguments of `torch.autocast` for the precision "fp32", "bf16" or "auto"."""
    enabled = resolve_precision(precision, device) == "bf16"
    return {"device_type": device.type, "dtype": torch.bfloat16, "enabled": enabled}


def in_order(images: Tensor) -> Tensor:
    """Return (B, C, H, W) images in channels-last memory order, in which most devices compute convolutions faster.

    Features (B, D) stay as they are.
    """
    return images.contiguous(memory_format=torch.channels_last) if images.ndim == 4 else images


def described(precision: str, device: torch.device) -> str:
    """Return a line that says how a network is computed on a device, and why; `precision` is the study's setting."""
    units = "units" if resolve_precision("auto", device) == "bf16" else "no units"
    kinds = {"cpu": f"this processor has {units} for bf16", "cuda": f"this GPU has {units} for bf16"}
    reason = kinds.get(device.type, f"bf16 is not used on a device of type {device.type}")
    reason = reason if precision == "auto" else f"the study says so ({reason})"
    return f"{resolve_precision(precision, device)}, channels last: {reason}"
