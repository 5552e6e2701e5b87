"""One-file checkpoints in the original SDXL layout: which tensors are whose, and diffusers' names.

The conversions are diffusers' own; they work on names, wherever the tensors are. Only OpenCLIP's
joined projections are copied, since they are cut in three: 0.3 GB in fp16, for a moment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)

from experimance_controlnet.engine.weights import Placement, Tensors, read_tensors

_OPEN_CLIP = "conditioner.embedders.1.model."
_PREFIXES: Mapping[str, tuple[str, ...]] = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("conditioner.embedders.0.transformer.",),
    "text_encoder_2": (_OPEN_CLIP,),
}
_CONVERTERS: Mapping[str, Callable[[Any, Tensors], Tensors]] = {
    "unet": lambda unet, tensors: convert_ldm_unet_checkpoint(tensors, unet.config),
    "vae": lambda vae, tensors: convert_ldm_vae_checkpoint(tensors, vae.config),
    "text_encoder": lambda _, tensors: convert_ldm_clip_checkpoint(tensors),
    "text_encoder_2": lambda encoder, tensors: convert_open_clip_checkpoint(
        encoder, tensors, prefix=_OPEN_CLIP
    ),
}


def read_part(name: str, module: Any, file: Path, placement: Placement) -> Tensors:
    """The tensors of the component ``name`` under the names that ``module`` has for them.

    ``module`` may be empty: only its configuration is looked at. What else the file holds, such as
    averaged weights from training, is not read.

    Raises:
        BadWeightsError: the file is not whole.
        KeyError: it is of another architecture.
    """
    tensors = read_tensors([file], placement, _PREFIXES[name])
    return _CONVERTERS[name](module, tensors)
