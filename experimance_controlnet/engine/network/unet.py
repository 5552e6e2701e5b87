"""UNet and ControlNet: one encoder, which both have, and what each does with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from torch.nn import functional

from experimance_controlnet.engine import kernels
from experimance_controlnet.engine.network.blocks import (
    Downsample,
    Resnet,
    Upsample,
    convolve,
    normalise,
    pointwise,
)
from experimance_controlnet.engine.network.parameters import fuse_rows, require, to_channels_last
from experimance_controlnet.engine.network.products import HalfProducts, Products
from experimance_controlnet.engine.network.transformer import (
    Prompt,
    PromptProjection,
    Transformer,
)
from experimance_controlnet.engine.resting import AtRest, ModuleFrame, module_tensors


@dataclass(frozen=True, slots=True)
class TextConstants:
    """What a network knows of the prompts of R rows; the same in every step."""

    prompt: Prompt | None  # None where the network has no cross-attention
    added: torch.Tensor  # (R, E): pooled prompt and picture size, embedded

    def overwrite(self, other: TextConstants) -> None:
        """Bring the values of another one, of the same network and shape, to where these are."""
        self.added.copy_(other.added)
        if self.prompt is not None and other.prompt is not None:
            self.prompt.keys_values.copy_(other.prompt.keys_values)


@dataclass(frozen=True, slots=True)
class ControlResiduals:
    """What a ControlNet adds to a UNet's skip connections and to its middle block."""

    down: tuple[torch.Tensor, ...]  # each (R, C, h, w)
    middle: torch.Tensor  # (R, C, h, w)
    strength: torch.Tensor  # (R,) fp32; 0 where the ControlNet does not act


class _Conditioned:
    """What UNet and ControlNet share: embeddings of time and text, and the encoder."""

    def __init__(self, module: Any, resnets: Sequence[Any], attentions: Sequence[Any]) -> None:
        config = module.config
        require(config["addition_embed_type"] == "text_time", "no text_time embedding")
        require(
            module.class_embedding is None and not config.get("encoder_hid_dim_type"),
            "class or image embeddings",
        )
        require(module.mid_block is not None, "no middle block")
        require(not config.get("center_input_sample"), "a sample that is centred first")
        require(getattr(module, "time_embed_act", None) is None, "unusual time embeddings")
        require(
            all(resnet.time_embedding_norm == "default" for resnet in resnets),
            "unusual residual blocks",
        )
        to_channels_last(module)
        self._module = module
        # asked once: diffusers looks through all submodules for them, 15 ms each time
        self.dtype: torch.dtype = module.dtype
        self.device: torch.device = module.device
        projections = [resnet.time_emb_proj for resnet in resnets]
        self._time_weight = fuse_rows(projections, self.device)
        # adapters never change biases, so a sum of two may be kept
        self._time_bias = torch.cat(
            [resnet.time_emb_proj.bias + resnet.conv1.bias for resnet in resnets]
        ).detach()
        self._widths = [projection.out_features for projection in projections]
        cross = [block.attn2 for attention in attentions for block in attention.transformer_blocks]
        self._prompt_projection = PromptProjection(cross, self.device)
        self._columns = _columns(cross)

    @property
    def channels(self) -> int:
        """Of the image at the encoder's first level."""
        return int(self._module.conv_in.out_channels)

    def text_constants(
        self, prompt_embeds: torch.Tensor, pooled: torch.Tensor, time_ids: torch.Tensor
    ) -> TextConstants:
        """``prompt_embeds`` (R, T, D), ``pooled`` (R, P), ``time_ids`` (R, 6), model dtype."""
        module = self._module
        sizes = module.add_time_proj(time_ids.flatten()).reshape(len(pooled), -1)
        added = module.add_embedding(torch.cat([pooled, sizes.to(pooled.dtype)], dim=-1))
        return TextConstants(self._prompt_projection(prompt_embeds), added)

    def _shifts(self, timesteps: torch.Tensor, text: TextConstants) -> Iterator[torch.Tensor]:
        """For each residual block in order: time embedding and conv1's bias, (R, C)."""
        module = self._module
        waves = module.time_proj(timesteps).to(text.added.dtype)
        embedding = functional.silu(module.time_embedding(waves) + text.added)
        shifts = functional.linear(embedding, self._time_weight, self._time_bias)
        return iter(shifts.split(self._widths, dim=-1))


