"""The VAE's decoder: latents to an image."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch.nn import functional

from experimance_controlnet.engine.network.blocks import (
    Resnet,
    StaticUpsample,
    as_image,
    as_tokens,
    convolve,
    normalise,
    pointwise,
)
from experimance_controlnet.engine.network.parameters import require, to_channels_last

_QUERY_TOKENS = 4096
"""Queries at a time in attention over many tokens: bounds the scores to 128 MB at 1024x1024."""


class VaeDecoder:
    """An AutoencoderKL's decoder with its ``post_quant_conv``."""

    def __init__(self, vae: AutoencoderKL) -> None:
        """Raises:
        BadWeightsError: the decoder is not built as SDXL's is.
        """
        decoder: Any = vae.decoder
        to_channels_last(vae)
        self._post_quant: Any = vae.post_quant_conv
        self._decoder = decoder
        middle = decoder.mid_block
        self._first, self._last = (Resnet(resnet) for resnet in middle.resnets)
        [self._attention] = middle.attentions
        require(self._attention is not None, "a VAE without attention")
        require(self._attention.heads == 1, "a VAE with several attention heads")
        require(
            not any(hasattr(block, "attentions") for block in decoder.up_blocks),
            "a VAE with attention in its up blocks",
        )
        self._up = [
            (
                [Resnet(resnet) for resnet in block.resnets],
                [StaticUpsample(sampler) for sampler in block.upsamplers or ()],
            )
            for block in decoder.up_blocks
        ]

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """``latents`` (B, 4, h, w) in the VAE's scale and precision -> (B, 3, 8 h, 8 w)."""
        decoder = self._decoder
        x = latents.contiguous(memory_format=torch.channels_last)
        if self._post_quant is not None:
            x = pointwise(self._post_quant, x)
        x = self._first(convolve(decoder.conv_in, x))
        x = self._last(_attend(self._attention, x))
        for resnets, samplers in self._up:
            for resnet in resnets:
                x = resnet(x)
            for sampler in samplers:
                x = sampler(x)
        return convolve(decoder.conv_out, normalise(decoder.conv_norm_out, x, silu=True))


def _attend(attention: Any, image: torch.Tensor) -> torch.Tensor:
    """Self-attention with its residual add; one head as wide as the image has channels."""
    tokens = as_tokens(normalise(attention.group_norm, image, silu=False))
    query, key, value = (
        layer(tokens).unflatten(0, (image.shape[0], -1))
        for layer in (attention.to_q, attention.to_k, attention.to_v)
    )
    mixed = _one_head(query, key, value) if image.is_cuda else _sdpa(query, key, value)
    out: torch.Tensor = attention.to_out[0](mixed.flatten(0, 1))
    return image + as_image(out, image)


def _sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[
        :, 0
    ]


def _one_head(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention by plain matrix products, some queries at a time.

    No fused kernel takes a head of 512. In fp16, whose steps are eight times finer than bf16's;
    queries are scaled before the product, so that scores stay in its range.
    """
    query = (query * query.shape[-1] ** -0.5).half()
    keys, values = key.half().transpose(1, 2), value.half()
    parts = [
        torch.bmm(torch.softmax(torch.bmm(part, keys), dim=-1), values)
        for part in query.split(_QUERY_TOKENS, dim=1)
    ]
    return torch.cat(parts, dim=1).to(value.dtype)
