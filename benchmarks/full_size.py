"""A random SDXL family of full size on disk: what a download would bring, except for the training.

The shapes, files and formats are the public ones: the base model's folder and its original
single-file layout, the small depth ControlNet, era LoRAs of rank 32 in kohya's layout over all 722
linear layers of the UNet's transformer blocks. The cost of a picture depends on nothing else. The
tokenizers are those of the embedded family; the text encoders keep their full vocabulary of 49408.

``TINY`` is the same at the embedded family's widths, for machines without a GPU.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

import experimance_controlnet
from benchmarks import weights
from benchmarks.timing import progress
from tools.embedded_model import architecture
from tools.embedded_model.adapters import (
    ATTENTION,
    FEED_FORWARD,
    PROJECTIONS,
    AdapterRecipe,
    write_adapter,
)
from tools.embedded_model.single_file import save_single_file

Config = dict[str, Any]

MODEL, MODEL_IN_ONE_FILE, CONTROLNET = "lightning", "lightning_file", "sdxl_small"
ERAS = {"first_era": ("lora_1", "lora_2"), "second_era": ("lora_3", "lora_4")}
"""Two LoRAs an era, none in common: to switch is to change every adapter."""
ERA_WEIGHTS = (0.8, 0.4)

_EMBEDDED = Path(experimance_controlnet.__file__).parent / "catalog" / "embedded" / "base"
_TOKENIZERS = ("tokenizer", "tokenizer_2")
_CATALOG = "catalog.toml"
_RECIPE = "# weights: recipe 1\n"
"""To be counted up when the weights come out differently: an older folder is then written anew."""


@dataclass(frozen=True, slots=True)
class Family:
    """Widths and depths, as the libraries' configurations, and the picture's side."""

    name: str
    side_px: int
    unet: Config
    controlnet: Config
    vae: Config
    text_encoder: Config
    text_encoder_2: Config
    vocabulary: int | None
    """None: as many as the tokenizer has."""
    lora_rank: int


_SHARED: Config = {
    "in_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "norm_num_groups": 32,
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_TEXT: Config = {"max_position_embeddings": 77}

FULL = Family(
    name="full",
    side_px=1024,
    unet=_SHARED
    | {
        "sample_size": 128,
        "out_channels": 4,
        "down_block_types": architecture.UNET["down_block_types"],
        "up_block_types": architecture.UNET["up_block_types"],
    },
    controlnet=_SHARED
    | {
        "conditioning_channels": 3,
        "conditioning_embedding_out_channels": (16, 32, 96, 256),
        "down_block_types": architecture.CONTROLNET["down_block_types"],
        "mid_block_type": architecture.CONTROLNET["mid_block_type"],
    },
    vae=architecture.VAE | {"block_out_channels": (128, 256, 512, 512), "norm_num_groups": 32},
    text_encoder=_TEXT
    | {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "hidden_act": "quick_gelu",
        "projection_dim": 768,
    },
    text_encoder_2=_TEXT
    | {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "hidden_act": "gelu",
        "projection_dim": 1280,
    },
    vocabulary=49408,
    lora_rank=32,
)

TINY = Family(
    name="tiny",
    side_px=256,
    unet=architecture.UNET,
    controlnet=architecture.CONTROLNET,
    vae=architecture.VAE,
    text_encoder=architecture.TEXT_ENCODER,
    text_encoder_2=architecture.TEXT_ENCODER_2,
    vocabulary=None,
    lora_rank=4,
)


@dataclass(frozen=True, slots=True)
class FamilyFiles:
    """A family on disk."""

    family: Family
    catalog: Path
    """The catalogue whose paths lead to everything else."""

    @property
    def base(self) -> Path:
        """The model in diffusers' layout."""
        return self.catalog.parent / "base"

    @property
    def controlnet(self) -> Path:
        return self.catalog.parent / "controlnet"

    def lora(self, name: str) -> Path:
        return self.catalog.parent / "loras" / f"{name}.safetensors"


def ensure_family(family: Family, models_dir: Path, device: torch.device) -> FamilyFiles:
    """Write the family below ``models_dir`` unless it is there: 14 GB at full size, both layouts of
    the model counted. The weights are drawn on ``device`` and differ from one kind to another.
    """
    folder = models_dir / family.name
    files = FamilyFiles(family, folder / _CATALOG)
    # written last: with it everything is there
    if files.catalog.is_file() and files.catalog.read_text("utf-8").startswith(_RECIPE):
        progress(f"family: {folder} is there already")
        return files
    shutil.rmtree(folder, ignore_errors=True)
    _write_base(files, device)
    _write_unet_and_loras(files, device)
    controlnet = _empty(ControlNetModel, family.controlnet, device)
    weights.draw_controlnet(controlnet, seed=2)
    _save(controlnet, files.controlnet)
    progress("family: the single file in the original layout")
    save_single_file(files.base, folder / "lightning.safetensors")
    files.catalog.write_text(_RECIPE + _catalog(), "utf-8")
    return files


