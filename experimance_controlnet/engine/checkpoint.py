"""Model files to modules on the device. Only safetensors are ever read: nothing is unpickled."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors import SafetensorError
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from experimance_controlnet.engine.faults import is_fatal, is_out_of_memory
from experimance_controlnet.engine.original_layout import read_part
from experimance_controlnet.engine.resting import Key, ModuleFrame, module_tensors
from experimance_controlnet.engine.weights import (
    ByteCount,
    Placement,
    build_empty,
    fill,
    read_tensors,
    weight_files,
)
from experimance_controlnet.errors import BadWeightsError

log = structlog.get_logger()

_COMPONENTS: dict[str, Any] = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}
JOINED = re.compile(r"\.(attn1\.to_[qkv]|attn2\.to_[kv]|time_emb_proj|emb_layers\.1)\.weight$")
"""Weights of UNet and ControlNet that ``network/`` makes part of larger ones. They wait for that in
the page cache: on the device, what they leave behind would be gaps of 0.7 GB in all."""
_TOKENIZERS = ("tokenizer", "tokenizer_2")


@dataclass(frozen=True, slots=True)
class SdxlModules:
    """The parts of one SDXL checkpoint in evaluation mode: on one device, or parked."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection
    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer


@dataclass(frozen=True, slots=True)
class CheckpointFrame:
    """An SDXL checkpoint without its tensors."""

    modules: Sequence[ModuleFrame]
    tokenizers: Mapping[str, CLIPTokenizer]

    @classmethod
    def of(cls, modules: SdxlModules) -> CheckpointFrame:
        """The frame of modules that were read."""
        return cls(
            [ModuleFrame.of(name, getattr(modules, name)) for name in _COMPONENTS],
            {name: getattr(modules, name) for name in _TOKENIZERS},
        )

    def build(self, tensors: Mapping[Key, torch.Tensor]) -> SdxlModules:
        """The modules anew, around the tensors of :func:`checkpoint_tensors`."""
        parts: dict[str, Any] = {frame.name: frame.build(tensors) for frame in self.modules}
        parts |= self.tokenizers
        return SdxlModules(**parts)


def checkpoint_tensors(modules: SdxlModules) -> dict[Key, torch.Tensor]:
    """All weights, where they are."""
    tensors: dict[Key, torch.Tensor] = {}
    for name in _COMPONENTS:
        tensors |= module_tensors(name, getattr(modules, name))
    return tensors


def load_checkpoint(
    source: Path,
    base: Path | None,
    device: torch.device,
    dtype: torch.dtype,
    parked: Collection[str] = (),
    count: ByteCount | None = None,
) -> SdxlModules:
    """Read an SDXL model.

    ``source``: a diffusers folder, or a ``.safetensors`` file in the original SDXL layout.
    ``base``: the diffusers folder that supplies what ``source`` lacks. ``parked``: the components
    that stay in the host's memory. ``count`` learns of what is read.

    Raises:
        BadWeightsError: a file is missing, damaged or does not fit its configuration.
    """
    started_s = time.monotonic()
    with _as_bad_weights(source):
        folders = _folders(source, base)
        parts: dict[str, Any] = {}
        for name in _COMPONENTS:
            place = torch.device("cpu") if name in parked else device
            placement = Placement(place, dtype, JOINED if name == "unet" else None, count)
            parts[name] = _load_part(name, source, _holding(name, folders), placement)
        for name in _TOKENIZERS:
            parts[name] = CLIPTokenizer.from_pretrained(
                _holding(name, folders), local_files_only=True
            )
    _log_speed(source, [parts[name] for name in _COMPONENTS], started_s)
    return SdxlModules(**parts)


def load_controlnet(
    folder: Path, device: torch.device, dtype: torch.dtype, count: ByteCount | None = None
) -> ControlNetModel:
    """Read a ControlNet in diffusers' layout.

    Raises:
        BadWeightsError: as :func:`load_checkpoint`.
    """
    started_s = time.monotonic()
    with _as_bad_weights(folder):
        controlnet: ControlNetModel = build_empty(ControlNetModel, folder)
        files = weight_files(ControlNetModel, folder)
        placement = Placement(device, dtype, JOINED, count)
        fill(folder.name, controlnet, read_tensors(files, placement))
    _log_speed(folder, [controlnet], started_s)
    return controlnet


@contextmanager
def _as_bad_weights(source: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError, RuntimeError) as error:
        if is_out_of_memory(error) or is_fatal(error):
            raise
        raise BadWeightsError(
            f"{source.name} cannot be loaded as SDXL: its files are damaged or of another model; "
            "the server's log has the cause."
        ) from error


def _folders(source: Path, base: Path | None) -> list[Path]:
    """Where components are looked for, in this order."""
    if not source.is_dir():
        if base is None:
            raise BadWeightsError(f"{source.name} needs a base_source for configs and tokenizers.")
        if source.suffix != ".safetensors":
            raise BadWeightsError(f"{source.name} is not a .safetensors file.")
        return [base]
    return [source] if base is None else [source, base]


def _holding(part: str, folders: list[Path]) -> Path:
    for folder in folders:
        if (folder / part).is_dir():
            return folder / part
    raise BadWeightsError(
        f"There is no folder {part} in {' or '.join(folder.name for folder in folders)}."
    )


def _load_part(name: str, source: Path, folder: Path, placement: Placement) -> Any:
    """One component: its configuration is in ``folder``, and so are its weights, unless ``source``
    is one file with everything.
    """
    component = _COMPONENTS[name]
    module = build_empty(component, folder)
    if name == "vae":
        placement = replace(placement, dtype=_vae_dtype(module, placement.dtype))
    if source.is_dir():
        tensors = read_tensors(weight_files(component, folder), placement)
    else:
        tensors = read_part(name, module, source, placement)
    fill(name, module, tensors)
    return module


def _vae_dtype(vae: AutoencoderKL, dtype: torch.dtype) -> torch.dtype:
    """SDXL's own VAE overflows in fp16 (``force_upcast``); bf16 has the range of fp32."""
    return torch.bfloat16 if dtype == torch.float16 and vae.config["force_upcast"] else dtype


def _log_speed(source: Path, modules: list[torch.nn.Module], started_s: float) -> None:
    seconds = time.monotonic() - started_s
    weights_bytes = sum(
        tensor.nbytes for module in modules for tensor in module.state_dict().values()
    )
    log.info(
        "weights_read",
        source=source.name,
        weights_bytes=weights_bytes,
        seconds=round(seconds, 3),
        bytes_per_s=round(weights_bytes / seconds),
    )
