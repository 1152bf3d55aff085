"""How a network is computed on a device. A rule decides, never a measurement: the same seed on the same kind of machine
gives the same weights, whatever else the machine is doing.
"""

import torch
from torch import Tensor

# The memory order of images and of convolutions: most devices compute these faster.
CHANNELS_LAST = torch.channels_last


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return "bf16" or "fp32" for "auto": bf16 where the device has units for it, since emulation is slower
    than fp32 (measured at half the speed on a processor with AVX-512 but without AVX512-BF16).
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return "bf16" if any(able.get(unit) for unit in ("avx512_bf16", "amx_bf16", "bf16")) else "fp32"
    return "fp32"


def autocast_options(precision: str, device: torch.device) -> dict[str, object]:
    """Return the arguments of `torch.autocast` for the precision "fp32", "bf16" or "auto"."""
    enabled = resolve_precision(precision, device) == "bf16"
    return {"device_type": device.type, "dtype": torch.bfloat16, "enabled": enabled}


def in_order(images: Tensor) -> Tensor:
    """Return (B, C, H, W) images in channels-last memory order; other tensors, such as features, as they are."""
    return images.contiguous(memory_format=CHANNELS_LAST) if images.ndim == 4 else images


def described(precision: str, device: torch.device) -> str:
    """Return, for people, how a network is computed on a device and why; `precision` is the study's setting."""
    used = resolve_precision(precision, device)
    kind = {"cpu": "this processor", "cuda": "this GPU"}.get(device.type, f"a device of type {device.type}")
    has = f"{kind} has {'' if resolve_precision('auto', device) == 'bf16' else 'no '}units for bf16"
    if device.type not in ("cpu", "cuda"):
        has = f"bf16 is not used on {kind}"
    why = has if precision == "auto" else f"the study says so ({has})"
    return f"{used}, channels last: {why}"