def _write_base(files: FamilyFiles, device: torch.device) -> None:
    """All of the model's folder but the UNet."""
    family = files.family
    files.base.mkdir(parents=True)
    shutil.copy(_EMBEDDED / "model_index.json", files.base)
    for folder in ("scheduler", *_TOKENIZERS):
        shutil.copytree(_EMBEDDED / folder, files.base / folder)
    vae = _empty(AutoencoderKL, family.vae, device)
    weights.draw_vae(vae, seed=3)
    _save(vae, files.base / "vae")
    encoders = (
        ("text_encoder", CLIPTextModel, family.text_encoder, 4),
        ("text_encoder_2", CLIPTextModelWithProjection, family.text_encoder_2, 5),
    )
    for (name, kind, config, seed), tokenizer in zip(encoders, _TOKENIZERS, strict=True):
        encoder = _empty_encoder(kind, config | _tokens(family, tokenizer), device)
        weights.draw_text_encoder(encoder, config["num_hidden_layers"], seed)
        _save(encoder, files.base / name)


def _write_unet_and_loras(files: FamilyFiles, device: torch.device) -> None:
    family = files.family
    unet = _empty(UNet2DConditionModel, family.unet, device)
    weights.draw_unet(unet, seed=1)
    _save(unet, files.base / "unet")
    for seed, name in enumerate((lora for era in ERAS.values() for lora in era), start=11):
        recipe = AdapterRecipe(
            name=name,
            seed=seed,
            layout="kohya",
            rank=family.lora_rank,
            targets=(ATTENTION, FEED_FORWARD, PROJECTIONS),
            alpha=family.lora_rank / 2,
        )
        progress(f"family: {name}")
        # on the CPU, where the recipe draws its factors; only names and shapes are looked at
        write_adapter(files.controlnet.with_name("loras"), recipe, {"unet": unet})


def _tokens(family: Family, tokenizer: str) -> Config:
    """What a text encoder's configuration says about its vocabulary."""
    vocabulary = CLIPTokenizer.from_pretrained(_EMBEDDED / tokenizer)
    return {
        "vocab_size": family.vocabulary or len(vocabulary),
        "bos_token_id": vocabulary.bos_token_id,
        "eos_token_id": vocabulary.eos_token_id,
        "pad_token_id": vocabulary.pad_token_id,
    }


def _empty(kind: Any, config: Config, device: torch.device) -> Any:
    """A module in fp16 whose weights are still to be drawn."""
    with torch.device("meta"):
        module = kind(**config)
    return module.half().to_empty(device=device)


def _empty_encoder(kind: Any, config: Config, device: torch.device) -> Any:
    with torch.device("meta"):
        module = kind(CLIPTextConfig(**config))
    return module.half().to_empty(device=device)


def _save(module: Any, folder: Path) -> None:
    parameters = sum(parameter.numel() for parameter in module.parameters())
    progress(f"family: {folder.name}, {parameters / 1e6:.1f} M parameters")
    # one file, as single_file.py reads it
    module.save_pretrained(folder, max_shard_size="20GB")


def _catalog() -> str:
    scheduler = "\n".join(
        f"{key} = {_toml(architecture.SCHEDULER[key])}"
        for key in ("beta_schedule", "beta_start", "beta_end", "timestep_spacing", "steps_offset")
    )
    sources = {
        MODEL: 'source = { uri = "base" }',
        MODEL_IN_ONE_FILE: (
            'source = { uri = "lightning.safetensors" }\nbase_source = { uri = "base" }'
        ),
    }
    tables = [
        f'[models.{name}]\nsteps = 6\ncfg = 2.0\nscheduler = "euler"\n{source}\n\n'
        f"[models.{name}.scheduler_config]\n{scheduler}"
        for name, source in sources.items()
    ]
    tables.append(f'[controlnets.{CONTROLNET}]\nsource = {{ uri = "controlnet" }}')
    for era, loras in ERAS.items():
        tables += [
            f'[loras.{lora}]\nsource = {{ uri = "loras/{lora}.safetensors" }}' for lora in loras
        ]
        adapters = ", ".join(map("{} = {}".format, loras, ERA_WEIGHTS))
        tables.append(f"[eras.{era}]\nadapters = {{ {adapters} }}")
    return "\n\n".join(tables) + "\n"


def _toml(value: str | float) -> str:
    """A string or number as TOML writes it."""
    return f'"{value}"' if isinstance(value, str) else str(value)
