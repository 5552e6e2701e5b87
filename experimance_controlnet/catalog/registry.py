"""From a TOML file to a Catalog: every key checked, every name that one entry uses of another."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
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

BUILT_IN = ("experimance", "embedded")
_DATA_FOLDER = Path(__file__).parent / "data"


def load_catalog(which: str) -> Catalog:
    """The built-in catalogue of that name, or the one in the TOML file at that path.

    Raises CatalogError, one line that names the file, the line or key, and what is wrong.
    """
    path = _DATA_FOLDER / f"{which}.toml" if which in BUILT_IN else Path(which)
    try:
        with path.open("rb") as file:
            tables = tomllib.load(file)
        rows = _CatalogRows.model_validate(tables, context=path.parent.absolute())
        _check_names(rows)
    except OSError as error:
        raise CatalogError(
            f"{path}: {error.strerror}; a catalogue is {' or '.join(BUILT_IN)} or a TOML file"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CatalogError(f"{path}: not TOML: {error}") from error
    except ValidationError as error:
        raise CatalogError(f"{path}: {_first_fault(error)}") from error
    except CatalogError as error:
        raise CatalogError(f"{path}: {error.message}") from error
    return rows.record(path.stem)


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


_Name = Annotated[str, StringConstraints(pattern=r"(?i)^[a-z0-9][a-z0-9_.-]{0,63}$")]
_Uri = Annotated[str, AfterValidator(_check_uri)]
_Sha256 = Annotated[str, StringConstraints(pattern="(?i)^[0-9a-f]{64}$", to_lower=True)]
_Uses = Annotated[dict[_Name, float], Field(min_length=1)]


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _SourceRow(_Row):
    uri: _Uri
    sha256: _Sha256 | None = None
    size_bytes: Annotated[int, Field(ge=1)] | None = None
    files: list[str] = []

    @model_validator(mode="after")
    def _keys_fit(self) -> _SourceRow:
        place = locate(Source(self.uri))
        is_repository = isinstance(place, HubPlace) and place.file is None
        if self.files and not is_repository:
            raise ValueError("files is for hf://owner/repo")
        if is_repository and (self.sha256 or self.size_bytes):
            raise ValueError("sha256 and size_bytes are for one file")
        return self

    def record(self) -> Source:
        return Source(self.uri, self.sha256, self.size_bytes, tuple(self.files))


class _ModelRow(_Row):
    source: _SourceRow
    base_source: _SourceRow | None = None
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


class _ControlNetRow(_Row):
    source: _SourceRow

    def record(self, name: str) -> ControlNetSpec:
        return ControlNetSpec(name, self.source.record())


class _LoraRow(_Row):
    source: _SourceRow
    weight: float = 1.0

    def record(self, name: str) -> LoraSpec:
        return LoraSpec(name, self.source.record(), self.weight)


class _EraRow(_Row):
    adapters: _Uses
    alternative: _Uses | None = None

    def record(self, name: str) -> EraSpec:
        alternative = None if self.alternative is None else _uses(self.alternative)
        return EraSpec(name, _uses(self.adapters), alternative)


class _CatalogRows(_Row):
    models: dict[_Name, _ModelRow] = Field(min_length=1)
    controlnets: dict[_Name, _ControlNetRow] = {}
    loras: dict[_Name, _LoraRow] = {}
    eras: dict[_Name, _EraRow] = {}

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


def _check_names(rows: _CatalogRows) -> None:
    for era, row in rows.eras.items():
        if era in rows.loras:
            raise CatalogError(f"eras.{era}: a LoRA has this name, and every LoRA is an era too")
        for key, uses in (("adapters", row.adapters), ("alternative", row.alternative or {})):
            for lora in uses:
                if lora not in rows.loras:
                    raise CatalogError(f"eras.{era}.{key}.{lora}: there is no LoRA of this name")


def _first_fault(error: ValidationError) -> str:
    first, *others = error.errors(include_url=False)
    parts = [str(part) for part in first["loc"] if part != "[key]"]
    key = ".".join(part if part.isprintable() else repr(part) for part in parts)
    unknown = first["type"] == "extra_forbidden"
    what = "unknown key" if unknown else first["msg"].removeprefix("Value error, ")
    more = f" (and {len(others)} more)" if others else ""
    return f"{key}: {what}{more}"
