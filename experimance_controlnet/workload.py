"""What a request costs: the arithmetic it needs, in units of one hundredth of the standard request.

The standard request is SDXL at 1024x1024, 6 steps with guidance, a depth map, no adapters, one
image: 97.8 TFLOP, 100 units. Server, PyWorker and benchmarks all speak in these units, so this
module is the standard library alone and runs on Python 3.10.

It knows neither what is cached (encoded prompts, adapters merged already) nor how fast a device
is: the figure is that of a request that finds nothing prepared, each prompt one chunk of 77
tokens, with the full-size architecture. One multiply-add counts as two FLOPs; normalisation,
activation and softmax are not counted, as in torch's ``FlopCounterMode``.

Every network's count is a polynomial in p, the latent pixels, exact for sides that are multiples
of 64 px; ``tests/unit/test_workload.py`` counts them again on the real modules.

- p^2: self-attention, 4 d n^2 a layer over n tokens of width d (scores, then weighted values).
  The UNet has 10 layers with n = p/4, d = 640 and 60 with n = p/16, d = 1280:
  10 * 4 * 640 / 16 + 60 * 4 * 1280 / 256 = 2800. The VAE's decoder has one with n = p, d = 512:
  4 * 512 = 2048. The small ControlNet has none.
- p: convolutions, projections, feed-forward, cross-attention to 77 tokens.
- constant: keys and values of the text, time and size embeddings.
"""

from __future__ import annotations

_ADAPTER_RANK = 32
_ADAPTER_PARAMETERS = 2_207_744_000  # the 722 linear layers of the UNet's transformer blocks


def workload(
    *,
    width: int,
    height: int,
    steps: int,
    cfg: float,
    depth: bool,
    num_images: int = 1,
    control_start: float = 0.0,
    control_end: float = 1.0,
    adapters: int = 0,
) -> float:
    """Units of a whole request, all its images included; the standard request is 100.

    The arguments are those of the wire contract within its limits, which are not checked here:
    ``width`` and ``height`` in pixels, ``depth`` whether a depth map is used (``control_start``
    and ``control_end`` are then the share of the steps in which ControlNet acts), ``adapters``
    how many LoRAs are merged.
    """
    rows = 2 if cfg > 1 else 1  # guidance evaluates the negative prompt beside the prompt
    control_steps = acting_steps(steps, control_start, control_end) if depth else 0
    image = (
        rows * steps * unet_flops(width, height)
        + rows * control_steps * controlnet_flops(width, height)
        + vae_decode_flops(width, height)
    )
    shared = rows * text_encode_flops() + adapters * adapter_merge_flops()
    return 100 * (num_images * image + shared) / STANDARD_FLOPS


def tflops(units: float) -> float:
    """Workload units as absolute arithmetic: 10^12 floating-point operations."""
    return units / 100 * STANDARD_FLOPS / 1e12


def acting_steps(steps: int, start: float, end: float) -> int:
    """In how many of the steps ControlNet acts, by the rule of diffusers' ControlNet pipelines."""
    return sum(not (i / steps < start or (i + 1) / steps > end) for i in range(steps))


def unet_flops(width: int, height: int) -> int:
    """One evaluation of SDXL's UNet for one row; pixels in, FLOPs out."""
    p = _latent_pixels(width, height)
    return 2800 * p * p + 363_591_680 * p + 52_531_036_160


def controlnet_flops(width: int, height: int) -> int:
    """One evaluation of ``controlnet-depth-sdxl-1.0-small`` for one row, depth embedding included.

    Pixels in, FLOPs out.
    """
    return 30_446_080 * _latent_pixels(width, height) + 29_327_360


def vae_decode_flops(width: int, height: int) -> int:
    """Latents of one image to pixels; pixels in, FLOPs out."""
    p = _latent_pixels(width, height)
    return 2048 * p * p + 605_507_616 * p


def text_encode_flops() -> int:
    """One prompt of up to 77 tokens through both text encoders, FLOPs."""
    return 13_298_503_680 + 97_863_106_560  # CLIP ViT-L/14 + OpenCLIP ViT-bigG/14


def adapter_merge_flops() -> int:
    """One LoRA of rank 32, the usual one, multiplied out for every layer it touches, FLOPs."""
    return 2 * _ADAPTER_RANK * _ADAPTER_PARAMETERS


def _latent_pixels(width: int, height: int) -> int:
    return (width // 8) * (height // 8)


STANDARD_FLOPS = (
    6 * 2 * (unet_flops(1024, 1024) + controlnet_flops(1024, 1024))
    + vae_decode_flops(1024, 1024)
    + 2 * text_encode_flops()
)
"""FLOPs of the standard request; kept whole, so that its workload is exactly 100."""
