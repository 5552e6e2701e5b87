"""The benchmark's family: of SDXL's size, and drawn so that an error in anything shows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks import weights
from benchmarks.full_size import ERAS, FULL, TINY, ensure_family
from benchmarks.standard_request import standard_request
from experimance_controlnet.catalog.registry import load_catalog
from tools.embedded_model import architecture
from tools.embedded_model.adapters import ATTENTION, FEED_FORWARD, PROJECTIONS

CPU = torch.device("cpu")


def on_meta(kind: Any, config: Any) -> Any:
    with torch.device("meta"):
        return kind(**config) if isinstance(config, dict) else kind(config)


@pytest.mark.parametrize(
    ("kind", "config", "millions"),
    [
        (UNet2DConditionModel, FULL.unet, 2567.46),
        (ControlNetModel, FULL.controlnet, 125.69),
        (AutoencoderKL, FULL.vae, 83.65),
        (CLIPTextModel, CLIPTextConfig(**FULL.text_encoder, vocab_size=49408), 123.06),
        (
            CLIPTextModelWithProjection,
            CLIPTextConfig(**FULL.text_encoder_2, vocab_size=49408),
            694.66,
        ),
    ],
    ids=["unet", "controlnet", "vae", "text_encoder", "text_encoder_2"],
)
def test_it_has_the_public_models_parameters(kind: Any, config: Any, millions: float) -> None:
    parameters = sum(parameter.numel() for parameter in on_meta(kind, config).parameters())
    assert parameters / 1e6 == pytest.approx(millions, rel=1e-3)


def test_its_loras_touch_all_linear_layers_of_the_transformer_blocks() -> None:
    unet = on_meta(UNet2DConditionModel, FULL.unet)
    targets = "|".join((ATTENTION, FEED_FORWARD, PROJECTIONS))
    assert sum(bool(re.search(targets, name)) for name, _ in unet.named_modules()) == 722


def test_no_parameter_is_forgotten() -> None:
    """A layer left as allocated could hold anything; a bias of zero hides that it was dropped."""
    for make, draw in (
        (architecture.make_unet, weights.draw_unet),
        (architecture.make_controlnet, weights.draw_controlnet),
        (architecture.make_vae, weights.draw_vae),
    ):
        module: Any = make()
        for parameter in module.parameters():
            torch.nn.init.constant_(parameter, torch.nan)
        draw(module, seed=1)
        for name, parameter in module.named_parameters():
            assert parameter.isfinite().all(), name
            if not name.startswith("conv_in."):  # of a few channels, and some are to be zero
                assert parameter.std() > 0, name


def test_it_is_written_once_and_is_a_catalogue(tmp_path: Path) -> None:
    files = ensure_family(TINY, tmp_path, CPU)
    catalog = load_catalog(str(files.catalog))
    assert set(catalog.eras) == set(ERAS)
    for era, spec in catalog.eras.items():
        asked = standard_request(TINY, 0, era).adapters
        assert [(use.lora, use.weight) for use in spec.adapters] == [
            (adapter.name, adapter.weight) for adapter in asked
        ]
    assert not set(ERAS["first_era"]) & set(ERAS["second_era"])
    with safe_open(files.base / "unet" / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert file.get_tensor("conv_in.weight").dtype == torch.float16
    written_ns = files.catalog.stat().st_mtime_ns
    ensure_family(TINY, tmp_path, CPU)
    assert files.catalog.stat().st_mtime_ns == written_ns


def test_no_two_standard_requests_share_a_prompt() -> None:
    requests = [standard_request(TINY, number, None) for number in range(60)]
    assert len({request.prompt for request in requests}) == len(requests)
    assert len({request.seed for request in requests}) == len(requests)
