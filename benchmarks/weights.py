"""Random weights under which a full-size SDXL stays finite in fp16 and behaves like a denoiser.

Matrices are normal by fan-in, with a gain for each kind of layer. Biases are small but not zero and
norms are near but not at the identity: code that forgets one of them makes another picture.

The UNet predicts its own input as the noise, plus what its layers say about prompt, depth and
timestep. So sampling removes the noise it began with, and the picture is made of what the network
computed: an error in it shows. With plain random weights the initial noise would survive, sigma 14
against a network's output of 1, and hide every error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from tools.embedded_model.initialise import CONTROLNET_GAINS, UNET_GAINS

Gains = Sequence[tuple[str, float]]

_BIAS = 0.02
"""Standard deviation of a bias."""
_NORM = 0.1
"""Standard deviation of a norm's weight around 1 and of its bias around 0."""
_RESIDUAL = 1.2
"""Of a text encoder's branches together, where its stream begins with about 0.7."""
_NOISE_SHARE = 0.95
"""Of its input the UNet calls so much noise."""

_UNET_GAINS: Gains = ((r"^conv_out$", 0.4), *UNET_GAINS)
_VAE_GAINS: Gains = (
    # SDXL's latents were multiplied by this, and are about 1 without it
    (r"^post_quant_conv$", 0.13),
    (r"to_out\.0$", 0.2),
    (r"conv2$", 0.3),
    (r"decoder\.conv_out$", 0.5),
)


@torch.no_grad()
def draw_unet(unet: UNet2DConditionModel, seed: int) -> None:
    """In place, on the device where it is."""
    _draw(unet, seed, _UNET_GAINS)
    last_block: Any = unet.up_blocks[-1]
    _pass_input_on(unet.conv_in, last_block.resnets[-1], unet.conv_out, unet.config)


@torch.no_grad()
def draw_controlnet(controlnet: ControlNetModel, seed: int) -> None:
    """In place. Its "zero" convolutions are not zero."""
    _draw(controlnet, seed, CONTROLNET_GAINS)


@torch.no_grad()
def draw_vae(vae: AutoencoderKL, seed: int) -> None:
    """In place."""
    _draw(vae, seed, _VAE_GAINS)


@torch.no_grad()
def draw_text_encoder(encoder: nn.Module, layers: int, seed: int) -> None:
    """In place. The more layers, the smaller each one's share: the hidden states stay about 1."""
    gains: Gains = (
        (r"position_embedding$", 0.1),
        (r"token_embedding$", 0.7),
        (r"(out_proj|fc2)$", _RESIDUAL * layers**-0.5),
    )
    _draw(encoder, seed, gains)


def _draw(model: nn.Module, seed: int, gains: Gains) -> None:
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)

    def fill(tensor: Tensor, mean: float, std: float) -> None:
        noise = torch.randn(tensor.shape, generator=generator, device=device)
        tensor.copy_(noise * std + mean)

    for name, module in _layers(model):
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            fill(module.weight, 1.0, _NORM)
            fill(module.bias, 0.0, _NORM)
            continue
        gain = next((gain for pattern, gain in gains if re.search(pattern, name)), 1.0)
        fan_in = 1 if isinstance(module, nn.Embedding) else module.weight[0].numel()
        fill(module.weight, 0.0, gain * fan_in**-0.5)
        if not isinstance(module, nn.Embedding) and module.bias is not None:
            fill(module.bias, 0.0, _BIAS)


def _layers(
    model: nn.Module,
) -> Iterator[tuple[str, nn.Linear | nn.Conv2d | nn.Embedding | nn.GroupNorm | nn.LayerNorm]]:
    """Every module that owns parameters; another kind would stay uninitialised."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding | nn.GroupNorm | nn.LayerNorm):
            yield name, module
        elif next(module.parameters(recurse=False), None) is not None:
            raise TypeError(f"{name} is a {type(module).__name__}: no rule for its weights")


def _pass_input_on(conv_in: Any, last: Any, conv_out: Any, config: Any) -> None:
    """Lead the input past all blocks: it leaves the first convolution, comes back as the skip
    connection of the last resnet and meets the last convolution.

    On the way lies ``silu(group_norm(x))``. A value passes it as a pair, +v and -v in one group, of
    which the last convolution takes the difference: ``silu(v) - silu(-v) = v``.
    """
    channels = config["block_out_channels"][0]
    group = channels // config["norm_num_groups"]
    stream = last.conv_shortcut.in_channels - channels  # the skip's channels come after these
    for k in range(config["in_channels"]):
        for row, sign in ((group * k, 1.0), (group * k + 1, -1.0)):
            for conv in (conv_in, last.conv_shortcut, last.conv2):
                conv.weight[row] = 0
                conv.bias[row] = 0
            conv_in.weight[row, k, 1, 1] = sign
            last.conv_shortcut.weight[row, stream + row] = 1
            conv_out.weight[:, row] = 0
            conv_out.weight[k, row, 1, 1] = sign * _NOISE_SHARE
