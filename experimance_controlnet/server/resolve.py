"""From a validated body to work: names looked up, defaults applied, eras turned into adapters.

Pure: no disk, no network, no clock. What files can be had is handed in.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from experimance_controlnet.catalog.entries import model_sources
from experimance_controlnet.catalog.specs import (
    AdapterUse,
    Catalog,
    ControlNetSpec,
    EraSpec,
    ModelSpec,
    SchedulerName,
    Source,
)
from experimance_controlnet.data_types import ControlNetGenerateData
from experimance_controlnet.engine.request import (
    Adapter,
    Control,
    DepthImage,
    GenerationRequest,
)
from experimance_controlnet.engine.schedulers import karras_in_use, scheduler_config
from experimance_controlnet.errors import UnknownNameError
from experimance_controlnet.workload import acting_steps, workload

T = TypeVar("T")

SEEDS = 2**32
WEIGHT_DIGITS = 6
"""Weights are rounded: adapter sets that differ by a float's last bit should share a batch."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A request whose every name exists and whose every default is filled in."""

    data: ControlNetGenerateData
    model: ModelSpec
    era_alternative: bool
    """The era's stated alternative replaces its own adapters."""
    adapters: tuple[Adapter, ...]
    """Sorted by name, none of weight 0."""
    lora_sources: tuple[Source, ...]
    """Of the adapters, in their order."""
    depth: Literal["given", "mock"] | None
    """What steers the image; None where nothing does: no depth map, strength 0, or no step."""
    controlnet: ControlNetSpec | None
    """None exactly where ``depth`` is."""
    steps: int
    cfg: float
    seed: int
    """Of the first image."""
    scheduler: SchedulerName
    use_karras_sigmas: bool
    workload: float
    """Units of all images together."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """Everything that has to be on this disk."""
        controlnet = () if self.controlnet is None else (self.controlnet.source,)
        return (*model_sources(self.model), *controlnet, *self.lora_sources)

    def requests(
        self, request_id: str, depth: DepthImage | None, deadline_s: float
    ) -> list[GenerationRequest]:
        """One for each image. ``depth`` is None exactly where the plan's is; ``deadline_s`` is on
        the engine's clock.
        """
        return [
            GenerationRequest(
                request_id=request_id,
                model=self.model.name,
                prompt=self.data.prompt,
                negative_prompt=self.data.negative_prompt,
                width=self.data.width,
                height=self.data.height,
                steps=self.steps,
                cfg=self.cfg,
                seed=(self.seed + image) % SEEDS,
                scheduler=self.scheduler,
                use_karras_sigmas=self.use_karras_sigmas,
                adapters=self.adapters,
                control=self._control(depth),
                workload=self.workload / self.data.num_images,
                deadline_s=deadline_s,
            )
            for image in range(self.data.num_images)
        ]

    def _control(self, depth: DepthImage | None) -> Control | None:
        if self.controlnet is None:
            return None
        assert depth is not None
        return Control(
            controlnet=self.controlnet.name,
            depth=depth,
            strength=self.data.controlnet_strength,
            start=self.data.control_guidance_start,
            end=self.data.control_guidance_end,
        )


def make_plan(
    data: ControlNetGenerateData, catalog: Catalog, not_to_be_had: Collection[Source] = ()
) -> Plan:
    """Resolve a body against the catalogue.

    ``not_to_be_had`` are the sources whose origin says that they do not exist: an era that needs
    one of them is replaced by its alternative, where the catalogue states one. A random seed is
    drawn here where the body names none.

    Raises:
        UnknownNameError: a name that the catalogue does not hold.
        InvalidRequestError: Karras sigmas asked of a scheduler that has none.
    """
    model = _look_up(catalog.models, data.model, "model")
    era_uses, era_alternative = _era_adapters(data, catalog, not_to_be_had)
    adapters = _add_up(data, catalog, era_uses)
    steps = data.steps or model.steps
    cfg = data.cfg or model.cfg
    scheduler = model.scheduler if data.scheduler == "auto" else data.scheduler
    depth = _depth_in_use(data, steps)
    controlnet = None
    # a catalogue without the default one still serves text to image
    if depth is not None or "controlnet" in data.model_fields_set:
        controlnet = _look_up(catalog.controlnets, data.controlnet, "controlnet")
    return Plan(
        data=data,
        model=model,
        era_alternative=era_alternative,
        adapters=adapters,
        lora_sources=tuple(catalog.loras[adapter.name].source for adapter in adapters),
        depth=depth,
        controlnet=None if depth is None else controlnet,
        steps=steps,
        cfg=cfg,
        seed=secrets.randbelow(SEEDS) if data.seed is None else data.seed,
        scheduler=scheduler,
        use_karras_sigmas=karras_in_use(
            scheduler, scheduler_config(model, scheduler), data.use_karras_sigmas
        ),
        workload=workload(
            width=data.width,
            height=data.height,
            steps=steps,
            cfg=cfg,
            depth=depth is not None,
            num_images=data.num_images,
            control_start=data.control_guidance_start,
            control_end=data.control_guidance_end,
            adapters=len(adapters),
        ),
    )


def era_names(catalog: Catalog) -> list[str]:
    """What a request may name as its era: the eras, then every LoRA."""
    return [*catalog.eras, *catalog.loras]


def adapters_in_use(
    era: EraSpec, catalog: Catalog, not_to_be_had: Collection[Source]
) -> tuple[tuple[AdapterUse, ...], bool]:
    """The era's adapters or its alternative's, and whether they are the latter."""
    missing = any(catalog.loras[use.lora].source in not_to_be_had for use in era.adapters)
    if missing and era.alternative is not None:
        return era.alternative, True
    return era.adapters, False


def _look_up(table: Mapping[str, T], name: str, field: str) -> T:
    if name not in table:
        raise _unknown(field, table)
    return table[name]


def _unknown(field: str, known: Iterable[str]) -> UnknownNameError:
    names = ", ".join(known) or "none at all"
    return UnknownNameError(field, f"There is no such name in the catalogue; it has {names}.")


def _era_adapters(
    data: ControlNetGenerateData, catalog: Catalog, not_to_be_had: Collection[Source]
) -> tuple[tuple[AdapterUse, ...], bool]:
    """The adapters that the era brings, and whether they are its alternative's."""
    if data.era is None:
        return (), False
    if data.era in catalog.loras:
        return (AdapterUse(data.era, catalog.loras[data.era].weight),), False
    if data.era not in catalog.eras:
        raise _unknown("era", era_names(catalog))
    return adapters_in_use(catalog.eras[data.era], catalog, not_to_be_had)


def _add_up(
    data: ControlNetGenerateData, catalog: Catalog, era_uses: Iterable[AdapterUse]
) -> tuple[Adapter, ...]:
    weights: dict[str, float] = {}
    for use in era_uses:
        weights[use.lora] = weights.get(use.lora, 0.0) + use.weight * data.lora_strength
    for index, lora in enumerate(data.loras):
        _look_up(catalog.loras, lora.name, f"loras.{index}.name")
        weights[lora.name] = weights.get(lora.name, 0.0) + lora.strength
    rounded = {name: round(weight, WEIGHT_DIGITS) for name, weight in sorted(weights.items())}
    return tuple(Adapter(name, weight) for name, weight in rounded.items() if weight)


def _depth_in_use(data: ControlNetGenerateData, steps: int) -> Literal["given", "mock"] | None:
    start, end = data.control_guidance_start, data.control_guidance_end
    if data.controlnet_strength == 0 or acting_steps(steps, start, end) == 0:
        return None
    if data.depth_map_b64 is not None:
        return "given"
    return "mock" if data.mock_depth else None
