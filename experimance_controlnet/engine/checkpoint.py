"""Model files to modules on the device. Only safetensors are ever read: nothing is unpickled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
    StableDiffusionXLPipeline,
)
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from experimance_controlnet.catalog.safetensors_file import verify_safetensors
from experimance_controlnet.engine.faults import is_fatal, is_out_of_memory
from experimance_controlnet.errors import BadWeightsError

# Progress bars would only garble the server's log.
diffusers_logging.disable_progress_bar()
transformers_logging.disable_progress_bar()

_COMPONENTS: dict[str, Any] = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}
_TOKENIZERS = ("tokenizer", "tokenizer_2")


@dataclass(frozen=True, slots=True)
class SdxlModules:
    """The parts of one SDXL checkpoint, on one device, in evaluation mode."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection
    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer


def load_checkpoint(
    source: Path, base: Path | None, device: torch.device, dtype: torch.dtype
) -> SdxlModules:
    """Read an SDXL model.

    ``source``: a diffusers folder, or a ``.safetensors`` file in the original SDXL layout.
    ``base``: the diffusers folder that supplies what ``source`` lacks.

    Raises:
        BadWeightsError: a file is missing, damaged or does not fit its configuration.
    """
    with _as_bad_weights(source):
        if source.is_dir():
            parts = _read_folder(source, base, dtype)
        elif base is None:
            raise BadWeightsError(f"{source.name} needs a base_source for configs and tokenizers.")
        else:
            parts = _read_single_file(source, base, dtype)
        for name in _COMPONENTS:
            _finish(name, parts[name], device)
        vae_dtype = _vae_dtype(parts["vae"], dtype)
        if vae_dtype != dtype:
            parts["vae"].to(dtype=vae_dtype)
    return SdxlModules(**parts)


def load_controlnet(folder: Path, device: torch.device, dtype: torch.dtype) -> ControlNetModel:
    """Read a ControlNet in diffusers' layout.

    Raises:
        BadWeightsError: as :func:`load_checkpoint`.
    """
    with _as_bad_weights(folder):
        controlnet: ControlNetModel = _read_component(ControlNetModel, folder, dtype)
        _finish("controlnet", controlnet, device)
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


def _read_folder(source: Path, base: Path | None, dtype: torch.dtype) -> dict[str, Any]:
    def holding(part: str) -> Path:
        for folder in (source, base):
            if folder is not None and (folder / part).is_dir():
                return folder / part
        raise BadWeightsError(f"{source.name} has no folder {part}, nor has its base_source.")

    parts: dict[str, Any] = {
        name: _read_component(component, holding(name), dtype)
        for name, component in _COMPONENTS.items()
    }
    for name in _TOKENIZERS:
        parts[name] = CLIPTokenizer.from_pretrained(holding(name), local_files_only=True)
    return parts


def _read_component(component: Any, folder: Path, dtype: torch.dtype) -> Any:
    weights = sorted(folder.glob("*.safetensors"))
    for file in weights:
        verify_safetensors(file)
    only_half = weights and all(".fp16." in file.name for file in weights)
    module, info = component.from_pretrained(
        folder,
        variant="fp16" if only_half else None,
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    if info["missing_keys"]:
        raise BadWeightsError(
            f"{folder.name} lacks {len(info['missing_keys'])} tensors, "
            f"{sorted(info['missing_keys'])[0]} among them."
        )
    return module


def _read_single_file(source: Path, base: Path, dtype: torch.dtype) -> dict[str, Any]:
    if source.suffix != ".safetensors":
        # diffusers would unpickle any other suffix
        raise BadWeightsError(f"{source.name} is not a .safetensors file.")
    verify_safetensors(source)
    pipeline = StableDiffusionXLPipeline.from_single_file(
        str(source), config=str(base), dtype=dtype, local_files_only=True
    )
    return {name: pipeline.components[name] for name in (*_COMPONENTS, *_TOKENIZERS)}


def _finish(name: str, module: torch.nn.Module, device: torch.device) -> None:
    for key, tensor in module.named_parameters():
        if tensor.is_meta:
            raise BadWeightsError(f"The file has no weights for {name}.{key}.")
    module.to(device).to(memory_format=_layout(device))  # type: ignore[call-overload]
    module.eval().requires_grad_(False)


def _layout(device: torch.device) -> torch.memory_format:
    """Convolutions are faster in channels_last, and on the CPU everything is.

    On CUDA torch's GroupNorm copies in that layout, which costs more than the convolutions gain:
    on an H200 the VAE takes 144 ms against 99.
    """
    return torch.contiguous_format if device.type == "cuda" else torch.channels_last


def _vae_dtype(vae: AutoencoderKL, dtype: torch.dtype) -> torch.dtype:
    """SDXL's own VAE overflows in fp16 (``force_upcast``); bf16 has the range of fp32."""
    return torch.bfloat16 if dtype == torch.float16 and vae.config["force_upcast"] else dtype
