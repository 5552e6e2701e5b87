"""What UNet, ControlNet and VAE are built of. Images are (B, C, H, W) in channels_last.

Biases of convolutions are left out of them and added where the next kernel reads the result anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn import functional

from experimance_controlnet.engine import kernels
from experimance_controlnet.engine.network.parameters import require


def convolve(layer: Any, x: torch.Tensor, *, bias: bool = True) -> torch.Tensor:
    """A convolution of the module, with its bias or without."""
    result: torch.Tensor = functional.conv2d(
        x, layer.weight, layer.bias if bias else None, layer.stride, layer.padding
    )
    return result


def pointwise(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """A 1x1 convolution (or a linear layer in its place) as one matrix product over the pixels."""
    return as_image(functional.linear(as_tokens(x), layer.weight.flatten(1), layer.bias), x)


def as_tokens(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) channels_last as (B x H x W, C): the same memory."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def as_image(tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B x H x W, C) as (B, C, H, W) channels_last, of ``like``'s B, H and W: the same memory."""
    batch, _, height, width = like.shape
    return tokens.view(batch, height, width, -1).permute(0, 3, 1, 2)


def normalise(
    norm: nn.GroupNorm, x: torch.Tensor, *, silu: bool, shift: torch.Tensor | None = None
) -> torch.Tensor:
    """The module's GroupNorm of ``x + shift``, then SiLU if wished."""
    return kernels.group_norm(
        x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu=silu, shift=shift
    )


class Resnet:
    """A ResnetBlock2D."""

    def __init__(self, block: ResnetBlock2D) -> None:
        """Raises:
        BadWeightsError: the block has options that SDXL does not use.
        """
        added = block.time_emb_proj is None or block.time_embedding_norm == "default"
        plain = block.output_scale_factor == 1.0 and not block.up and not block.down
        require(added and plain, "unusual residual blocks")
        require(isinstance(block.nonlinearity, nn.SiLU), "an activation other than SiLU")
        self._block: Any = block

    def __call__(self, x: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
        """``shift``: the time embedding plus conv1's bias, (B, C); None without a time."""
        block = self._block
        if shift is None:
            shift = block.conv1.bias
        hidden = normalise(block.norm1, x, silu=True)
        hidden = convolve(block.conv1, hidden, bias=False)
        hidden = normalise(block.norm2, hidden, silu=True, shift=shift)
        hidden = convolve(block.conv2, hidden, bias=False)
        shortcut = x if block.conv_shortcut is None else pointwise(block.conv_shortcut, x)
        return kernels.add_bias(hidden, block.conv2.bias, shortcut)


class Downsample:
    """A Downsample2D: a convolution of stride 2."""

    def __init__(self, block: Downsample2D) -> None:
        """Raises:
        BadWeightsError: it is no convolution.
        """
        plain = isinstance(block, Downsample2D) and block.use_conv and block.padding == 1
        require(plain, "unusual downsampling")
        self._conv: Any = block.conv

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return convolve(self._conv, x)


class StaticUpsample:
    """An Upsample2D whose weights never change: four ninths of the arithmetic.

    A 3x3 convolution over pixels that were doubled sees each source pixel several times; the
    weights that meet the same source pixel are added once, beforehand. What is left are four
    convolutions of 2x2, one for each corner of a doubled pixel, all over the same windows, hence
    one convolution with four times the channels. Equal up to rounding.
    """

    def __init__(self, block: Upsample2D) -> None:
        """Raises:
        BadWeightsError: it has no convolution of 3x3.
        """
        conv: Any = block.conv
        plain = block.use_conv and not block.use_conv_transpose and conv.padding == (1, 1)
        require(plain and conv.kernel_size == (3, 3), "unusual upsampling")
        self._bias: torch.Tensor = conv.bias
        weight = conv.weight.detach().float()
        corners = [
            _fold(_fold(weight, vertical, dim=2), horizontal, dim=3)
            for vertical in (0, 1)
            for horizontal in (0, 1)
        ]
        self._weight = (
            torch.cat(corners).to(conv.weight.dtype).contiguous(memory_format=torch.channels_last)
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return kernels.interleave(functional.conv2d(x, self._weight, padding=1), self._bias)


def _fold(weight: torch.Tensor, half: int, dim: int) -> torch.Tensor:
    """Three taps over doubled pixels to two over their sources, for one half of the doubled.

    The first half sees the source before it once and its own twice, the second its own twice and
    the one after it once.
    """
    first, middle, last = weight.unbind(dim)
    taps = (first, middle + last) if half == 0 else (first + middle, last)
    return torch.stack(taps, dim)


class Upsample:
    """An Upsample2D: every pixel four times, then a convolution."""

    def __init__(self, block: Upsample2D) -> None:
        """Raises:
        BadWeightsError: it has no convolution.
        """
        require(block.use_conv and not block.use_conv_transpose, "unusual upsampling")
        self._conv: Any = block.conv

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return convolve(self._conv, functional.interpolate(x, scale_factor=2.0, mode="nearest"))
