"""The transformers inside the UNet: self-attention, cross-attention to the prompt, feed-forward.

Hidden states are tokens, (M, C) with M = rows x pixels, so every projection is one matrix product.
The residual add and the LayerNorm that follows it are one kernel, across the borders of blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn
from torch.nn import functional

from experimance_controlnet.engine import kernels
from experimance_controlnet.engine.network.blocks import as_image, as_tokens, normalise
from experimance_controlnet.engine.network.parameters import fuse_rows, require
from experimance_controlnet.engine.network.products import Products, add_layer_norm


@dataclass(frozen=True, slots=True)
class Prompt:
    """Keys and values of all cross-attention layers of a network, for R rows of T tokens."""

    keys_values: torch.Tensor  # (R, T, sum of 2 C over the layers)

    def of(self, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer's keys and values, each (R, T, C)."""
        keys, values = self.keys_values[:, :, columns].chunk(2, dim=-1)
        return keys, values


class PromptProjection:
    """All ``to_k`` and ``to_v`` of a network's cross-attention in one matrix product.

    Computed apart from the network, since a prompt does not change from step to step.
    """

    def __init__(self, layers: Sequence[Attention], device: torch.device) -> None:
        pairs = [layer for attention in layers for layer in (attention.to_k, attention.to_v)]
        self._weight = fuse_rows(pairs, device) if pairs else None

    def __call__(self, prompt_embeds: torch.Tensor) -> Prompt | None:
        """``prompt_embeds`` (R, T, D); None where the network has no cross-attention."""
        if self._weight is None:
            return None
        return Prompt(functional.linear(prompt_embeds, self._weight))


class Transformer:
    """A Transformer2DModel."""

    def __init__(
        self, module: Transformer2DModel, columns: Iterator[slice], products: Products
    ) -> None:
        """``columns`` yields the place of each cross-attention layer in :class:`Prompt`.

        Raises:
            BadWeightsError: the module has options that SDXL does not use.
        """
        self._module: Any = module
        self._blocks = [
            _Block(block, next(columns), products) for block in module.transformer_blocks
        ]

    def __call__(self, image: torch.Tensor, prompt: Prompt) -> torch.Tensor:
        module, rows = self._module, image.shape[0]
        tokens = as_tokens(normalise(module.norm, image, silu=False))
        hidden = functional.linear(tokens, module.proj_in.weight.flatten(1), module.proj_in.bias)
        update: torch.Tensor | None = None
        for block in self._blocks:
            hidden, update = block(hidden, update, prompt, rows)
        assert update is not None, "a transformer has blocks"
        out = functional.linear(hidden + update, module.proj_out.weight.flatten(1))
        return kernels.add_bias(as_image(out, image), module.proj_out.bias, image)


class _Block:
    """A BasicTransformerBlock; its last residual add is left to what comes after it."""

    def __init__(self, block: Any, columns: slice, products: Products) -> None:
        feed_forward: Any = block.ff.net
        require(block.norm_type == "layer_norm", "transformer blocks without LayerNorm")
        require(not block.only_cross_attention, "transformer blocks without self-attention")
        require(isinstance(feed_forward[0], GEGLU), "feed-forward layers without GEGLU")
        self._block = block
        self._self_attention = _SelfAttention(block.attn1, products)
        self._cross_attention = _CrossAttention(block.attn2, columns)
        self._feed_forward = products.feed_forward(feed_forward[0].proj, feed_forward[2])

    def __call__(
        self, hidden: torch.Tensor, update: torch.Tensor | None, prompt: Prompt, rows: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The hidden states before an update, and that update; None before the first block."""
        block = self._block
        hidden, update = self._self_attention(hidden, update, block.norm1, rows)
        hidden, normed = add_layer_norm(hidden, update, block.norm2)
        update = self._cross_attention(normed, prompt, rows)
        return self._feed_forward(hidden, update, block.norm3)


class _SelfAttention:
    def __init__(self, attention: Any, products: Products) -> None:
        _check_attention(attention)
        self._attention = attention
        layers = (attention.to_q, attention.to_k, attention.to_v)
        weight = fuse_rows(layers, attention.to_out[0].weight.device)
        self._project = products.normed(weight)

    def __call__(
        self, hidden: torch.Tensor, update: torch.Tensor | None, norm: nn.LayerNorm, rows: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, projected = self._project(hidden, update, norm)
        projected = projected.unflatten(0, (rows, -1))
        return hidden, _attend(self._attention, *projected.chunk(3, dim=-1))


class _CrossAttention:
    def __init__(self, attention: Any, columns: slice) -> None:
        _check_attention(attention)
        self._attention = attention
        self._columns = columns

    def __call__(self, tokens: torch.Tensor, prompt: Prompt, rows: int) -> torch.Tensor:
        query = self._attention.to_q(tokens).unflatten(0, (rows, -1))
        return _attend(self._attention, query, *prompt.of(self._columns))


def _attend(
    attention: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """Attention and its output projection. Each (R, tokens, C); returns (R x tokens, C)."""
    query, key, value = (
        tensor.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        for tensor in (query, key, value)
    )  # (R, heads, tokens, C / heads)
    mixed = functional.scaled_dot_product_attention(query, key, value)
    out: torch.Tensor = attention.to_out[0](mixed.transpose(1, 2).flatten(2).flatten(0, 1))
    return out


def _check_attention(attention: Any) -> None:
    plain = all(layer.bias is None for layer in (attention.to_q, attention.to_k, attention.to_v))
    unscaled = attention.rescale_output_factor == 1.0 and not attention.residual_connection
    normed = attention.norm_q is None and attention.norm_k is None
    require(plain and unscaled and normed, "unusual attention layers")
