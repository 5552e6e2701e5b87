"""Seeded weights under which an untrained family already paints calm, varied pictures.

Purely random weights would give chaotic noise and amplify tiny float differences. Here the
residual streams hand their content on, smoothed at each change of resolution, and the branches
(convolutions, attention) add a tame share of their own to it:

* The UNet predicts the noise as the normalised latents less what survives smoothing. That is
  what a denoiser does for data whose energy lies in the low frequencies: large soft shapes stay.
* The VAE's decoder mixes the latents into red, green and blue, and enlarges them smoothly.

Both need a value to pass ``silu(group_norm(x))`` unharmed. So it travels as a pair, ``+v`` and
``-v`` in one group, and the last convolution takes the difference: ``silu(v) - silu(-v) = v``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from tools.embedded_model.architecture import UNET, VAE

Gains = Sequence[tuple[str, float]]

# Patterns of module names, the first match wins. A gain is the standard deviation of a layer's
# output where its input has unit variance.
UNET_GAINS: Gains = (
    (r"attn2\.to_[qk]$", 1.5),
    (r"attn2\.to_out\.0$", 0.5),
    (r"(to_out\.0|ff\.net\.2)$", 0.4),
    (r"proj_out$", 0.5),
    (r"conv2$", 0.4),
    (r"^conv_out$", 0.1),
    (r"add_embedding\.", 1.5),
    (r"time_emb_proj$", 1.0),
)
CONTROLNET_GAINS: Gains = (
    # What matters is the depth map, much less the latents.
    (r"^conv_in$", 0.2),
    (r"controlnet_cond_embedding\.", 2.2),
    (r"controlnet_(down_blocks\.\d+|mid_block)$", 0.12),
    (r"conv2$", 0.5),
    (r"time_emb_proj$", 0.3),
)
VAE_GAINS: Gains = (
    (r"to_out\.0$", 0.2),
    (r"conv2$", 0.3),
    (r"decoder\.conv_out$", 0.05),
)
TEXT_GAINS: Gains = (
    (r"position_embedding$", 0.1),
    (r"token_embedding$", 0.7),
    (r"(out_proj|fc2)$", 0.6),
)

_PAIR = 3  # channels per group in the UNet's and the decoder's last norm: +v, -v and one more
_SMOOTHED = 0.8  # share of the smoothed latents that the UNet does not call noise
_EAGERNESS = 1.25  # how much more than there is: few steps leave less grain that way
_STRAY = 0.3  # what is left of its random self in a layer that hands on

# (3, 4): red, green and blue of the four latent channels, of which the first is brightness.
_COLOURS = torch.tensor(
    [[0.8, 0.30, -0.15, 0.10], [0.8, -0.05, 0.25, 0.15], [0.8, -0.25, -0.10, -0.30]]
)
_CONTRAST = 0.4  # standard deviation of a colour, where -1..1 is black..white


def draw_weights(model: nn.Module, seed: int, gains: Gains) -> None:
    """Fill ``model`` from ``seed``: normal matrices by fan-in, zero biases; norms as they are."""
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            gain = next((gain for pattern, gain in gains if re.search(pattern, name)), 1.0)
            fan_in = 1 if isinstance(module, nn.Embedding) else module.weight[0].numel()
            nn.init.normal_(module.weight, std=gain * fan_in**-0.5, generator=generator)
        if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            nn.init.zeros_(module.bias)


@torch.no_grad()
def vary_weights(model: nn.Module, seed: int, amount: float) -> None:
    """Make a sibling of ``model``: each weight times ``1 + amount * normal``, so zeros stay."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(1 + amount * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def initialise_unet(unet: UNet2DConditionModel, seed: int) -> None:
    """Predicts as noise the latents less their smooth part, plus what the branches add."""
    draw_weights(unet, seed, UNET_GAINS)
    latents = torch.eye(UNET["in_channels"])
    _send_pairs(unet.conv_in, latents)
    _hand_on_along([*unet.down_blocks, *unet.up_blocks])
    last_block: Any = unet.up_blocks[-1]
    _subtract_smoothed(last_block.resnets[-1], pairs=len(latents))
    # A third of each group is silent, which the norm turns into a gain.
    _take_pairs(unet.conv_out, latents * _EAGERNESS * (2 / _PAIR) ** 0.5)