@dataclass(frozen=True, slots=True)
class _Level:
    """A residual block, and the transformer behind it where there is one."""

    resnet: Resnet
    transformer: Transformer | None

    def __call__(
        self, x: torch.Tensor, shifts: Iterator[torch.Tensor], prompt: Prompt | None
    ) -> torch.Tensor:
        x = self.resnet(x, next(shifts))
        if self.transformer is not None:
            assert prompt is not None
            x = self.transformer(x, prompt)
        return x


class _Encoder:
    """The way down and the middle: an image to its skip connections and the deepest features."""

    def __init__(self, module: Any, columns: Iterator[slice], products: Products) -> None:
        self._down: list[_Level | Downsample] = []
        for block in module.down_blocks:
            self._down += _levels(block, columns, products)
            self._down += [Downsample(sampler) for sampler in block.downsamplers or ()]
        first, *others = module.mid_block.resnets
        self._first = Resnet(first)
        self._middle = [
            (Transformer(attention, columns, products), Resnet(resnet))
            for attention, resnet in zip(module.mid_block.attentions, others, strict=True)
        ]

    def __call__(
        self, x: torch.Tensor, shifts: Iterator[torch.Tensor], prompt: Prompt | None
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        skips = [x]
        for layer in self._down:
            x = layer(x) if isinstance(layer, Downsample) else layer(x, shifts, prompt)
            skips.append(x)
        x = self._first(x, next(shifts))
        for transformer, resnet in self._middle:
            assert prompt is not None
            x = resnet(transformer(x, prompt), next(shifts))
        return skips, x


class UnetNetwork(_Conditioned):
    """SDXL's UNet."""

    def __init__(self, unet: UNet2DConditionModel, products: Products | None = None) -> None:
        """``products`` are this network's alone; by default they are in the weights' precision.

        Raises:
            BadWeightsError: the UNet is not built as SDXL's is.
        """
        module: Any = unet
        blocks = [*module.down_blocks, module.mid_block, *module.up_blocks]
        super().__init__(module, *_parts(blocks))
        columns = iter(self._columns)
        products = products or HalfProducts()
        self._encoder = _Encoder(module, columns, products)
        self._up: list[tuple[list[_Level], list[Upsample]]] = [
            (
                _levels(block, columns, products),
                [Upsample(sampler) for sampler in block.upsamplers or ()],
            )
            for block in module.up_blocks
        ]
        self._products = products
        self.weights_changed()

    @property
    def latent_channels(self) -> int:
        """Of the sample, and of the noise predicted for it."""
        return int(self._module.conv_in.in_channels)

    def weights_changed(self) -> None:
        """To be called whenever adapters are merged or unmerged."""
        self._products.weights_changed()

    def __call__(
        self,
        sample: torch.Tensor,
        timesteps: torch.Tensor,
        text: TextConstants,
        wait_for_control: Callable[[], ControlResiduals | None],
    ) -> torch.Tensor:
        """The noise in ``sample`` (R, 4, h, w); ``timesteps`` (R,) fp32.

        ``wait_for_control`` is called when the residuals are needed, after the way down.
        """
        module, shifts = self._module, self._shifts(timesteps, text)
        skips, x = self._encoder(convolve(module.conv_in, sample), shifts, text.prompt)
        control = wait_for_control()
        residuals: list[torch.Tensor | None] = [None] * len(skips)
        strength = None
        if control is not None:
            residuals, strength = list(control.down), control.strength
            x = x + control.middle * strength.to(x.dtype)[:, None, None, None]
        for levels, samplers in self._up:
            for level in levels:
                x = kernels.join(x, skips.pop(), residuals.pop(), strength)
                x = level(x, shifts, text.prompt)
            for sampler in samplers:
                x = sampler(x)
        return convolve(module.conv_out, normalise(module.conv_norm_out, x, silu=True))


class ControlNetwork(_Conditioned):
    """A ControlNet for SDXL, of the small kind or with attention."""

    def __init__(self, controlnet: ControlNetModel) -> None:
        """Raises:
        BadWeightsError: the ControlNet is not built as SDXL's are.
        """
        module: Any = controlnet
        super().__init__(module, *_parts([*module.down_blocks, module.mid_block]))
        config = module.config
        require(not config["global_pool_conditions"], "a ControlNet with pooled conditions")
        require(
            config["controlnet_conditioning_channel_order"] == "rgb", "a ControlNet for BGR images"
        )
        self._encoder = _Encoder(module, iter(self._columns), HalfProducts())

    def at_rest(self) -> AtRest:
        """The ControlNet taken apart; it has one component, ``controlnet``."""
        name = "controlnet"
        tensors = module_tensors(name, self._module)
        return AtRest(ModuleFrame.of(name, self._module), tensors, on_host={})

    def features(self, image: torch.Tensor) -> torch.Tensor:
        """The control image (B, 3, H, W), 0..1, as features (B, C, H/8, W/8); once a request."""
        image = image.contiguous(memory_format=torch.channels_last)
        features: torch.Tensor = self._module.controlnet_cond_embedding(image)
        return features

    def __call__(
        self,
        sample: torch.Tensor,
        timesteps: torch.Tensor,
        text: TextConstants,
        features: torch.Tensor,
        strength: torch.Tensor,
    ) -> ControlResiduals:
        """``sample`` and ``timesteps`` as for the UNet, ``features`` (R, C, h, w)."""
        module, shifts = self._module, self._shifts(timesteps, text)
        x = convolve(module.conv_in, sample, bias=False)
        x = kernels.add_bias(x, module.conv_in.bias, features)
        skips, middle = self._encoder(x, shifts, text.prompt)
        down = tuple(
            pointwise(layer, skip)
            for layer, skip in zip(module.controlnet_down_blocks, skips, strict=True)
        )
        return ControlResiduals(down, pointwise(module.controlnet_mid_block, middle), strength)


def add_residuals(parts: Sequence[ControlResiduals]) -> ControlResiduals | None:
    """What several ControlNets add together, each at its strength; None of none."""
    if len(parts) < 2:
        return parts[0] if parts else None
    totals = []
    for level in zip(*([*part.down, part.middle] for part in parts), strict=True):
        scaled = [
            tensor * part.strength.to(tensor.dtype)[:, None, None, None]
            for tensor, part in zip(level, parts, strict=True)
        ]
        totals.append(torch.stack(scaled).sum(dim=0))
    *down, middle = totals
    return ControlResiduals(tuple(down), middle, torch.ones_like(parts[0].strength))


def _levels(block: Any, columns: Iterator[slice], products: Products) -> list[Any]:
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    return [
        _Level(
            Resnet(resnet),
            None if attention is None else Transformer(attention, columns, products),
        )
        for resnet, attention in zip(block.resnets, attentions, strict=True)
    ]


def _parts(blocks: Sequence[nn.Module]) -> tuple[list[Any], list[Any]]:
    """All residual blocks and all transformers, in the order in which they are evaluated."""
    resnets = [resnet for block in blocks for resnet in getattr(block, "resnets", ())]
    attentions = [found for block in blocks for found in getattr(block, "attentions", ())]
    require(len(resnets) > 0, "no residual blocks")
    require(all(hasattr(found, "transformer_blocks") for found in attentions), "unusual attention")
    return resnets, attentions


def _columns(attentions: Sequence[Attention]) -> list[slice]:
    """Where each layer's keys and values stand side by side in :class:`Prompt`."""
    ends = [0]
    for attention in attentions:
        ends.append(ends[-1] + attention.to_k.out_features + attention.to_v.out_features)
    return [slice(first, end) for first, end in pairwise(ends)]
