"""LoRA files: diffusers brings their layouts to one, and each pair of factors is read by its key.

Nothing is injected into a module: that takes seconds, and the libraries skip what they do not know.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_pipeline import StableDiffusionXLLoraLoaderMixin
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import safe_open

from experimance_controlnet.catalog.safetensors_file import verify_safetensors
from experimance_controlnet.engine.checkpoint import SdxlModules
from experimance_controlnet.engine.faults import is_fatal, is_out_of_memory
from experimance_controlnet.engine.kernels.merge import pad_rank
from experimance_controlnet.engine.resting import AtRest, Key
from experimance_controlnet.errors import BadAdapterError, BadWeightsError

_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_ALPHA_TAIL = re.compile(r"(_lora|\.lora_linear_layer|\.lora)?(\.down\.weight)?\.alpha$")
# How diffusers' converter calls attention layers in its keys, and how the modules do.
_UNET_LAYERS = {"to_out": "to_out.0"}
_TEXT_LAYERS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_LAYERS = (torch.nn.Linear, torch.nn.Conv2d)
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
"""What an SDXL adapter may change."""


@dataclass(frozen=True, slots=True, eq=False)
class LowRankDelta:
    """What an adapter adds to one weight: ``scale * up @ down``, folded to the weight's shape.

    The rank is the file's, filled up with zeros to what the kernels want.
    """

    down: torch.Tensor  # (rank, in_features x kernel), in the precision of the file
    up: torch.Tensor  # (out_features, rank)
    scale: float  # alpha / the file's rank


@dataclass(frozen=True, slots=True, eq=False)
class LoraFactors:
    """One adapter: per component, module path -> delta. Equal only to itself."""

    name: str
    deltas: Mapping[str, Mapping[str, LowRankDelta]]

    def touches_text(self) -> bool:
        """Whether prompts encode differently under it."""
        return any(self.deltas[component] for component in COMPONENTS if component != "unet")

    def at_rest(self) -> AtRest:
        """The factors by component, and by the layer's path with ``_DOWN`` or ``_UP`` behind it."""
        tensors: dict[Key, torch.Tensor] = {}
        for component, path, delta in self._layers():
            tensors[component, path + _DOWN] = delta.down
            tensors[component, path + _UP] = delta.up
        scales = {(component, path): delta.scale for component, path, delta in self._layers()}
        return AtRest(LoraFrame(self.name, scales), tensors, on_host={})

    def _layers(self) -> Iterator[tuple[str, str, LowRankDelta]]:
        for component, deltas in self.deltas.items():
            for path, delta in deltas.items():
                yield component, path, delta


@dataclass(frozen=True, slots=True)
class LoraFrame:
    """An adapter without its factors."""

    name: str
    scales: Mapping[Key, float]
    """By component and path of the layer."""

    def build(self, tensors: Mapping[Key, torch.Tensor]) -> LoraFactors:
        """The adapter anew, around the tensors of :meth:`LoraFactors.at_rest`."""
        deltas: dict[str, dict[str, LowRankDelta]] = {component: {} for component in COMPONENTS}
        for (component, path), scale in self.scales.items():
            down, up = tensors[component, path + _DOWN], tensors[component, path + _UP]
            deltas[component][path] = LowRankDelta(down, up, scale)
        return LoraFactors(self.name, deltas)


def load_lora(name: str, path: Path, modules: SdxlModules, device: torch.device) -> LoraFactors:
    """Read a LoRA file in kohya's or diffusers' layout, text-encoder parts included.

    Raises:
        BadAdapterError: no safetensors, no LoRA, or not for this model's architecture.
    """
    try:
        verify_safetensors(path)
        _refuse_dora(name, path)
        # From the path: only then are alphas in the file's metadata seen.
        state_dict, alphas, metadata = StableDiffusionXLLoraLoaderMixin.lora_state_dict(
            str(path.parent),
            weight_name=path.name,
            use_safetensors=True,
            local_files_only=True,
            unet_config=modules.unet.config,
            return_lora_metadata=True,
        )
        deltas = {
            component: _read_component(component, modules, state_dict, alphas, metadata, device)
            for component in COMPONENTS
        }
    except (OSError, ValueError, KeyError, IndexError, RuntimeError, BadWeightsError) as error:
        if is_out_of_memory(error) or is_fatal(error):
            raise
        raise BadAdapterError(
            "loras", f"The LoRA {name} does not fit the model it was asked for."
        ) from error
    _check_complete(name, state_dict, deltas)
    return LoraFactors(name, deltas)


