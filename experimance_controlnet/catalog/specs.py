"""What a catalogue holds: plain frozen records, without behaviour that touches disk or network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

SchedulerName = Literal["euler", "dpm_sde", "euler_a", "dpm_multi", "dpm_single", "ddim", "lcm"]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a file or folder comes from.

    ``uri`` is ``package:NAME`` (shipped in ``catalog/embedded/NAME``), a local path,
    ``https://...`` (one file) or ``hf://owner/repo[/file][@revision]`` (a folder or a file).
    ``sha256`` and ``size_bytes`` are of the one file; both are optional. ``files`` are glob
    patterns: the part of a remote folder that is needed; empty means all of it.
    """

    uri: str
    sha256: str | None = None
    size_bytes: int | None = None
    files: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """An SDXL checkpoint with the settings it was made for.

    ``source`` is a diffusers folder or one ``.safetensors`` file in the original SDXL layout.
    ``base_source`` is a diffusers folder that supplies what ``source`` lacks: configs and
    tokenizers for a single file, whole components for a folder that holds only some of them.
    """

    name: str
    source: Source
    steps: int
    cfg: float
    scheduler: SchedulerName
    scheduler_config: Mapping[str, Any]
    base_source: Source | None = None


@dataclass(frozen=True, slots=True)
class ControlNetSpec:
    """A depth ControlNet: a folder as diffusers saves it."""

    name: str
    source: Source


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """One LoRA file and the weight its author recommends."""

    name: str
    source: Source
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """A LoRA of the catalogue at a weight."""

    lora: str
    weight: float


@dataclass(frozen=True, slots=True)
class EraSpec:
    """The adapters that give an era its look.

    ``alternative`` is what runs instead where one of the era's own files cannot be had.
    """

    name: str
    adapters: tuple[AdapterUse, ...]
    alternative: tuple[AdapterUse, ...] | None = None


@dataclass(frozen=True, slots=True)
class Catalog:
    """All that clients may name. Each mapping is keyed by the entry's name."""

    name: str
    models: Mapping[str, ModelSpec]
    controlnets: Mapping[str, ControlNetSpec]
    loras: Mapping[str, LoraSpec] = field(default_factory=dict)
    eras: Mapping[str, EraSpec] = field(default_factory=dict)
