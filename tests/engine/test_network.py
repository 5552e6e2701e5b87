"""The fast forward passes against diffusers' own, on the same modules."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from experimance_controlnet.catalog.specs import Catalog
from experimance_controlnet.catalog.store import ModelStore
from experimance_controlnet.engine.checkpoint import (
    SdxlModules,
    load_checkpoint,
    load_controlnet,
)
from experimance_controlnet.engine.network.decoder import VaeDecoder
from experimance_controlnet.engine.network.unet import (
    ControlNetwork,
    ControlResiduals,
    UnetNetwork,
    add_residuals,
)
from experimance_controlnet.errors import BadWeightsError
from tools.embedded_model import architecture

CPU = torch.device("cpu")
ROWS, HEIGHT, WIDTH = 3, 32, 24
STRENGTHS = [0.8, 0.0, 1.3]


@pytest.fixture(scope="module")
def modules(catalog: Catalog, store: ModelStore) -> SdxlModules:
    """Not to be changed: networks are built over copies."""
    folder = store.path(catalog.models["base"].source)
    assert folder is not None
    return load_checkpoint(folder, None, CPU, torch.float32)


@pytest.fixture
def unet(modules: SdxlModules) -> UNet2DConditionModel:
    return copy.deepcopy(modules.unet)


@pytest.fixture
def controlnet(catalog: Catalog, store: ModelStore) -> ControlNetModel:
    folder = store.path(catalog.controlnets["sdxl_small"].source)
    assert folder is not None
    return load_controlnet(folder, CPU, torch.float32)


@pytest.fixture
def large_controlnet() -> ControlNetModel:
    """With attention, and another one than ``controlnet``."""
    kinds = {
        "down_block_types": architecture.UNET["down_block_types"],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
    }
    torch.manual_seed(3)
    controlnet: Any = ControlNetModel(**(architecture.CONTROLNET | kinds)).eval()
    outputs = [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]
    for layer in [*outputs, controlnet.controlnet_cond_embedding.conv_out]:
        torch.nn.init.normal_(layer.weight, std=0.2)  # zeros before training
    model: ControlNetModel = controlnet
    return model


@dataclass(frozen=True)
class Inputs:
    """Of several rows, in which everything differs."""

    sample: torch.Tensor
    timesteps: torch.Tensor
    prompt_embeds: torch.Tensor
    pooled: torch.Tensor
    time_ids: torch.Tensor
    image: torch.Tensor
    strength: torch.Tensor

    @property
    def text(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.prompt_embeds, self.pooled, self.time_ids

    @property
    def options(self) -> dict[str, Any]:
        """What diffusers takes besides sample and timesteps."""
        return {
            "encoder_hidden_states": self.prompt_embeds,
            "added_cond_kwargs": {"text_embeds": self.pooled, "time_ids": self.time_ids},
            "return_dict": False,
        }


@pytest.fixture
def inputs() -> Inputs:
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    text_width = architecture.TEXT_WIDTH + architecture.TEXT_WIDTH_2
    sizes = [[8.0 * HEIGHT + row, 8.0 * WIDTH, 0.0, row, 256.0, 320.0] for row in range(ROWS)]
    return Inputs(
        sample=randn(ROWS, 4, HEIGHT, WIDTH),
        timesteps=torch.tensor([900.0, 500.0, 3.0]),
        prompt_embeds=randn(ROWS, architecture.MAX_TOKENS, text_width),
        pooled=randn(ROWS, architecture.TEXT_WIDTH_2),
        time_ids=torch.tensor(sizes),
        image=randn(ROWS, 3, 8 * HEIGHT, 8 * WIDTH).sigmoid(),
        strength=torch.tensor(STRENGTHS),
    )


Residuals = tuple[list[torch.Tensor], torch.Tensor]


@torch.inference_mode()
def diffusers_control(controlnet: Any, inputs: Inputs, strength: torch.Tensor) -> Residuals:
    """Each row's residuals at its strength."""
    down, middle = controlnet(
        inputs.sample, inputs.timesteps, controlnet_cond=inputs.image, **inputs.options
    )
    scale = strength[:, None, None, None]
    return [tensor * scale for tensor in down], middle * scale


@torch.inference_mode()
def diffusers_noise(unet: Any, inputs: Inputs, residuals: Residuals | None = None) -> torch.Tensor:
    down, middle = (None, None) if residuals is None else residuals
    noise: torch.Tensor = unet(
        inputs.sample,
        inputs.timesteps,
        down_block_additional_residuals=down,
        mid_block_additional_residual=middle,
        **inputs.options,
    )[0]
    return noise


@torch.inference_mode()
def control(network: ControlNetwork, inputs: Inputs, strength: torch.Tensor) -> ControlResiduals:
    text, features = network.text_constants(*inputs.text), network.features(inputs.image)
    return network(inputs.sample, inputs.timesteps, text, features, strength)


