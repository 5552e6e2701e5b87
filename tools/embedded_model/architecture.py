"""The shapes of the embedded family, as tables.

Everything is SDXL's own: block types, two text encoders whose hidden states are joined, pooled
text and size conditioning, latents of 4 channels at an eighth of the picture's size. Only widths
and depths shrink. Two relations are not free, because files in the original SDXL layout depend on
them: the encoders have different widths (the loader tells them apart by it), and the UNet has
three levels without attention in the first.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

Config = dict[str, Any]

TEXT_WIDTH = 32
TEXT_WIDTH_2 = 64  # also the width of the pooled embedding
TIME_ID_WIDTH = 32  # sinusoidal features of each of the six size and crop numbers
MAX_TOKENS = 77

_SHARED: Config = {
    "in_channels": 4,
    "block_out_channels": (24, 32, 40),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 1, 2),
    # As in SDXL the numbers of heads, although diffusers calls them head dims.
    "attention_head_dim": (1, 2, 5),
    "norm_num_groups": 8,
    "cross_attention_dim": TEXT_WIDTH + TEXT_WIDTH_2,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": TIME_ID_WIDTH,
    "projection_class_embeddings_input_dim": 6 * TIME_ID_WIDTH + TEXT_WIDTH_2,
}

UNET: Config = _SHARED | {
    "sample_size": 128,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}

# The small kind of depth ControlNet: no attention anywhere.
CONTROLNET: Config = _SHARED | {
    "conditioning_channels": 3,
    "conditioning_embedding_out_channels": (8, 8, 16, 32),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "DownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
}

VAE: Config = {
    "sample_size": 1024,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (12, 24, 32, 32),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}

_TEXT: Config = {"max_position_embeddings": MAX_TOKENS, "projection_dim": TEXT_WIDTH_2}

TEXT_ENCODER: Config = _TEXT | {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 4 * TEXT_WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "hidden_act": "quick_gelu",
}

TEXT_ENCODER_2: Config = _TEXT | {
    "hidden_size": TEXT_WIDTH_2,
    "intermediate_size": 4 * TEXT_WIDTH_2,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "hidden_act": "gelu",
}

SCHEDULER: Config = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "prediction_type": "epsilon",
}


def make_unet() -> UNet2DConditionModel:
    """A UNet; about 1.2 million parameters."""
    unet: UNet2DConditionModel = UNet2DConditionModel(**UNET)
    return unet


def make_controlnet() -> ControlNetModel:
    """A ControlNet whose residuals fit :func:`make_unet`."""
    controlnet: ControlNetModel = ControlNetModel(**CONTROLNET)
    return controlnet


def make_vae() -> AutoencoderKL:
    """An autoencoder between pictures and latents of an eighth of their size."""
    vae: AutoencoderKL = AutoencoderKL(**VAE)
    return vae


def make_text_encoder(special_tokens: Config) -> CLIPTextModel:
    """The narrow encoder. ``special_tokens`` are the ids and the size of its vocabulary."""
    return CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER, **special_tokens))


def make_text_encoder_2(special_tokens: Config) -> CLIPTextModelWithProjection:
    """The wide encoder, which also gives the pooled embedding."""
    return CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_ENCODER_2, **special_tokens))