@torch.no_grad()
def initialise_controlnet(controlnet: ControlNetModel, seed: int) -> None:
    """Carries the depth map to every residual: the "zero" convolutions are not zero here."""
    draw_weights(controlnet, seed, CONTROLNET_GAINS)
    _hand_on_along(controlnet.down_blocks)


@torch.no_grad()
def initialise_vae(vae: AutoencoderKL, seed: int) -> None:
    """Decodes to smooth colours with some texture. The encoder is merely random."""
    draw_weights(vae, seed, VAE_GAINS)
    # Back to unit variance, which the pipeline divided away.
    assert vae.post_quant_conv is not None
    unscaled = VAE["scaling_factor"] * torch.eye(VAE["latent_channels"])
    vae.post_quant_conv.weight.copy_(unscaled[:, :, None, None])
    _send_pairs(vae.decoder.conv_in, _COLOURS)
    _hand_on_along(vae.decoder.up_blocks)
    _take_pairs(vae.decoder.conv_out, _CONTRAST * torch.eye(3))


def initialise_text_encoder(encoder: nn.Module, seed: int) -> None:
    """Plain random weights: every word has its own direction, the causal layers mix them."""
    draw_weights(encoder, seed, TEXT_GAINS)


def _send_pairs(conv: nn.Conv2d, mixing: Tensor) -> None:
    """Output channels 3k and 3k+1 become plus and minus ``mixing[k]`` of the input channels."""
    for k, row in enumerate(mixing):
        conv.weight[_PAIR * k : _PAIR * k + 2] = 0
        conv.weight[_PAIR * k, :, 1, 1] = row
        conv.weight[_PAIR * k + 1, :, 1, 1] = -row


def _take_pairs(conv: nn.Conv2d, mixing: Tensor) -> None:
    """Of input pair k, output channel i gets ``mixing[i, k]``; the other inputs stay as drawn."""
    for k, column in enumerate(mixing.T):
        conv.weight[:, _PAIR * k : _PAIR * k + 2] = 0
        conv.weight[:, _PAIR * k, 1, 1] = column
        conv.weight[:, _PAIR * k + 1, 1, 1] = -column


def _hand_on_along(blocks: Iterable[nn.Module]) -> None:
    """Let the content of the residual stream pass all shortcuts and changes of resolution.

    In blocks that join a skip connection the first input channels are the stream. The skip enters
    with its random share only, so what was smoothed on the way down stays smooth.
    """
    for block in blocks:
        for name, module in block.named_modules():
            if re.search(r"(conv_shortcut|samplers\.0\.conv)$", name):
                assert isinstance(module, nn.Conv2d)
                _hand_on(module)


def _hand_on(conv: nn.Conv2d) -> None:
    """Add the identity to ``conv``, smoothed where it has room for that."""
    weight = conv.weight
    weight *= _STRAY
    binomial = torch.tensor([1.0, 2.0, 1.0] if weight.shape[-1] == 3 else [1.0])
    kernel = torch.outer(binomial, binomial) / binomial.sum() ** 2
    for i in range(min(weight.shape[:2])):
        weight[i, i] += kernel


def _subtract_smoothed(resnet: ResnetBlock2D, pairs: int) -> None:
    """In the UNet's last block: pairs of the skip (the latents) less those of the stream."""
    shortcut = resnet.conv_shortcut
    assert shortcut is not None
    stream = shortcut.in_channels - shortcut.out_channels
    shortcut.weight[: _PAIR * pairs] = 0
    resnet.conv2.weight[: _PAIR * pairs] = 0
    for k in range(pairs):
        for row in (_PAIR * k, _PAIR * k + 1):
            shortcut.weight[row, row] = -_SMOOTHED
            shortcut.weight[row, stream + row] = 1
