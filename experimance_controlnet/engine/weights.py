"""Weights from safetensors straight into modules on the device: there is never a second copy.

A module is built without memory, on torch's meta device. Each tensor of its files is read, brought
to the device, cast and laid out by itself, and then becomes the module's parameter. Nothing
process-wide is swapped meanwhile: the meta device is the calling thread's alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from experimance_controlnet.catalog.safetensors_file import verify_safetensors
from experimance_controlnet.errors import BadWeightsError

Tensors = dict[str, torch.Tensor]

_VARIANTS = ("", ".fp16")  # in order of preference


class ByteCount:
    """How far a load is. Written by the thread that loads, read by any."""

    def __init__(self, total: int) -> None:
        """``total`` bytes are expected, about."""
        self._total = total
        self._placed = 0

    def add(self, placed: int) -> None:
        """So many bytes more are where they belong."""
        self._placed += placed

    @property
    def share(self) -> float:
        """0..1"""
        return min(1.0, self._placed / max(1, self._total))


@dataclass(frozen=True, slots=True)
class Placement:
    """Where weights go, and in which precision."""

    device: torch.device
    dtype: torch.dtype
    waiting: re.Pattern[str] | None = None
    """Names of tensors in files that stay in the host's memory for now."""
    count: ByteCount | None = None
    """Is told of each tensor."""

    @property
    def devices(self) -> set[torch.device]:
        """All that :meth:`device_of` may say."""
        return {self.device} if self.waiting is None else {self.device, torch.device("cpu")}

    def device_of(self, name: str) -> torch.device:
        """Where the tensor of that name goes."""
        waits = self.waiting is not None and self.waiting.search(name)
        return torch.device("cpu") if waits else self.device

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` is on its device already. Integers keep their type.

        Convolutions (4 dimensions) become channels_last, as their kernels want them.
        """
        dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
        layout = torch.channels_last if tensor.ndim == 4 else torch.preserve_format
        placed = tensor.to(dtype=dtype, memory_format=layout)
        if self.count is not None:
            self.count.add(tensor.nbytes)
        return placed


def build_empty(component: Any, folder: Path) -> Any:
    """A module of the class ``component``, configured by ``folder``, without any memory.

    ``component`` is of diffusers or of transformers.
    """
    if not issubclass(component, PreTrainedModel):
        return build_configured(component, component.load_config(folder, local_files_only=True))
    config = component.config_class.from_pretrained(folder, local_files_only=True)
    # transformers would swap the process's default dtype for the one of the config
    config.dtype = None
    return build_configured(component, config)


def build_configured(component: Any, config: Any) -> Any:
    """The same for the ``config`` of a module that was built so."""
    with torch.device("meta"):
        if issubclass(component, PreTrainedModel):
            return component(config)
        return component.from_config(config)


def weight_files(component: Any, folder: Path) -> list[Path]:
    """The files of a component that was saved by its library: one, or several with an index.

    The fp16 variant is taken where there is no other.

    Raises:
        BadWeightsError: there are none.
    """
    stem = "model" if issubclass(component, PreTrainedModel) else "diffusion_pytorch_model"
    for variant in _VARIANTS:
        index = folder / f"{stem}.safetensors.index{variant}.json"
        if index.is_file():
            shards = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
            return [folder / Path(shard).name for shard in sorted(shards)]
        whole = folder / f"{stem}{variant}.safetensors"
        if whole.is_file():
            return [whole]
    raise BadWeightsError(f"{folder.name} has no {stem}.safetensors.")


def read_tensors(
    files: Iterable[Path], placement: Placement, prefixes: Sequence[str] = ("",)
) -> Tensors:
    """The tensors whose names begin with one of the prefixes, placed; names stay whole.

    On the CPU, what is neither cast nor laid out anew stays in the page cache, mapped privately.

    Raises:
        BadWeightsError: a file is not whole.
    """
    tensors: Tensors = {}
    for file in files:
        verify_safetensors(file)
        for device in placement.devices:
            with safe_open(file, framework="pt", device=str(device)) as opened:
                for name in opened.keys():  # noqa: SIM118 - no mapping
                    here = placement.device_of(name) == device
                    if here and name.startswith(tuple(prefixes)):
                        tensors[name] = placement.place(opened.get_tensor(name))
    return tensors


def fill(name: str, module: Any, tensors: Tensors) -> None:
    """Make the tensors the weights of a module of :func:`build_empty`, ready for evaluation.

    Tensors that the module does not have are left out: real files hold some of no use.

    Raises:
        BadWeightsError: some are missing. ``name`` is what the message calls the module.
        RuntimeError: one has another shape.
    """
    if isinstance(module, PreTrainedModel):
        tensors = _as_clip_names(module, tensors)
    else:
        module._fix_state_dict_keys_on_load(tensors)  # attention by its names of 2022
    wanted = module.state_dict().keys()
    missing = sorted(wanted - tensors.keys())
    if missing:
        raise BadWeightsError(f"{name} lacks {len(missing)} tensors, {missing[0]} among them.")
    module.load_state_dict({key: tensors[key] for key in wanted}, assign=True)
    _fill_position_ids(module)
    module.eval().requires_grad_(False)


def _as_clip_names(module: torch.nn.Module, tensors: Tensors) -> Tensors:
    """Releases of transformers differ in whether the encoder proper is called ``text_model``."""
    wanted = module.state_dict().keys()
    wrapper = "text_model."
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        candidates = (name, name.removeprefix(wrapper), wrapper + name)
        renamed[next((key for key in candidates if key in wanted), name)] = tensor
    return renamed


def _fill_position_ids(module: torch.nn.Module) -> None:
    """CLIP's count of positions is in no file; no other buffer may be without memory."""
    device = next(module.parameters()).device
    for name, buffer in list(module.named_buffers()):
        owner, _, key = name.rpartition(".")
        if key == "position_ids":
            ids = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
            module.get_submodule(owner).register_buffer(key, ids, persistent=False)
        elif buffer.is_meta:
            raise BadWeightsError(f"The files have no values for {name}.")
