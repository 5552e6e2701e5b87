"""The reference: diffusers' own SDXL pipelines on the same files, with the same request."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from PIL import Image

from experimance_controlnet.catalog.specs import Catalog, Source
from experimance_controlnet.catalog.store import ModelStore
from experimance_controlnet.engine.request import GenerationRequest, PixelImage

NOISE_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SPACING = {"timestep_spacing": "leading", "steps_offset": 1}


def make_scheduler(name: str) -> Any:
    """What each API name promises, written down independently of the package."""
    shared = NOISE_SCHEDULE | SPACING
    match name:
        case "euler":
            return EulerDiscreteScheduler(**shared)
        case "euler_a":
            return EulerAncestralDiscreteScheduler(**shared)
        case "dpm_sde":
            return DPMSolverMultistepScheduler(
                **shared,
                algorithm_type="sde-dpmsolver++",
                solver_type="midpoint",
                use_karras_sigmas=True,
            )
        case "dpm_multi":
            return DPMSolverMultistepScheduler(**shared)
        case "dpm_single":
            return DPMSolverSinglestepScheduler(**NOISE_SCHEDULE, lower_order_final=True)
        case "ddim":
            return DDIMScheduler(**shared, clip_sample=False, set_alpha_to_one=False)
        case "lcm":
            return LCMScheduler(**NOISE_SCHEDULE)
    raise AssertionError(name)


class Oracle:
    """Makes the same picture the slow, proven way."""

    def __init__(self, catalog: Catalog, store: ModelStore) -> None:
        self._catalog = catalog
        self._store = store

    def __call__(self, request: GenerationRequest) -> PixelImage:
        pipeline = self._pipeline(request)
        self._add_adapters(pipeline, request)
        control = request.control
        options: Mapping[str, Any] = {}
        if control is not None:
            depth = torch.from_numpy(control.depth)[None, None].expand(1, 3, -1, -1)
            options = {
                "image": depth,
                "controlnet_conditioning_scale": float(control.strength),
                "control_guidance_start": control.start,
                "control_guidance_end": control.end,
            }
        [image] = pipeline(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            num_inference_steps=request.steps,
            guidance_scale=request.cfg,
            generator=torch.Generator("cpu").manual_seed(request.seed),
            width=request.width,
            height=request.height,
            **options,
        ).images
        assert isinstance(image, Image.Image)
        return np.asarray(image)

    def _pipeline(self, request: GenerationRequest) -> Any:
        parts: dict[str, Any] = {"scheduler": make_scheduler(request.scheduler)}
        spec = self._catalog.models[request.model]
        if spec.base_source is not None:
            parts["unet"] = UNet2DConditionModel.from_pretrained(
                self._path(spec.source) / "unet", dtype=torch.float32
            )
        folder = self._path(spec.base_source or spec.source)
        pipeline_class: Any = StableDiffusionXLPipeline
        if request.control is not None:
            source = self._catalog.controlnets[request.control.controlnet].source
            parts["controlnet"] = ControlNetModel.from_pretrained(
                self._path(source), dtype=torch.float32
            )
            pipeline_class = StableDiffusionXLControlNetPipeline
        pipeline = pipeline_class.from_pretrained(folder, dtype=torch.float32, **parts)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _add_adapters(self, pipeline: Any, request: GenerationRequest) -> None:
        for adapter in request.adapters:
            file = self._path(self._catalog.loras[adapter.name].source)
            with warnings.catch_warnings():  # peft warns of a second adapter, which is meant
                warnings.simplefilter("ignore", UserWarning)
                pipeline.load_lora_weights(
                    file.parent, weight_name=file.name, adapter_name=adapter.name
                )
        if request.adapters:
            pipeline.set_adapters(
                [adapter.name for adapter in request.adapters],
                [adapter.weight for adapter in request.adapters],
            )

    def _path(self, source: Source) -> Any:
        path = self._store.path(source)
        assert path is not None
        return path


def max_difference(one: PixelImage, other: PixelImage) -> int:
    """Of any channel of any pixel, 0..255."""
    assert one.shape == other.shape
    return int(np.abs(one.astype(np.int16) - other.astype(np.int16)).max())


def mean_difference(one: PixelImage, other: PixelImage) -> float:
    """Of all channels of all pixels, 0..255."""
    return float(np.abs(one.astype(np.float32) - other.astype(np.float32)).mean())


def all_equal(images: Iterable[PixelImage]) -> bool:
    """To the last bit."""
    first, *others = images
    return all(np.array_equal(first, other) for other in others)
