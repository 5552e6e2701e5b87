"""The entries of a catalogue in one list, each with the files that it needs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from experimance_controlnet.catalog.schema import Kind
from experimance_controlnet.catalog.specs import AdapterUse, Catalog, ModelSpec, Source


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that a request can name.

    ``alternative`` are the sources that an era needs where one of its own cannot be had.
    """

    kind: Kind
    name: str
    sources: tuple[Source, ...]
    alternative: tuple[Source, ...] | None = None

    @property
    def full_name(self) -> str:
        """As the catalogue's file calls it: ``models.lightning``."""
        return f"{self.kind}.{self.name}"


def entries_of(catalog: Catalog) -> list[Entry]:
    """All of them: models, controlnets, loras, eras, each in the catalogue's order."""
    return [
        *(Entry("models", name, model_sources(spec)) for name, spec in catalog.models.items()),
        *(Entry("controlnets", name, (spec.source,)) for name, spec in catalog.controlnets.items()),
        *(Entry("loras", name, (spec.source,)) for name, spec in catalog.loras.items()),
        *(
            Entry(
                "eras",
                name,
                _lora_sources(catalog, spec.adapters),
                None if spec.alternative is None else _lora_sources(catalog, spec.alternative),
            )
            for name, spec in catalog.eras.items()
        ),
    ]


def model_sources(model: ModelSpec) -> tuple[Source, ...]:
    """What a model alone needs on this disk."""
    return (model.source,) if model.base_source is None else (model.source, model.base_source)


def _lora_sources(catalog: Catalog, uses: Iterable[AdapterUse]) -> tuple[Source, ...]:
    return tuple(catalog.loras[use.lora].source for use in uses)
