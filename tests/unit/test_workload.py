"""The workload's arithmetic, and its coefficients against FLOPs counted on the real modules."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from experimance_controlnet import workload as module
from experimance_controlnet.workload import (
    STANDARD_FLOPS,
    acting_steps,
    adapter_merge_flops,
    controlnet_flops,
    text_encode_flops,
    tflops,
    unet_flops,
    vae_decode_flops,
    workload,
)

SIZES = [(256, 256), (512, 512), (1024, 1024), (768, 1344), (2048, 1024), (448, 320)]

standard = partial(workload, width=1024, height=1024, steps=6, cfg=2.0, depth=True)


# --- the function ---------------------------------------------------------------------------


def test_the_standard_request_is_exactly_100() -> None:
    assert standard() == 100


def test_a_hand_checked_request() -> None:
    """One step without guidance or depth at 256x256: p = 1024."""
    unet = 2800 * 1024**2 + 363_591_680 * 1024 + 52_531_036_160
    vae = 2048 * 1024**2 + 605_507_616 * 1024
    text = 111_161_610_240
    assert unet + vae + text == 1_161_133_821_952
    assert STANDARD_FLOPS == 97_813_847_416_832
    units = workload(width=256, height=256, steps=1, cfg=1.0, depth=False)
    assert units == pytest.approx(1.18709, abs=1e-5)
    assert tflops(units) == pytest.approx(1.161133821952)


def test_tflops_of_100_units_are_those_of_the_standard_request() -> None:
    assert tflops(standard()) == pytest.approx(97.8, abs=0.05)


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"steps": 6}, {"steps": 7}),
        ({"num_images": 1}, {"num_images": 2}),
        ({"width": 960}, {"width": 1024}),
        ({"height": 960}, {"height": 1024}),
        ({"cfg": 1.0}, {"cfg": 1.01}),
        ({"depth": False}, {"depth": True}),
        ({"adapters": 0}, {"adapters": 1}),
        ({"control_end": 0.5}, {"control_end": 1.0}),
    ],
)
def test_more_of_anything_costs_more(less: dict[str, float], more: dict[str, float]) -> None:
    assert standard(**less) < standard(**more)  # type: ignore[arg-type]


def test_orientation_does_not_matter() -> None:
    assert standard(width=768, height=1344) == standard(width=1344, height=768)


def test_without_guidance_everything_but_the_decoder_halves() -> None:
    decode = 100 * vae_decode_flops(1024, 1024) / STANDARD_FLOPS
    assert standard(cfg=1.0) - decode == pytest.approx((standard() - decode) / 2)


def test_images_share_prompts_and_adapters() -> None:
    one, two = standard(adapters=2), standard(adapters=2, num_images=2)
    shared = 2 * text_encode_flops() + 2 * adapter_merge_flops()
    assert 2 * one - two == pytest.approx(100 * shared / STANDARD_FLOPS)


@pytest.mark.parametrize(
    ("steps", "start", "end", "acts"),
    [
        (6, 0.0, 1.0, 6),
        (6, 0.0, 0.5, 3),
        (6, 0.5, 1.0, 3),
        (6, 0.1, 0.9, 4),  # step 0 begins before 0.1, step 5 ends after 0.9
        (6, 0.4, 0.6, 0),  # no whole step lies within
        (1, 0.0, 0.99, 0),
        (50, 0.0, 1.0, 50),
    ],
)
def test_control_range(steps: int, start: float, end: float, acts: int) -> None:
    assert acting_steps(steps, start, end) == acts
    with_control = standard(steps=steps, control_start=start, control_end=end)
    share = with_control - standard(steps=steps, depth=False)
    assert tflops(share) == pytest.approx(2 * acts * controlnet_flops(1024, 1024) / 1e12)


def test_runs_on_the_standard_library_alone() -> None:
    """The PyWorker has its own small environment: ``-S`` hides site-packages."""
    root = Path(module.__file__).parents[1]
    code = "import experimance_controlnet.workload"
    subprocess.run([sys.executable, "-S", "-c", code], cwd=root, check=True, timeout=60)


def test_is_python_3_10() -> None:
    ast.parse(Path(module.__file__).read_text(), feature_version=(3, 10))


# --- the coefficients, against torch's own count on modules without storage -----------------


def count_flops(run: Callable[[], object]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


SDXL = {
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
ADDED = {"text_embeds": meta(1, 1280), "time_ids": meta(1, 6)}


@cache
def unet() -> UNet2DConditionModel:
    with torch.device("meta"):
        model: UNet2DConditionModel = UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            **SDXL,
        )
    return model


@cache
def controlnet() -> ControlNetModel:
    with torch.device("meta"):
        model: ControlNetModel = ControlNetModel(
            down_block_types=("DownBlock2D",) * 3,
            mid_block_type="UNetMidBlock2D",
            conditioning_embedding_out_channels=(16, 32, 96, 256),
            **SDXL,
        )
    return model


@cache
def vae() -> AutoencoderKL:
    with torch.device("meta"):
        model: AutoencoderKL = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
    return model


def clip_config(width: int, layers: int, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        hidden_act=activation,
    )


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_modules_counted_are_full_size() -> None:
    assert parameters(unet()) == 2_567_463_684
    assert parameters(controlnet()) == 125_690_640
    assert parameters(vae()) == 83_653_863


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_unet_coefficients(width: int, height: int) -> None:
    latents, text = meta(1, 4, height // 8, width // 8), meta(1, 77, 2048)
    counted = count_flops(lambda: unet()(latents, meta(1), text, added_cond_kwargs=ADDED))
    assert unet_flops(width, height) == pytest.approx(counted, rel=1e-4)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_controlnet_coefficients(width: int, height: int) -> None:
    latents, text = meta(1, 4, height // 8, width // 8), meta(1, 77, 2048)
    image = meta(1, 3, height, width)
    counted = count_flops(
        lambda: controlnet()(latents, meta(1), text, image, added_cond_kwargs=ADDED)
    )
    assert controlnet_flops(width, height) == pytest.approx(counted, rel=1e-4)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_vae_decoder_coefficients(width: int, height: int) -> None:
    latents = meta(1, 4, height // 8, width // 8)
    counted = count_flops(lambda: vae().decode(latents))
    assert vae_decode_flops(width, height) == pytest.approx(counted, rel=1e-4)


def test_text_encoder_coefficients() -> None:
    with torch.device("meta"):
        encoders = [
            CLIPTextModel(clip_config(768, 12, "quick_gelu")),
            CLIPTextModelWithProjection(clip_config(1280, 32, "gelu")),
        ]
    tokens = torch.zeros(1, 77, dtype=torch.long, device="meta")
    counted = sum(count_flops(partial(encoder, tokens)) for encoder in encoders)
    assert text_encode_flops() == pytest.approx(counted, rel=1e-4)


def test_adapter_coefficients() -> None:
    """A rank-32 delta, up @ down, for each linear layer of the transformer blocks."""
    blocks = [block for block in unet().modules() if isinstance(block, Transformer2DModel)]
    layers = [x for b in blocks for x in b.modules() if isinstance(x, torch.nn.Linear)]

    def merge() -> None:
        for layer in layers:
            meta(layer.out_features, 32) @ meta(32, layer.in_features)

    assert adapter_merge_flops() == count_flops(merge)
