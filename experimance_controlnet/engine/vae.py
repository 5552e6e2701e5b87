"""Latents to pixels, with a guard: a frame that is not a number, or black, never leaves here."""

from __future__ import annotations

from typing import Any

import structlog
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch.func import functional_call

from experimance_controlnet.engine.request import PixelImage
from experimance_controlnet.errors import NanOutputError

log = structlog.get_logger()


def decode(vae: AutoencoderKL, latents: torch.Tensor) -> tuple[PixelImage, list[str]]:
    """Decode one image; also says what had to be done differently.

    ``latents``: (1, 4, h, w) fp32, in the UNet's scale. Where the VAE's own precision gives no
    usable frame, once more in fp32.

    Raises:
        NanOutputError: no usable frame in fp32 either.
    """
    latents = _unscale(vae, latents)
    pixels = _to_pixels(_decode_in(vae, latents, vae.dtype))
    if pixels is not None:
        return pixels, []
    if vae.dtype != torch.float32:
        log.warning("vae_decode_repeated", reason="frame black or not a number")
        pixels = _to_pixels(_decode_in(vae, latents, torch.float32))
        if pixels is not None:
            return pixels, ["vae_fp32"]
    raise NanOutputError(
        "The image came out black or not a number; try other settings, such as a lower cfg."
    )


def _unscale(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    config = vae.config
    latents = latents / config["scaling_factor"]
    if config["latents_mean"] is None or config["latents_std"] is None:
        return latents
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=latents.device).view(1, -1, 1, 1)
        for values in (config["latents_mean"], config["latents_std"])
    )
    return latents * std + mean


def _decode_in(vae: AutoencoderKL, latents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(1, 3, H, W), about -1..1. The live weights stay as they are, whatever the precision."""
    sample = latents.to(dtype)
    if vae.post_quant_conv is not None:
        sample = _call_in(vae.post_quant_conv, sample, dtype)
    frame: torch.Tensor = _call_in(vae.decoder, sample, dtype)
    return frame


def _call_in(module: torch.nn.Module, sample: torch.Tensor, dtype: torch.dtype) -> Any:
    if next(module.parameters()).dtype == dtype:
        return module(sample)
    parameters = {name: tensor.to(dtype) for name, tensor in module.named_parameters()}
    return functional_call(module, parameters, (sample,))


def _to_pixels(frame: torch.Tensor) -> PixelImage | None:
    """(1, 3, H, W) in -1..1 to (H, W, 3) uint8; None where the frame is unusable.

    A dark picture has some pixel that is not 0; one without any is a failed decode.
    """
    if not torch.isfinite(frame).all():
        return None
    levels = frame[0].float().mul(127.5).add(127.5).clamp(0, 255).round().to(torch.uint8)
    pixels: PixelImage = levels.permute(1, 2, 0).contiguous().cpu().numpy()
    return pixels if pixels.any() else None
