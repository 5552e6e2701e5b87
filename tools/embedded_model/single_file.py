"""A diffusers folder as one file in the original SDXL layout, as checkpoints are usually shared.

The names are those of the first public implementation: ``model.diffusion_model`` (UNet),
``first_stage_model`` (VAE), ``conditioner.embedders.0`` (CLIP as transformers names it) and
``conditioner.embedders.1`` (as OpenCLIP does). diffusers' ``from_single_file`` reads them back.
The UNet must be SDXL-shaped: attention in each block that upsamples.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
Replacements = tuple[tuple[str, str], ...]

_OUTSIDE_BLOCKS: Replacements = (
    (r"^time_embedding\.linear_1\b", "time_embed.0"),
    (r"^time_embedding\.linear_2\b", "time_embed.2"),
    (r"^add_embedding\.linear_1\b", "label_emb.0.0"),
    (r"^add_embedding\.linear_2\b", "label_emb.0.2"),
    (r"^conv_in\b", "input_blocks.0.0"),
    (r"^conv_norm_out\b", "out.0"),
    (r"^conv_out\b", "out.2"),
)
_IN_RESNET: Replacements = (
    (r"^norm1\b", "in_layers.0"),
    (r"^conv1\b", "in_layers.2"),
    (r"^time_emb_proj\b", "emb_layers.1"),
    (r"^norm2\b", "out_layers.0"),
    (r"^conv2\b", "out_layers.3"),
    (r"^conv_shortcut\b", "skip_connection"),
)
_IN_VAE: Replacements = (
    (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.up_blocks\.(\d+)\.resnets\.", r".up.\1.block."),
    (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", r".up.\1.upsample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
)
_IN_OPEN_CLIP: Replacements = (
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.", ".attn."),
)


def to_original_layout(folder: Path, base: Path | None = None) -> Tensors:
    """All tensors of the diffusers ``folder`` under their original names, in their own dtype.

    Components that ``folder`` lacks are taken from ``base``.
    """
    parts: dict[str, tuple[str, Callable[[Path], Tensors]]] = {
        "unet": ("model.diffusion_model.", _unet),
        "vae": ("first_stage_model.", _vae),
        "text_encoder": ("conditioner.embedders.0.transformer.", _clip),
        "text_encoder_2": ("conditioner.embedders.1.model.", _open_clip),
    }
    result: Tensors = {}
    for component, (prefix, convert) in parts.items():
        home = folder if base is None or (folder / component).is_dir() else base
        result |= {prefix + name: value for name, value in convert(home / component).items()}
    return result


def save_single_file(folder: Path, path: Path, base: Path | None = None) -> None:
    """Write :func:`to_original_layout` to the safetensors file ``path``."""
    save_file(to_original_layout(folder, base), path, {"format": "pt"})


def original_unet_name(name: str, layers_per_block: int) -> str:
    """The original name of a UNet's module or parameter, given and returned without prefix."""
    found = re.match(r"(down|mid|up)_block(?:s\.(\d+))?\.([a-z]+)\.(\d+)\.(.+)", name)
    if found is None:
        return _replace(name, _OUTSIDE_BLOCKS)
    side, block, kind, layer, inner = found.groups()
    if kind == "resnets":
        inner = _replace(inner, _IN_RESNET)
    if side == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(layer)}.{inner}"
    # A block of either side fills this many entries in the original's flat lists. The first
    # entry of the down side is the input convolution.
    entry = int(block) * (layers_per_block + 1)
    if kind == "downsamplers":
        return f"input_blocks.{entry + layers_per_block + 1}.0.{inner.replace('conv', 'op')}"
    if kind == "upsamplers":
        return f"output_blocks.{entry + layers_per_block}.2.{inner}"
    slot = 0 if kind == "resnets" else 1
    if side == "down":
        return f"input_blocks.{entry + int(layer) + 1}.{slot}.{inner}"
    return f"output_blocks.{entry + int(layer)}.{slot}.{inner}"


def _unet(folder: Path) -> Tensors:
    layers = _config(folder)["layers_per_block"]
    return {original_unet_name(name, layers): value for name, value in _weights(folder).items()}


def _vae(folder: Path) -> Tensors:
    last_level = len(_config(folder)["block_out_channels"]) - 1
    result: Tensors = {}
    for name, value in _weights(folder).items():
        original = _replace(name, _IN_VAE)
        # The original counts the decoder's levels from the picture, diffusers from the latents.
        original = re.sub(r"\.up\.(\d+)", lambda m: f".up.{last_level - int(m[1])}", original)
        is_matrix = ".mid.attn_1." in original and value.ndim == 2
        result[original] = value[:, :, None, None] if is_matrix else value
    return result


def _clip(folder: Path) -> Tensors:
    result = _clip_weights(folder)
    positions = len(result["text_model.embeddings.position_embedding.weight"])
    # Of no use, but real files hold it and every reader has to cope.
    result["text_model.embeddings.position_ids"] = torch.arange(positions)[None]
    return result


def _open_clip(folder: Path) -> Tensors:
    weights = _clip_weights(folder)
    result = {"text_projection": weights.pop("text_projection.weight").T.contiguous()}
    for name in [name for name in weights if ".q_proj." in name]:
        joined = name.replace(".q_proj.", ".in_proj_")
        parts = [weights.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        weights[joined] = torch.cat(parts)
    return result | {_replace(name, _IN_OPEN_CLIP): value for name, value in weights.items()}


def _clip_weights(folder: Path) -> Tensors:
    """A text encoder's weights, all of the encoder proper under ``text_model.``.

    Newer transformers save the encoder without projection under bare names.
    """
    return {
        name if name.startswith("text_") else f"text_model.{name}": value
        for name, value in _weights(folder).items()
    }


def _weights(folder: Path) -> Tensors:
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    return config


def _replace(name: str, replacements: Replacements) -> str:
    for pattern, replacement in replacements:
        name = re.sub(pattern, replacement, name)
    return name
