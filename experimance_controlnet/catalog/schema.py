"""The shape of a catalogue file: tables, keys and the values that they may have.

Told to operators at the head of ``data/experimance.toml``. What one entry says of another is
checked in ``registry.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    model_validator,
)

from experimance_controlnet.catalog.location import HubPlace, LocalPlace, locate
from experimance_controlnet.catalog.specs import (
    AdapterUse,
    Catalog,
    ControlNetSpec,
    EraSpec,
    LoraSpec,
    ModelSpec,
    SchedulerName,
    Source,
)
from experimance_controlnet.errors import CatalogError

BuiltIn = Literal["experimance", "embedded"]
BUILT_IN: tuple[BuiltIn, ...] = get_args(BuiltIn)
"""The catalogues that are shipped."""
Kind = Literal["models", "controlnets", "loras", "eras"]
_UNSAFE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".py")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def _check_uri(uri: str, info: ValidationInfo) -> str:
    """A local path in a catalogue is relative to the catalogue's file, whose folder is context."""
    try:
        place = locate(Source(uri))
    except CatalogError as error:
        raise ValueError(error.message) from error
    if isinstance(place, LocalPlace) and not uri.startswith("package:"):
        return str(cast(Path, info.context) / place.path)
    return uri


def _check_scalar(value: Any) -> bool | int | float | str:
    infinite = isinstance(value, float) and not math.isfinite(value)
    if infinite or not isinstance(value, bool | int | float | str):
        raise ValueError("must be a boolean, a finite number or a string")
    return value


def _check_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(
            "a name begins with a letter or digit and has only letters, digits, _ . - in it, "
            "at most 64 (none beyond ASCII)"
        )
    return name


def _check_pattern(pattern: str) -> str:
    if not pattern or pattern.lower().endswith(_UNSAFE_SUFFIXES):
        raise ValueError("must be a glob pattern; only .safetensors, .json and .txt are fetched")
    return pattern


_Name = Annotated[str, AfterValidator(_check_name)]
_Uri = Annotated[str, AfterValidator(_check_uri)]
_Sha256 = Annotated[str, StringConstraints(pattern="(?i)^[0-9a-f]{64}$", to_lower=True)]
_Uses = Annotated[dict[_Name, float], Field(min_length=1)]


class Row(BaseModel):
    """A table: unknown keys and values of another type are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class SourceRow(Row):
    """A source; a string alone is its uri."""

    uri: _Uri
    sha256: _Sha256 | None = None
    size_bytes: Annotated[int, Field(ge=1)] | None = None
    files: list[Annotated[str, AfterValidator(_check_pattern)]] = []

    @model_validator(mode="before")
    @classmethod
    def _uri_alone(cls, row: Any) -> Any:
        return {"uri": row} if isinstance(row, str) else row

    @model_validator(mode="after")
    def _keys_fit(self) -> SourceRow:
        place = locate(Source(self.uri))
        is_repository = isinstance(place, HubPlace) and place.file is None
        if self.files and not is_repository:
            raise ValueError("files is for hf://owner/repo")
        if is_repository and (self.sha256 or self.size_bytes):
            raise ValueError("sha256 and size_bytes are for one file")
        return self

    def record(self) -> Source:
        return Source(self.uri, self.sha256, self.size_bytes, tuple(self.files))


class ModelRow(Row):
    """``[models.NAME]``."""

    source: SourceRow
    base_source: SourceRow | None = None
    steps: int = Field(ge=1, le=50)
    cfg: float = Field(ge=0.1, le=20)
    scheduler: SchedulerName
    scheduler_config: dict[str, Annotated[Any, AfterValidator(_check_scalar)]] = {}

    def record(self, name: str) -> ModelSpec:
        return ModelSpec(
            name=name,
            source=self.source.record(),
            steps=self.steps,
            cfg=self.cfg,
            scheduler=self.scheduler,
            scheduler_config=MappingProxyType(self.scheduler_config),
            base_source=self.base_source.record() if self.base_source else None,
        )


class ControlNetRow(Row):
    """``[controlnets.NAME]``."""

    source: SourceRow

    def record(self, name: str) -> ControlNetSpec:
        return ControlNetSpec(name, self.source.record())


class LoraRow(Row):
    """``[loras.NAME]``."""

    source: SourceRow
    weight: float = 1.0

    def record(self, name: str) -> LoraSpec:
        return LoraSpec(name, self.source.record(), self.weight)


class EraRow(Row):
    """``[eras.NAME]``."""

    adapters: _Uses
    alternative: _Uses | None = None

    def record(self, name: str) -> EraSpec:
        alternative = None if self.alternative is None else _uses(self.alternative)
        return EraSpec(name, _uses(self.adapters), alternative)


class HeadRow(Row):
    """What a file says of the catalogue that it extends."""

    extends: BuiltIn | None = None
    remove: dict[Kind, list[_Name]] = {}


class CatalogRows(Row):
    """All entries."""

    models: dict[_Name, ModelRow] = Field(min_length=1)
    controlnets: dict[_Name, ControlNetRow] = {}
    loras: dict[_Name, LoraRow] = {}
    eras: dict[_Name, EraRow] = {}

    def record(self, name: str) -> Catalog:
        return Catalog(
            name=name,
            models=MappingProxyType({key: row.record(key) for key, row in self.models.items()}),
            controlnets=MappingProxyType(
                {key: row.record(key) for key, row in self.controlnets.items()}
            ),
            loras=MappingProxyType({key: row.record(key) for key, row in self.loras.items()}),
            eras=MappingProxyType({key: row.record(key) for key, row in self.eras.items()}),
        )


def _uses(weights: Mapping[str, float]) -> tuple[AdapterUse, ...]:
    return tuple(AdapterUse(lora, weight) for lora, weight in weights.items())
