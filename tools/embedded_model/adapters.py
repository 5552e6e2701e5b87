"""Random LoRAs for the embedded family, in the file layouts that are met in the wild."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tools.embedded_model.architecture import UNET
from tools.embedded_model.single_file import original_unet_name

Component = Literal["unet", "text_encoder", "text_encoder_2"]
Layout = Literal["kohya", "kohya_diffusers", "diffusers"]

ATTENTION = r"attn[12]\.to_(q|k|v|out\.0)$"
FEED_FORWARD = r"ff\.net\.(0\.proj|2)$"
PROJECTIONS = r"attentions\.\d\.proj_(in|out)$"
CONVOLUTIONS = r"(_blocks\.1\.resnets\.[01]\.conv[12]|up_blocks\.0\.upsamplers\.0\.conv)$"
TEXT = r"(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])$"

_KOHYA_PREFIX: dict[Component, str] = {
    "unet": "lora_unet",
    "text_encoder": "lora_te1",
    "text_encoder_2": "lora_te2",
}


@dataclass(frozen=True, slots=True)
class AdapterRecipe:
    """One LoRA: which layers it touches and how its file names them.

    ``kohya`` is the layout of sd-scripts: the UNet's original block names, ``lora_down`` and
    ``lora_up``, and an ``alpha`` that scales the update by ``alpha / rank``. ``kohya_diffusers``
    is the same with diffusers' block names, as other trainers write it. ``diffusers`` is what
    its ``save_lora_weights`` writes. ``strength`` is the standard deviation of what the update
    adds to a layer's output where the input has unit variance.
    """

    name: str
    seed: int
    layout: Layout
    rank: int
    targets: tuple[str, ...] = (ATTENTION, FEED_FORWARD)
    text_targets: tuple[str, ...] = ()
    alpha: float | None = None
    strength: float = 0.3


RECIPES = (
    AdapterRecipe(
        name="drone",
        seed=11,
        layout="kohya",
        rank=8,
        targets=(ATTENTION, FEED_FORWARD, PROJECTIONS, CONVOLUTIONS),
        alpha=4.0,
        strength=0.2,
    ),
    AdapterRecipe(
        name="experimance",
        seed=12,
        layout="kohya_diffusers",
        rank=4,
        text_targets=(TEXT,),
        alpha=4.0,
        strength=0.2,
    ),
    AdapterRecipe("experimance_wilderness", 13, "diffusers", 4),
    AdapterRecipe("experimance_historical", 14, "diffusers", 8, (ATTENTION,)),
    AdapterRecipe("experimance_future", 15, "diffusers", 4),
)


def write_adapter(
    folder: Path, recipe: AdapterRecipe, models: Mapping[Component, nn.Module]
) -> None:
    """Write ``<name>.safetensors`` into ``folder``, fp16, of names and shapes as in ``models``."""
    generator = torch.Generator().manual_seed(recipe.seed)
    tensors: dict[str, Tensor] = {}
    for component, model in models.items():
        targets = recipe.targets if component == "unet" else recipe.text_targets
        for name, layer in _targeted(model, targets):
            down, up = _draw(layer, recipe, generator)
            tensors |= _named(component, name, down, up, recipe)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f"{recipe.name}.safetensors", {"format": "pt"})


def _targeted(
    model: nn.Module, targets: tuple[str, ...]
) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    for name, module in model.named_modules():
        if any(re.search(target, name) for target in targets):
            assert isinstance(module, nn.Linear | nn.Conv2d)
            yield name, module


def _draw(
    layer: nn.Linear | nn.Conv2d, recipe: AdapterRecipe, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Down (rank, in[, kernel]) and up (out, rank[, 1, 1]) of one layer."""
    shape = layer.weight.shape
    down = torch.randn(recipe.rank, *shape[1:], generator=generator)
    up = torch.randn(shape[0], recipe.rank, *(1 for _ in shape[2:]), generator=generator)
    scale = 1.0 if recipe.alpha is None else recipe.alpha / recipe.rank
    down *= layer.weight[0].numel() ** -0.5
    up *= recipe.rank**-0.5 * recipe.strength / scale
    return down, up


def _named(
    component: Component, name: str, down: Tensor, up: Tensor, recipe: AdapterRecipe
) -> dict[str, Tensor]:
    """The tensors of one layer under the names of the recipe's layout, in fp16."""
    if recipe.layout == "diffusers":
        stem, ends = f"{component}.{name}", ("lora_A.weight", "lora_B.weight")
    else:
        if component != "unet":
            name = f"text_model.{name.removeprefix('text_model.')}"
        elif recipe.layout == "kohya":
            name = original_unet_name(name, UNET["layers_per_block"])
        stem = f"{_KOHYA_PREFIX[component]}_{name.replace('.', '_')}"
        ends = ("lora_down.weight", "lora_up.weight")
    tensors = {f"{stem}.{ends[0]}": down.half(), f"{stem}.{ends[1]}": up.half()}
    if recipe.alpha is not None:
        tensors[f"{stem}.alpha"] = torch.tensor(recipe.alpha, dtype=torch.float16)
    return tensors
