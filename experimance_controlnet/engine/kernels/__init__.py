"""The arithmetic between matrix products and convolutions, fused.

Every function here exists twice with the same signature: in plain torch (``reference.py``), which
says what it means and runs anywhere, and in Triton (``fused/``), which reads and writes memory as
rarely as it can. The device of the first tensor decides; a CUDA device without Triton takes the
reference. Kernels know nothing of models. ``merge.py`` and the plans of ``quantise.py``, whose work
is prepared once and run often, hold their own references.

Shapes: images are (B, C, H, W) in channels_last, so their memory is (B, H, W, C) and a view as
tokens (B, H x W, C) costs nothing. Sums are taken in fp32 whatever the tensors' precision.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch

from experimance_controlnet.engine.kernels import reference
from experimance_controlnet.engine.kernels.quantise import Quantised


def group_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    *,
    silu: bool = False,
    shift: torch.Tensor | None = None,
) -> torch.Tensor:
    """``act(GroupNorm(x + shift))``, Wu & He 2018; act is SiLU or nothing.

    ``x`` (B, C, H, W) channels_last; ``weight``, ``bias`` (C,); ``shift`` (B, C) or (C,): a bias
    that the convolution before left out, or a time embedding. Same shape, dtype and layout as x.
    """
    normed: torch.Tensor = _backend(x).group_norm(
        x, weight, bias, groups, eps, silu=silu, shift=shift
    )
    return normed


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """LayerNorm over the last dimension, Ba et al. 2016; ``x`` (M, C) contiguous."""
    normed: torch.Tensor = _backend(x).layer_norm(x, weight, bias, eps)
    return normed


def add_layer_norm(
    x: torch.Tensor, update: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum ``x + update`` and its LayerNorm; all (M, C) contiguous."""
    both: tuple[torch.Tensor, torch.Tensor] = _backend(x).add_layer_norm(
        x, update, weight, bias, eps
    )
    return both


def layer_norm_quantised(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> Quantised:
    """:func:`layer_norm`, quantised before it is rounded to ``x``'s precision."""
    normed: Quantised = _backend(x).layer_norm_quantised(x, weight, bias, eps)
    return normed


def add_layer_norm_quantised(
    x: torch.Tensor,
    update: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    later: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Quantised]:
    """``x + update + later``, and the LayerNorm of ``x + update``, quantised.

    ``later`` (C,): the bias of a product that will be added to the sum, and has left it out.
    """
    both: tuple[torch.Tensor, Quantised] = _backend(x).add_layer_norm_quantised(
        x, update, weight, bias, eps, later
    )
    return both


def geglu(x: torch.Tensor) -> torch.Tensor:
    """``value * GELU(gate)``, Shazeer 2020, with the exact GELU.

    ``x`` (M, 2 N) contiguous, values before gates; returns (M, N).
    """
    gated: torch.Tensor = _backend(x).geglu(x)
    return gated


def geglu_quantised(x: torch.Tensor, bias: torch.Tensor) -> Quantised:
    """:func:`geglu` of ``x + bias``, quantised; ``bias`` (2 N,)."""
    gated: Quantised = _backend(x).geglu_quantised(x, bias)
    return gated


def scaled_product(a: Quantised, b: Quantised, dtype: torch.dtype) -> torch.Tensor:
    """``a @ b.T`` in ``dtype``, fp16 or bf16 on CUDA; ``a`` (M, K), ``b`` (N, K), N and K multiples
    of 16.
    """
    product: torch.Tensor = _backend(a.values).scaled_product(a, b, dtype)
    return product


def add_bias(x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """``x + bias + residual``: what follows a convolution that left its bias out.

    ``x``, ``residual`` (B, C, H, W) channels_last, ``bias`` (C,).
    """
    total: torch.Tensor = _backend(x).add_bias(x, bias, residual)
    return total


def join(
    x: torch.Tensor,
    skip: torch.Tensor,
    control: torch.Tensor | None = None,
    strength: torch.Tensor | None = None,
) -> torch.Tensor:
    """The input of an up block: ``x`` beside ``skip + strength * control``, along the channels.

    ``x`` (B, C, H, W), ``skip`` and ``control`` (B, S, H, W), channels_last; ``strength`` (B,)
    fp32, with ``control`` or not at all. Returns (B, C + S, H, W) channels_last.
    """
    joined: torch.Tensor = _backend(x).join(x, skip, control, strength)
    return joined


def interleave(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Four corners of doubled pixels into one image, plus ``bias`` (C,).

    ``x`` (B, 4 C, H + 1, W + 1) channels_last, corners in reading order, each the result of a 2x2
    convolution with padding 1. Pixel (2 i + a, 2 j + b) is ``x``'s at (i + a, j + b) of corner
    2 a + b. Returns (B, C, 2 H, 2 W) channels_last.
    """
    image: torch.Tensor = _backend(x).interleave(x, bias)
    return image


def are_fused() -> bool:
    """Whether CUDA tensors take the Triton kernels; imports them."""
    return _fused() is not reference


def _backend(x: torch.Tensor) -> ModuleType:
    return _fused() if x.is_cuda else reference


@cache
def _fused() -> ModuleType:
    try:
        from experimance_controlnet.engine.kernels import fused
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return reference
    return fused
