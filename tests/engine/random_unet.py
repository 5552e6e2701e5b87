"""A UNet with random weights whose products fit fp8, for tests of precision."""

from __future__ import annotations

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from experimance_controlnet.engine.lora import LoraFactors, LowRankDelta
from experimance_controlnet.engine.network.unet import UnetNetwork
from tools.embedded_model import architecture

_TEXT_WIDTH = architecture.TEXT_WIDTH + architecture.TEXT_WIDTH_2
_TOUCHED = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "ff.net.0.proj", "ff.net.2", "attn1.to_out.0")


def make_unet(*widths: int) -> UNet2DConditionModel:
    """The embedded UNet with other widths, heads 16 wide; fp32 on the CPU."""
    torch.manual_seed(5)
    config = {"block_out_channels": widths, "attention_head_dim": [width // 16 for width in widths]}
    unet: UNet2DConditionModel = UNet2DConditionModel(**architecture.UNET | config)
    return unet.eval().requires_grad_(False)


def make_factors(unet: UNet2DConditionModel, seed: int) -> LoraFactors:
    """An adapter on every product that is quantised, and on one that is not."""
    device = unet.device
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(_TOUCHED):
            down = torch.randn(4, module.in_features, generator=generator) * 0.1
            up = torch.randn(module.out_features, 4, generator=generator) * 0.2
            deltas[name] = LowRankDelta(down.to(device), up.to(device), scale=1.0)
    return LoraFactors(f"adapter {seed}", {"unet": deltas})


class Evaluation:
    """The noise in an input that is always the same, in a buffer that stays where it is."""

    def __init__(self, network: UnetNetwork) -> None:
        self._network = network
        generator = torch.Generator().manual_seed(1)
        device, dtype = network.device, network.dtype

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        sizes = torch.tensor([[256.0, 192.0, 0.0, 0.0, 256.0, 192.0]] * 2).to(device, dtype)
        with torch.inference_mode():
            self._text = network.text_constants(
                randn(2, architecture.MAX_TOKENS, _TEXT_WIDTH),
                randn(2, architecture.TEXT_WIDTH_2),
                sizes,
            )
        self._sample = randn(2, 4, 32, 24)
        self._timesteps = torch.tensor([900.0, 500.0], device=device)
        self.noise = torch.zeros_like(self._sample)

    @torch.inference_mode()
    def __call__(self) -> None:
        noise = self._network(self._sample, self._timesteps, self._text, lambda: None)
        self.noise.copy_(noise)


def noise(network: UnetNetwork) -> torch.Tensor:
    """(2, 4, 32, 24), of the same input every time."""
    evaluation = Evaluation(network)
    evaluation()
    return evaluation.noise


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative."""
    return float((found.float() - exact).norm() / exact.norm())
