"""Adapters: parsed by diffusers and peft, merged in place into the live weights, unmerged exactly.

Live peft layers cost several times the speed of merged weights. So the deltas are added to the
weights themselves, each time from a pristine copy of the layer: nothing accumulates, the order of
switches does not matter, and the storage of a weight never moves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_pipeline import StableDiffusionXLLoraLoaderMixin
from peft.tuners.lora import LoraLayer
from safetensors import safe_open

from experimance_controlnet.catalog.safetensors_file import verify_safetensors
from experimance_controlnet.engine.checkpoint import SdxlModules
from experimance_controlnet.engine.faults import is_fatal, is_out_of_memory
from experimance_controlnet.errors import BadAdapterError, BadWeightsError

_ADAPTER = "adapter"
_ALPHA_TAIL = re.compile(r"(_lora|\.lora_linear_layer|\.lora)?(\.down\.weight)?\.alpha$")
# How diffusers' converter calls attention layers in its keys, and how the modules do.
_UNET_LAYERS = {"to_out": "to_out.0"}
_TEXT_LAYERS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
"""What an SDXL adapter may change."""


@dataclass(frozen=True, slots=True, eq=False)
class LowRankDelta:
    """What an adapter adds to one weight: ``scale * up @ down``, folded to the weight's shape."""

    down: torch.Tensor  # (rank, in_features x kernel)
    up: torch.Tensor  # (out_features, rank)
    scale: float  # alpha / rank

    def add_to(self, weight: torch.Tensor, strength: float) -> None:
        """In place; ``weight`` is fp32."""
        weight.view(weight.shape[0], -1).addmm_(
            self.up.float(), self.down.float(), alpha=self.scale * strength
        )


@dataclass(frozen=True, slots=True, eq=False)
class LoraFactors:
    """One adapter: per component, module path -> delta. Equal only to itself."""

    name: str
    deltas: Mapping[str, Mapping[str, LowRankDelta]]

    def touches_text(self) -> bool:
        """Whether prompts encode differently under it."""
        return any(self.deltas[component] for component in COMPONENTS if component != "unet")


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
    state_dict: dict[str, torch.Tensor],
    alphas: dict[str, float] | None,
    metadata: dict[str, Any] | None,
    device: torch.device,
) -> dict[str, LowRankDelta]:
    """Let the libraries inject the adapter into an empty twin of the module, and read it off."""
    if not any(key.startswith(f"{component}.") for key in state_dict):
        return {}
    live: Any = getattr(modules, component)
    twin = _empty_twin(live)
    options: dict[str, Any] = {"adapter_name": _ADAPTER, "metadata": metadata}
    if component == "unet":
        twin.load_lora_adapter(state_dict, prefix=component, low_cpu_mem_usage=True, **options)
    else:
        StableDiffusionXLLoraLoaderMixin.load_lora_into_text_encoder(
            state_dict,
            network_alphas=None,
            text_encoder=twin,
            prefix=component,
            low_cpu_mem_usage=True,
            **options,
        )
    by_layer = _alphas_by_layer(component, alphas)
    return {
        path: _read_layer(layer, live.get_parameter(f"{path}.weight"), by_layer.get(path), device)
        for path, layer in twin.named_modules()
        if isinstance(layer, LoraLayer)
    }


def _empty_twin(module: Any) -> Any:
    """Same class and configuration, weights uninitialised: memory that is never touched."""
    with torch.device("meta"):
        twin = (
            type(module).from_config(module.config)
            if hasattr(module, "from_config")
            else type(module)(module.config)
        )
    return twin.to_empty(device="cpu")


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


def _read_layer(
    layer: Any, weight: torch.Tensor, alpha: float | None, device: torch.device
) -> LowRankDelta:
    down, up = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
    delta = LowRankDelta(
        down=down.detach().flatten(1).to(device),
        up=up.detach().flatten(1).to(device),
        # without an alpha of its own: what the metadata say, else alpha = rank
        scale=float(layer.scaling[_ADAPTER]) if alpha is None else alpha / len(down),
    )
    if delta.up.shape[0] * delta.down.shape[1] != weight.numel():
        raise ValueError(f"delta {tuple(up.shape)} x {tuple(down.shape)} for {tuple(weight.shape)}")
    return delta


def _check_complete(
    name: str,
    state_dict: Mapping[str, torch.Tensor],
    deltas: Mapping[str, Mapping[str, LowRankDelta]],
) -> None:
    """The libraries only warn about what they do not use; half an adapter is a wrong one."""
    layers = sum(len(component) for component in deltas.values())
    if layers == 0 or 2 * layers != len(state_dict):
        raise BadAdapterError(
            "loras",
            f"Of the {len(state_dict)} tensors of the LoRA {name} only {2 * layers} are layers of "
            "the model.",
        )


class AdapterMerger:
    """Keeps one module's weights equal to pristine weights plus the wanted adapters."""

    def __init__(self, component: str, module: torch.nn.Module) -> None:
        """``component`` is the module's key in :attr:`LoraFactors.deltas`."""
        self._component = component
        self._module = module
        self._pristine: dict[str, torch.Tensor] = {}
        self._merged: tuple[tuple[LoraFactors, float], ...] | None = ()
        self._altered: set[str] = set()

    def apply(self, adapters: Sequence[tuple[LoraFactors, float]]) -> None:
        """Make exactly these adapters, at these strengths, the ones that are merged.

        Costs nothing where they are already.
        """
        wanted = tuple(adapters)
        if wanted == self._merged:
            return
        self._merged = None  # until done: an error half-way must not leave a claim behind
        touched: set[str] = set()
        for factors, _ in adapters:
            touched |= factors.deltas[self._component].keys()
        for path in sorted(self._altered - touched):
            self._weight(path).copy_(self._pristine[path])
        for path in sorted(touched):
            self._merge_layer(path, adapters)
        self._altered = touched
        self._merged = wanted

    def _merge_layer(self, path: str, adapters: Sequence[tuple[LoraFactors, float]]) -> None:
        weight = self._weight(path)
        if path not in self._pristine:
            self._pristine[path] = weight.detach().clone()
        self._altered.add(path)  # from here on there is something to put back
        total = self._pristine[path].float().contiguous().clone()
        for factors, strength in adapters:
            delta = factors.deltas[self._component].get(path)
            if delta is not None:
                delta.add_to(total, strength)
        weight.copy_(total)

    def _weight(self, path: str) -> torch.Tensor:
        return self._module.get_parameter(f"{path}.weight")
