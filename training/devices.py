"""How a network is computed on a device: in which precision, and in which order in memory.

A rule decides, never a measurement: the same seed on the same kind of machine gives the same weights, whatever else the
machine is doing.
"""

import torch
from torch import Tensor

# The order in memory of images and of convolutions: most devices compute this one faster.
CHANNELS_LAST = torch.channels_last


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return "bf16" or "fp32" for the precision of a study. "auto" is bf16 where the device has units for it.

    Without units bf16 is emulated, which is slower than fp32 (at half the speed, measured on a processor with AVX-512
    but without AVX512-BF16).
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
    """Return (B, C, H, W) images in channels-last memory order; other tensors, such as features, as they are."""
    return images.contiguous(memory_format=CHANNELS_LAST) if images.ndim == 4 else images


def described(precision: str, device: torch.device) -> str:
    """Return a line that says how a network is computed on a device, and why. `precision` is the study's setting."""
    used = resolve_precision(precision, device)
    kind = {"cpu": "this processor", "cuda": "this GPU"}.get(device.type, f"a device of type {device.type}")
    if device.type in ("cpu", "cuda"):
        units = "units" if resolve_precision("auto", device) == "bf16" else "no units"
        reason = f"{kind} has {units} for bf16"
    else:
        reason = f"bf16 is not used on {kind}"
    reason = reason if precision == "auto" else f"the study says so ({reason})"
    return f"{used}, channels last: {reason}"