def _refuse_dora(name: str, path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        if any("dora_scale" in key for key in file.keys()):  # noqa: SIM118 - no mapping
            raise BadAdapterError("loras", f"The LoRA {name} is a DoRA, which cannot be merged.")


def _read_component(
    component: str,
    modules: SdxlModules,
    state_dict: Mapping[str, torch.Tensor],
    alphas: Mapping[str, float] | None,
    metadata: Mapping[str, Any] | None,
    device: torch.device,
) -> dict[str, LowRankDelta]:
    """What is no pair of factors of a layer stays out; :func:`_check_complete` misses it."""
    tensors = _of(component, state_dict)
    if not tensors:
        return {}
    module: torch.nn.Module = getattr(modules, component)
    tensors = _name_as_peft(component, module, tensors)
    layers = dict(module.named_modules())
    scale_of = _scales(_alphas_by_layer(component, alphas), _of(component, metadata or {}))
    deltas: dict[str, LowRankDelta] = {}
    for key, down in tensors.items():
        path = key.removesuffix(_DOWN)
        layer, up = layers.get(path), tensors.get(path + _UP)
        if path != key and up is not None and isinstance(layer, _LAYERS):
            _check_shapes(path, down, up, layer.weight)
            scale = scale_of(path, len(down))
            up, down = pad_rank(up.flatten(1), down.flatten(1))
            deltas[path] = LowRankDelta(down.to(device), up.to(device), scale)
    return deltas


def _of(component: str, items: Mapping[str, Any]) -> dict[str, Any]:
    prefix = f"{component}."
    return {k.removeprefix(prefix): v for k, v in items.items() if k.startswith(prefix)}


def _name_as_peft(
    component: str, module: torch.nn.Module, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """``<path of the layer>.lora_A.weight`` for down, ``.lora_B.weight`` for up."""
    if component == "unet":
        unet: dict[str, torch.Tensor] = convert_unet_state_dict_to_peft(tensors)
        return unet
    if not all(key.endswith((_DOWN, _UP)) for key in tensors):
        tensors = convert_state_dict_to_peft(convert_state_dict_to_diffusers(tensors))
    if not hasattr(module, "text_model"):  # transformers from 5.6 on
        tensors = {key.removeprefix("text_model."): tensor for key, tensor in tensors.items()}
    return tensors


def _scales(
    alphas: Mapping[str, float], metadata: Mapping[str, Any]
) -> Callable[[str, int], float]:
    """The scale of a layer by its path and rank: alpha / rank by kohya's alpha or the metadata's.

    Without either alpha is the rank, as everywhere.
    """
    config = _config(metadata) if metadata else None

    def scale_of(path: str, rank: int) -> float:
        if path in alphas:
            return alphas[path] / rank
        return 1.0 if config is None else _configured_scale(config, path, rank)

    return scale_of


def _config(metadata: Mapping[str, Any]) -> LoraConfig:
    try:
        config = LoraConfig(**metadata)
    except TypeError as error:  # a field that peft does not know
        raise ValueError("metadata that are no LoraConfig") from error
    if config.use_dora:
        raise ValueError("a DoRA, which cannot be merged")
    return config


def _configured_scale(config: LoraConfig, path: str, rank: int) -> float:
    """As peft computes it when it injects a layer."""
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    configured = ranks.get(get_pattern_key(list(ranks), path), config.r)
    if configured != rank:
        raise ValueError(f"{path} has rank {rank}; the metadata say {configured}")
    alpha = alphas.get(get_pattern_key(list(alphas), path), config.lora_alpha)
    return float(alpha) / (math.sqrt(rank) if config.use_rslora else rank)


def _check_shapes(path: str, down: torch.Tensor, up: torch.Tensor, weight: torch.Tensor) -> None:
    """A convolution's down has the kernel of the weight, its up is 1 x 1."""
    rank = down.shape[0]
    kernel = (1,) * (weight.ndim - 2)
    if rank == 0 or down.shape[1:] != weight.shape[1:] or up.shape != (len(weight), rank, *kernel):
        shapes = tuple(up.shape), tuple(down.shape), tuple(weight.shape)
        raise ValueError("{}: up {}, down {} for a weight of {}".format(path, *shapes))


def _alphas_by_layer(component: str, alphas: Mapping[str, float] | None) -> dict[str, float]:
    """Kohya's alphas by the path of the module they belong to.

    The libraries would match them to layers by patterns that miss attention and text encoders, and
    give those the file's most common alpha instead.
    """
    names = _UNET_LAYERS if component == "unet" else _TEXT_LAYERS
    found: dict[str, float] = {}
    for key, alpha in (alphas or {}).items():
        if key.startswith(f"{component}."):
            path = _ALPHA_TAIL.sub("", key.removeprefix(f"{component}."))
            parent, _, layer = path.replace(".processor.", ".").rpartition(".")
            path = f"{parent}.{names.get(layer, layer)}" if parent else layer
            found[path] = float(alpha)
            found[path.removeprefix("text_model.")] = float(alpha)  # transformers from 5.6 on
    return found


def _check_complete(
    name: str,
    state_dict: Mapping[str, torch.Tensor],
    deltas: Mapping[str, Mapping[str, LowRankDelta]],
) -> None:
    """Half an adapter is a wrong one."""
    layers = sum(len(component) for component in deltas.values())
    if layers == 0 or 2 * layers != len(state_dict):
        raise BadAdapterError(
            "loras",
            f"Of the {len(state_dict)} tensors of the LoRA {name} only {2 * layers} are layers of "
            "the model.",
        )
