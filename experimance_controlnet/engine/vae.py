"""Latents to pixels, with a guard: a frame that is not a number, or black, never leaves here.

Nothing waits for the device until somebody asks for the pixels: the frame is made, turned into
bytes, judged and copied to pinned memory of the host in one go.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import structlog
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch.func import functional_call

from experimance_controlnet.engine.graphs import ProgramCache, Recorder, ReplayedWork
from experimance_controlnet.engine.network.attention import fastest_attention
from experimance_controlnet.engine.network.decoder import VaeDecoder
from experimance_controlnet.engine.request import PixelImage
from experimance_controlnet.engine.tiling import decode_in_tiles, needs_tiles
from experimance_controlnet.errors import NanOutputError

log = structlog.get_logger()

_SIZES = 8
"""Sizes for which a recorded decoder is kept."""


class ImageDecoder:
    """Decodes one model's latents. The engine's thread only."""

    def __init__(self, vae: AutoencoderKL, network: VaeDecoder, recorder: Recorder) -> None:
        """``network`` evaluates ``vae``; the module itself is for the second try, in fp32."""
        self._vae = vae
        self._network = network
        self._recorder = recorder
        self._programs: ProgramCache[tuple[int, int, bool], _DecodeProgram] = ProgramCache(_SIZES)

    def decode(self, latents: torch.Tensor, *, tiled: bool = False) -> Frame:
        """Begin to decode one image; ``latents``: (1, 4, h, w) fp32, in the UNet's scale.

        ``tiled``: in tiles where it is larger than one, for want of memory.
        """
        height, width = latents.shape[-2:]
        tiled = tiled and needs_tiles(height, width)
        program = self._programs.get(
            (height, width, tiled),
            lambda: _DecodeProgram(self._vae, self._network, latents, self._recorder, tiled),
        )
        return Frame(program, latents)

    def clear(self) -> None:
        """Give the memory of recorded decoders back."""
        self._programs.clear()


class _DecodeProgram:
    """The decoder for one size. Its buffers stay where they are, so that it can be recorded."""

    def __init__(
        self,
        vae: AutoencoderKL,
        network: VaeDecoder,
        latents: torch.Tensor,
        recorder: Recorder,
        tiled: bool,
    ) -> None:
        self.vae = vae
        self.tiled = tiled
        self._network = network
        self.latents = torch.empty_like(latents)
        height, width = latents.shape[-2:]
        self.pixels = latents.new_empty((8 * height, 8 * width, 3), dtype=torch.uint8)
        self.usable = latents.new_empty((), dtype=torch.bool)
        self.run = ReplayedWork(self._decode, recorder)

    def _decode(self) -> None:
        latents = _unscale(self.vae, self.latents).to(self.vae.dtype)
        frame = _decode(self._network, latents, self.tiled)
        pixels, usable = _to_pixels(frame)
        self.pixels.copy_(pixels)
        self.usable.copy_(usable)


class Frame:
    """An image on its way from the device."""

    def __init__(self, program: _DecodeProgram, latents: torch.Tensor) -> None:
        """Begins the work; nothing waits for it yet."""
        self._vae = program.vae
        self._tiled = program.tiled
        self._latents = latents
        on_cuda = latents.is_cuda
        self._started_s = time.monotonic()
        self._start = _mark() if on_cuda else None
        program.latents.copy_(latents)
        with fastest_attention(latents.device):
            program.run()
        self._pixels = torch.empty(program.pixels.shape, dtype=torch.uint8, pin_memory=on_cuda)
        self._usable = torch.empty((), dtype=torch.bool, pin_memory=on_cuda)
        self._pixels.copy_(program.pixels, non_blocking=True)
        self._usable.copy_(program.usable, non_blocking=True)
        self._end = _mark() if on_cuda else None
        self._host_s = time.monotonic() - self._started_s

    def ready(self) -> bool:
        """Whether :meth:`result` returns at once, or nearly: a second try is still possible."""
        return self._end is None or self._end.query()

    def discard(self) -> None:
        """Wait for the device; nobody wants the picture."""
        if self._end is not None:
            self._end.synchronize()

    @property
    def decode_s(self) -> float:
        """What the first try took on the device; call it after :meth:`result`."""
        if self._start is None or self._end is None:
            return self._host_s
        milliseconds: float = self._start.elapsed_time(self._end)
        return milliseconds / 1000

    def result(self) -> tuple[PixelImage, list[str]]:
        """Wait for the pixels; also says what had to be done differently.

        Where the VAE's own precision gave no usable frame, it is decoded once more in fp32.

        Raises:
            NanOutputError: no usable frame in fp32 either.
        """
        if self._end is not None:
            self._end.synchronize()
        notes = ["vae_tiled"] if self._tiled else []
        if self._usable.item():
            return self._pixels.numpy(), notes
        if self._vae.dtype != torch.float32:
            log.warning("vae_decode_repeated", reason="frame black or not a number")
            frame = _decode_in_full(self._vae, self._latents, self._tiled)
            pixels, usable = _to_pixels(frame)
            if usable.item():
                return pixels.cpu().numpy(), [*notes, "vae_fp32"]
        raise NanOutputError(
            "The image came out black or not a number; try other settings, such as a lower cfg."
        )


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _unscale(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    config = vae.config
    latents = latents / config["scaling_factor"]
    if config["latents_mean"] is None or config["latents_std"] is None:
        return latents
    for channel, (mean, std) in enumerate(
        zip(config["latents_mean"], config["latents_std"], strict=True)
    ):
        latents[:, channel].mul_(std).add_(mean)
    return latents


@torch.inference_mode()
def _decode_in_full(vae: AutoencoderKL, latents: torch.Tensor, tiled: bool) -> torch.Tensor:
    """(1, 3, H, W), about -1..1, by diffusers' own modules in fp32. The live weights stay."""

    def decode(sample: torch.Tensor) -> torch.Tensor:
        if vae.post_quant_conv is not None:
            sample = _call_in_full(vae.post_quant_conv, sample)
        frame: torch.Tensor = _call_in_full(vae.decoder, sample)
        return frame

    return _decode(decode, _unscale(vae, latents), tiled)


def _decode(
    decode: Callable[[torch.Tensor], torch.Tensor], latents: torch.Tensor, tiled: bool
) -> torch.Tensor:
    return decode_in_tiles(decode, latents) if tiled else decode(latents)


def _call_in_full(module: torch.nn.Module, sample: torch.Tensor) -> Any:
    parameters = {name: tensor.float() for name, tensor in module.named_parameters()}
    return functional_call(module, parameters, (sample,))


def _to_pixels(frame: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(1, 3, H, W) in -1..1 to (H, W, 3) uint8, and whether that is a picture, a bool ().

    A dark picture has some pixel that is not 0; one without any is a failed decode.
    """
    levels = frame[0].float().mul(127.5).add(127.5).clamp(0, 255).round()
    pixels = levels.to(torch.uint8).permute(1, 2, 0).contiguous()
    return pixels, torch.isfinite(frame).all() & pixels.any()
