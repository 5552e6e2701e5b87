"""The catalogue as ``GET /models`` shows it: every name, and where what it means is just now.

Nothing here waits for the engine's thread or for a hash.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experimance_controlnet.catalog.entries import entries_of, model_sources
from experimance_controlnet.catalog.inventory import Found
from experimance_controlnet.catalog.specs import AdapterUse, EraSpec, Source
from experimance_controlnet.data_types import (
    ControlNetInfo,
    EraInfo,
    LoraInfo,
    ModelInfo,
    ModelsResponse,
)
from experimance_controlnet.engine.schedulers import SCHEDULER_NAMES
from experimance_controlnet.server.resolve import adapters_in_use, era_names
from experimance_controlnet.server.services import Services


async def models_of(services: Services) -> ModelsResponse:
    """All entries."""
    catalog, holds = services.catalog, services.engine.holds
    sources = {source for entry in entries_of(catalog) for source in entry.sources}
    disk = _Disk(await services.files.found(sources), services.files.faults)
    return ModelsResponse(
        available_models=list(catalog.models),
        available_eras=era_names(catalog),
        available_schedulers=["auto", *SCHEDULER_NAMES],
        available_loras=list(catalog.loras),
        available_controlnets=list(catalog.controlnets),
        models={
            name: ModelInfo(
                steps=model.steps,
                cfg=model.cfg,
                scheduler=model.scheduler,
                scheduler_config=dict(model.scheduler_config),
                in_memory=holds("model", name),
                sha256=disk.sha256(model.source),
                **disk.state(model_sources(model)),
            )
            for name, model in catalog.models.items()
        },
        controlnets={
            name: ControlNetInfo(
                in_memory=holds("controlnet", name),
                sha256=disk.sha256(controlnet.source),
                **disk.state([controlnet.source]),
            )
            for name, controlnet in catalog.controlnets.items()
        },
        loras={
            name: LoraInfo(
                weight=lora.weight,
                in_memory=holds("lora", name),
                sha256=disk.sha256(lora.source),
                **disk.state([lora.source]),
            )
            for name, lora in catalog.loras.items()
        },
        eras={name: _era(services, era, disk) for name, era in catalog.eras.items()},
    )


@dataclass(frozen=True, slots=True)
class _Disk:
    """What is there, and why the rest is not."""

    found: Mapping[Source, Found]
    faults: Mapping[Source, str]

    def state(self, sources: Sequence[Source]) -> dict[str, Any]:
        """The fields of ``EntryInfo`` that are about files."""
        sizes = [
            self.found[source].size_bytes if source in self.found else source.size_bytes
            for source in sources
        ]
        missing = [source for source in sources if source not in self.found]
        known = [size for size in sizes if size is not None]
        return {
            "on_disk": not missing,
            "size_bytes": sum(known) if len(known) == len(sizes) else None,
            "unavailable": next((self.faults[one] for one in missing if one in self.faults), None),
        }

    def sha256(self, source: Source) -> str | None:
        """Of the file on disk, else of the one that the catalogue means; None: not known."""
        found = self.found.get(source)
        return source.sha256 if found is None else found.sha256


def _era(services: Services, era: EraSpec, disk: _Disk) -> EraInfo:
    catalog = services.catalog
    uses, is_alternative = adapters_in_use(era, catalog, services.files.absent)
    return EraInfo(
        adapters=_weights(era.adapters),
        alternative=None if era.alternative is None else _weights(era.alternative),
        uses_alternative=is_alternative,
        in_memory=all(services.engine.holds("lora", use.lora) for use in uses),
        **disk.state([catalog.loras[use.lora].source for use in uses]),
    )


def _weights(uses: Iterable[AdapterUse]) -> dict[str, float]:
    return {use.lora: use.weight for use in uses}
