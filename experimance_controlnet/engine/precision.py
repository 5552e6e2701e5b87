"""In which precision a device evaluates a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from experimance_controlnet.engine.kernels import quantise
from experimance_controlnet.engine.network.fp8 import Fp8Products
from experimance_controlnet.engine.network.products import HalfProducts, Products
from experimance_controlnet.errors import SettingsError


@dataclass(frozen=True, slots=True)
class Precision:
    """What tensors are in, and what the widest products of the UNet are computed in."""

    name: str
    """As the metadata of a picture call it."""
    dtype: torch.dtype
    """Of weights and activations; the VAE's may differ."""
    make_products: Callable[[], Products]
    """For the UNet of one model."""
    copies_bytes: int = 0
    """What these products keep beside the weights of SDXL's UNet."""


FP32 = Precision("fp32", torch.float32, HalfProducts)
FP16 = Precision("fp16", torch.float16, HalfProducts)
FP8 = Precision("fp8", torch.float16, Fp8Products, copies_bytes=1_500_000_000)
EMULATED_FP8 = Precision("fp8", torch.float32, Fp8Products)
"""fp8's rounding on a device that has no fp8, for tests: slower than fp32, and no better."""


def choose_precision(wish: str, device: torch.device) -> Precision:
    """``auto`` is fp16 on CUDA, fp32 on a CPU. ``wish`` is ``auto``, ``fp16`` or ``fp8``.

    Raises:
        SettingsError: the device cannot do what is wished for.
    """
    if wish == "auto":
        return FP16 if device.type == "cuda" else FP32
    if device.type != "cuda":
        raise SettingsError(
            f"PRECISION (--precision): {wish} needs a CUDA device; a CPU computes in fp32, "
            "which is auto"
        )
    if wish == "fp16":
        return FP16
    if not quantise.is_supported(device):
        major, minor = torch.cuda.get_device_capability(device)
        raise SettingsError(
            "PRECISION (--precision): fp8 needs an NVIDIA GPU of compute capability 8.9 or later "
            f"(Ada, Hopper); {torch.cuda.get_device_name(device)} has {major}.{minor}: use fp16"
        )
    return FP8
