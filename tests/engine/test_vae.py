"""A frame that is not a number, or black, never leaves the decoder."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from experimance_controlnet.catalog.specs import Catalog
from experimance_controlnet.catalog.store import ModelStore
from experimance_controlnet.engine.checkpoint import load_checkpoint
from experimance_controlnet.engine.graphs import Recorder
from experimance_controlnet.engine.network.decoder import VaeDecoder
from experimance_controlnet.engine.request import PixelImage
from experimance_controlnet.engine.vae import ImageDecoder
from experimance_controlnet.errors import NanOutputError
from tests.engine.oracle import mean_difference

CPU = torch.device("cpu")


class SpoiltNetwork(VaeDecoder):
    """Its frames in the given precisions become ``value``."""

    def __init__(self, vae: AutoencoderKL, value: float, precisions: set[torch.dtype]) -> None:
        super().__init__(vae)
        self._value = value
        self._precisions = precisions

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        frame = super().__call__(latents)
        return torch.full_like(frame, self._value) if latents.dtype in self._precisions else frame


class SpoiltModule(torch.nn.Module):
    """The same around diffusers' decoder, which the second try takes."""

    def __init__(
        self, decoder: torch.nn.Module, value: float, precisions: set[torch.dtype]
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.value = value
        self.precisions = precisions

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        frame: torch.Tensor = self.decoder(sample)
        return torch.full_like(frame, self.value) if sample.dtype in self.precisions else frame


def make_decoder(vae: AutoencoderKL) -> ImageDecoder:
    return ImageDecoder(vae, VaeDecoder(vae), Recorder(CPU))


def spoilt_decoder(vae: AutoencoderKL, value: float, precisions: set[torch.dtype]) -> ImageDecoder:
    """A decoder of the VAE both of whose tries may be spoilt; changes ``vae``."""
    network = SpoiltNetwork(vae, value, precisions)
    module: Any = vae
    module.decoder = SpoiltModule(module.decoder, value, precisions)
    return ImageDecoder(vae, network, Recorder(CPU))


def decode(vae: AutoencoderKL, latents: torch.Tensor) -> tuple[PixelImage, list[str]]:
    return make_decoder(vae).decode(latents).result()


@pytest.fixture(scope="module")
def full(catalog: Catalog, store: ModelStore) -> AutoencoderKL:
    folder = store.path(catalog.models["base"].source)
    assert folder is not None
    return load_checkpoint(folder, None, CPU, torch.float32).vae


@pytest.fixture
def half(full: AutoencoderKL) -> AutoencoderKL:
    vae = copy.deepcopy(full)
    torch.nn.Module.to(vae, torch.bfloat16)
    return vae


def _in_full(vae: AutoencoderKL) -> AutoencoderKL:
    full = copy.deepcopy(vae)
    torch.nn.Module.to(full, torch.float32)
    return full


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(1))


def test_half_precision_is_close(
    full: AutoencoderKL, half: AutoencoderKL, latents: torch.Tensor
) -> None:
    with torch.inference_mode():
        expected, _ = decode(full, latents)
        found, notes = decode(half, latents)
    assert notes == []
    assert mean_difference(found, expected) < 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, -7.0])
def test_a_spoilt_frame_is_decoded_again_in_full(
    half: AutoencoderKL, latents: torch.Tensor, value: float
) -> None:
    with torch.inference_mode():
        expected, _ = decode(_in_full(half), latents)
        decoder = spoilt_decoder(half, value, {torch.bfloat16})
        before = {name: tensor.clone() for name, tensor in half.named_parameters()}
        found, notes = decoder.decode(latents).result()
    assert notes == ["vae_fp32"]
    assert mean_difference(found, expected) < 0.5
    for name, tensor in half.named_parameters():
        assert torch.equal(tensor, before[name]) and tensor.dtype == torch.bfloat16


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), -1.0])
@pytest.mark.parametrize("precision", ["half", "full"])
def test_spoilt_in_full_precision_too_is_an_error(
    full: AutoencoderKL, half: AutoencoderKL, latents: torch.Tensor, value: float, precision: str
) -> None:
    vae = half if precision == "half" else copy.deepcopy(full)
    with torch.inference_mode():
        frame = spoilt_decoder(vae, value, {torch.bfloat16, torch.float32}).decode(latents)
        with pytest.raises(NanOutputError):
            frame.result()


def test_a_dark_picture_passes(full: AutoencoderKL, latents: torch.Tensor) -> None:
    vae = copy.deepcopy(full)
    with torch.inference_mode():
        pixels, notes = spoilt_decoder(vae, -0.99, {torch.float32}).decode(latents).result()
    assert notes == []
    assert 0 < pixels.max() < 5


def test_nan_latents_are_an_error(full: AutoencoderKL) -> None:
    with torch.inference_mode(), pytest.raises(NanOutputError):
        decode(full, torch.full((1, 4, 32, 32), float("nan")))


def test_pixels(full: AutoencoderKL, latents: torch.Tensor) -> None:
    with torch.inference_mode():
        pixels, _ = decode(full, latents)
    assert pixels.shape == (256, 256, 3)
    assert pixels.dtype == np.uint8


def test_frames_share_no_memory(full: AutoencoderKL, latents: torch.Tensor) -> None:
    other = latents.flip(-1)
    with torch.inference_mode():
        decoder = make_decoder(full)
        frames = [decoder.decode(latents), decoder.decode(other)]  # both before any result
        (first, _), (second, _) = (frame.result() for frame in frames)
        assert mean_difference(first, decode(full, latents)[0]) == 0
        assert mean_difference(second, decode(full, other)[0]) == 0
    assert mean_difference(first, second) > 1


def test_recorded_or_not_the_pixels_are_the_same(
    full: AutoencoderKL, latents: torch.Tensor
) -> None:
    with torch.inference_mode():
        decoder = make_decoder(full)
        # plain, recorded, replayed
        first, *others = (decoder.decode(latents).result()[0] for _ in range(3))
    for pixels in others:
        assert np.array_equal(pixels, first)


def test_sizes_do_not_mix(full: AutoencoderKL, latents: torch.Tensor) -> None:
    wide = torch.cat([latents, latents.flip(-1)], dim=-1)
    with torch.inference_mode():
        decoder = make_decoder(full)
        for sample in (latents, wide, latents, wide):
            pixels, _ = decoder.decode(sample).result()
            assert np.array_equal(pixels, decode(full, sample)[0])