@torch.inference_mode()
def noise(
    network: UnetNetwork, inputs: Inputs, residuals: ControlResiduals | None = None
) -> torch.Tensor:
    text = network.text_constants(*inputs.text)
    return network(inputs.sample, inputs.timesteps, text, lambda: residuals)


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the order of sums, measured against the largest value."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


def differ(first: torch.Tensor, second: torch.Tensor) -> bool:
    """By far more than :func:`assert_near` lets pass."""
    return bool((first - second).abs().max() > 1e-3 * second.abs().max())


def test_unet(unet: UNet2DConditionModel, inputs: Inputs) -> None:
    expected = diffusers_noise(unet, inputs)
    assert_near(noise(UnetNetwork(unet), inputs), expected)


@pytest.mark.parametrize("kind", ["controlnet", "large_controlnet"])
def test_controlnet(kind: str, inputs: Inputs, request: pytest.FixtureRequest) -> None:
    module = request.getfixturevalue(kind)
    down, middle = diffusers_control(module, inputs, torch.ones(ROWS))
    found = control(ControlNetwork(module), inputs, inputs.strength)
    for mine, theirs in zip([*found.down, found.middle], [*down, middle], strict=True):
        assert_near(mine, theirs)  # not scaled yet
    assert torch.equal(found.strength, inputs.strength)


@pytest.mark.parametrize("kind", ["controlnet", "large_controlnet"])
def test_unet_with_control(
    kind: str, unet: UNet2DConditionModel, inputs: Inputs, request: pytest.FixtureRequest
) -> None:
    module = request.getfixturevalue(kind)
    plain = diffusers_noise(unet, inputs)
    expected = diffusers_noise(unet, inputs, diffusers_control(module, inputs, inputs.strength))
    residuals = control(ControlNetwork(module), inputs, inputs.strength)
    found = noise(UnetNetwork(unet), inputs, residuals)
    assert_near(found, expected)
    assert [differ(*rows) for rows in zip(found, plain, strict=True)] == [True, False, True]


def test_two_controlnets(
    unet: UNet2DConditionModel,
    controlnet: ControlNetModel,
    large_controlnet: ControlNetModel,
    inputs: Inputs,
) -> None:
    strengths = inputs.strength, inputs.strength.flip(0) + 0.1
    parts = list(zip((controlnet, large_controlnet), strengths, strict=True))
    (down, middle), (other_down, other_middle) = (
        diffusers_control(module, inputs, strength) for module, strength in parts
    )
    both = [sum(pair, torch.zeros(())) for pair in zip(down, other_down, strict=True)]
    expected = diffusers_noise(unet, inputs, (both, middle + other_middle))
    residuals = [control(ControlNetwork(module), inputs, strength) for module, strength in parts]
    network = UnetNetwork(unet)
    found = noise(network, inputs, add_residuals(residuals))
    assert_near(found, expected)
    assert all(differ(found, noise(network, inputs, part)) for part in residuals)


def test_residuals_of_one_controlnet_or_none(controlnet: ControlNetModel, inputs: Inputs) -> None:
    residuals = control(ControlNetwork(controlnet), inputs, inputs.strength)
    assert add_residuals([residuals]) is residuals
    assert add_residuals([]) is None


def test_rows_do_not_mix(unet: UNet2DConditionModel, inputs: Inputs) -> None:
    network = UnetNetwork(unet)
    together = noise(network, inputs)
    for row in range(ROWS):
        alone = Inputs(**{name: value[row : row + 1] for name, value in vars(inputs).items()})
        assert_near(noise(network, alone), together[row : row + 1])


@pytest.mark.parametrize("size", [(16, 24), (9, 5)])
def test_vae(modules: SdxlModules, size: tuple[int, int]) -> None:
    vae: Any = copy.deepcopy(modules.vae)
    latents = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        [expected] = vae.decode(latents, return_dict=False)
        found = VaeDecoder(vae)(latents)
        [after] = vae.decode(latents, return_dict=False)
    assert found.shape == (2, 3, 8 * size[0], 8 * size[1])
    assert_near(found, expected)
    assert_near(after, expected)


def test_diffusers_still_gives_the_same(
    unet: UNet2DConditionModel, controlnet: ControlNetModel, inputs: Inputs
) -> None:
    state = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    expected = diffusers_noise(unet, inputs)
    down, middle = diffusers_control(controlnet, inputs, inputs.strength)
    UnetNetwork(unet)
    ControlNetwork(controlnet)
    assert_near(diffusers_noise(unet, inputs), expected)
    found_down, found_middle = diffusers_control(controlnet, inputs, inputs.strength)
    for found, before in zip([*found_down, found_middle], [*down, middle], strict=True):
        assert_near(found, before)
    assert unet.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in unet.state_dict().items())


_BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"


@pytest.mark.parametrize(
    "path",
    [
        *(f"{_BLOCK}.attn1.{layer}.weight" for layer in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"{_BLOCK}.attn2.{layer}.weight" for layer in ("to_q", "to_k", "to_v")),
        f"{_BLOCK}.ff.net.0.proj.weight",
        "down_blocks.1.attentions.0.proj_in.weight",
        "mid_block.attentions.0.transformer_blocks.1.attn2.to_v.weight",
        "up_blocks.0.attentions.2.transformer_blocks.1.attn1.to_v.weight",
        "down_blocks.0.resnets.0.time_emb_proj.weight",
        "up_blocks.2.resnets.2.time_emb_proj.weight",
        "up_blocks.1.resnets.0.conv_shortcut.weight",
        "down_blocks.1.resnets.0.conv1.weight",
        "down_blocks.0.downsamplers.0.conv.weight",
        "up_blocks.0.upsamplers.0.conv.weight",
        "conv_out.weight",
        "time_embedding.linear_1.weight",
        "add_embedding.linear_2.weight",
    ],
)
def test_a_weight_changed_in_place_acts_in_both(
    unet: UNet2DConditionModel, inputs: Inputs, path: str
) -> None:
    network = UnetNetwork(unet)
    before = noise(network, inputs)
    with torch.inference_mode():
        unet.get_parameter(path).mul_(-3)
    expected = diffusers_noise(unet, inputs)
    assert_near(noise(network, inputs), expected)
    assert (before - expected).abs().max() > 1e-4 * expected.abs().max()


def test_another_networks_weights_stay(modules: SdxlModules, inputs: Inputs) -> None:
    """Copies made before the weights were fused share nothing."""
    first, second = copy.deepcopy(modules.unet), copy.deepcopy(modules.unet)
    network = UnetNetwork(first)
    UnetNetwork(second)
    before = noise(network, inputs)
    with torch.inference_mode():
        second.get_parameter(f"{_BLOCK}.attn1.to_q.weight").mul_(-3)
    assert torch.equal(noise(network, inputs), before)


_OF_BOTH: list[dict[str, Any]] = [
    {"addition_embed_type": None},
    {"act_fn": "gelu"},
    {"resnet_time_scale_shift": "scale_shift"},
    {"class_embed_type": "timestep"},
    {"down_block_types": ("DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D")},
]


@pytest.mark.parametrize(
    "options",
    [
        *_OF_BOTH,
        {"addition_embed_type": "text"},
        {"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 96},
        {"mid_block_scale_factor": 2.0},
        {"mid_block_type": None},
        {"down_block_types": ("ResnetDownsampleBlock2D", *("CrossAttnDownBlock2D",) * 2)},
        {"downsample_padding": 0},
        {"only_cross_attention": True},
        {"dual_cross_attention": True},
        {"center_input_sample": True},
        {"time_embedding_act_fn": "silu"},
    ],
    ids=str,
)
def test_an_unusual_unet_is_refused(options: dict[str, Any]) -> None:
    unet = UNet2DConditionModel(**(architecture.UNET | options))
    with pytest.raises(BadWeightsError, match="not built as SDXL"):
        UnetNetwork(unet)


@pytest.mark.parametrize(
    "options",
    [
        *_OF_BOTH,
        {"global_pool_conditions": True},
        {"controlnet_conditioning_channel_order": "bgr"},
    ],
    ids=str,
)
def test_an_unusual_controlnet_is_refused(options: dict[str, Any]) -> None:
    controlnet = ControlNetModel(**(architecture.CONTROLNET | options))
    with pytest.raises(BadWeightsError, match="not built as SDXL"):
        ControlNetwork(controlnet)


@pytest.mark.parametrize(
    "options",
    [
        {"act_fn": "gelu"},
        {"mid_block_add_attention": False},
        {"up_block_types": (*("UpDecoderBlock2D",) * 3, "AttnUpDecoderBlock2D")},
    ],
    ids=str,
)
def test_an_unusual_vae_is_refused(options: dict[str, Any]) -> None:
    vae = AutoencoderKL(**(architecture.VAE | options))
    with pytest.raises(BadWeightsError, match="not built as SDXL"):
        VaeDecoder(vae)


@pytest.mark.parametrize(
    "options",
    [{"use_linear_projection": False}, {"timestep_post_act": "silu"}, {"flip_sin_to_cos": False}],
    ids=str,
)
def test_harmless_options_are_followed(options: dict[str, Any], inputs: Inputs) -> None:
    torch.manual_seed(4)
    unet = UNet2DConditionModel(**(architecture.UNET | options)).eval()
    expected = diffusers_noise(unet, inputs)
    assert_near(noise(UnetNetwork(unet), inputs), expected)
