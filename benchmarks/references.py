"""The right pictures: diffusers' pipeline in fp32, and what the peers' own precision makes of them.

Everything starts from the same noise. The fp32 side shares no code of ours but the request:
diffusers encodes the prompt, live PEFT layers are the adapters, nothing is TF32.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.full_size import FamilyFiles
from benchmarks.peers import Peer
from benchmarks.standard_request import FIRST_ERA, standard_request
from benchmarks.timing import free_memory, progress
from experimance_controlnet.engine.request import GenerationRequest, PixelImage

COMPARED_ERAS = {"plain": None, "adapters": FIRST_ERA}
"""What is compared, each for itself: the name of the comparison, and its era."""


@dataclass(frozen=True, slots=True)
class Trajectory:
    """How fp32 makes one picture; tensors on the CPU, (1, 4, H/8, W/8) fp32."""

    request: GenerationRequest
    latents: tuple[torch.Tensor, ...]
    """Before each step."""
    predictions: tuple[torch.Tensor, ...]
    """The guided noise of each step."""


@dataclass(frozen=True, slots=True)
class References:
    """What ours is compared with; keys are those of ``COMPARED_ERAS``."""

    trajectories: dict[str, Trajectory]
    eager_errors: dict[str, list[float]]
    """Of the peer's half precision, a step."""
    sensitivity: dict[str, float]
    """How much the prediction changes, relative to itself, when an input does."""
    fp32_pictures: dict[str, list[PixelImage]]
    eager_pictures: dict[str, list[PixelImage]]


def gather_references(
    files: FamilyFiles, device: torch.device, dtype: torch.dtype, seeds: int, fp32_seeds: int
) -> References:
    """Both pipelines, one after the other. ``fp32_seeds`` of the ``seeds`` pictures in fp32 too.
    An fp32 pipeline of full size needs about 20 GB.
    """
    progress("references: fp32")
    with _true_fp32():
        trajectories, sensitivity, fp32_pictures = _gather_fp32(files, device, fp32_seeds)
    free_memory(device)
    progress("references: eager, in the peers' precision")
    peer = Peer(files, device, dtype)
    errors, pictures = {}, {}
    for name, era in COMPARED_ERAS.items():
        peer.set_adapters(trajectories[name].request.adapters)
        errors[name] = _errors_along(peer, trajectories[name])
        pictures[name] = _draw(peer, era, seeds)
    return References(trajectories, errors, sensitivity, fp32_pictures, pictures)


def _gather_fp32(
    files: FamilyFiles, device: torch.device, seeds: int
) -> tuple[dict[str, Trajectory], dict[str, float], dict[str, list[PixelImage]]]:
    """Trajectories, sensitivity, pictures."""
    peer = Peer(files, device, torch.float32)
    trajectories, sensitivity, pictures = {}, {}, {}
    for name, era in COMPARED_ERAS.items():
        request = standard_request(files.family, 0, era)
        peer.set_adapters(request.adapters)
        trajectories[name] = _follow(peer, request)
        pictures[name] = _draw(peer, era, seeds)
        if era is None:
            sensitivity = _sensitivity(peer, trajectories[name])
    with_adapters, without = (trajectories[name].predictions[0] for name in ("adapters", "plain"))
    sensitivity["adapters"] = relative_error(with_adapters, without)
    return trajectories, sensitivity, pictures


def _errors_along(peer: Peer, trajectory: Trajectory) -> list[float]:
    """The relative error at each step."""
    steps = zip(trajectory.latents, trajectory.predictions, strict=True)
    return [
        relative_error(predict(peer, trajectory.request, latents, step), right)
        for step, (latents, right) in enumerate(steps)
    ]


@torch.inference_mode()
def predict(
    peer: Peer, request: GenerationRequest, latents: torch.Tensor, step: int
) -> torch.Tensor:
    """The guided noise (1, 4, H/8, W/8) fp32 on the CPU, as diffusers' pipeline computes it, but
    from fp32 ``latents``: the pipeline rounds its own to its precision between the steps.
    """
    pipeline, control = peer.pipeline, request.control
    assert control is not None
    embeds, no_embeds, pooled, no_pooled = pipeline.encode_prompt(
        request.prompt,
        device=peer.device,
        do_classifier_free_guidance=True,
        negative_prompt=request.negative_prompt,
    )
    pipeline.scheduler.set_timesteps(request.steps, device=peer.device)
    timestep = pipeline.scheduler.timesteps[step]
    sample = pipeline.scheduler.scale_model_input(latents.to(peer.device), timestep)
    sample = sample.expand(2, -1, -1, -1).to(peer.dtype)
    size = (request.height, request.width)
    shared = {
        "encoder_hidden_states": torch.cat([no_embeds, embeds]),
        "added_cond_kwargs": {
            "text_embeds": torch.cat([no_pooled, pooled]),
            "time_ids": torch.tensor([[*size, 0, 0, *size]] * 2).to(embeds),
        },
        "return_dict": False,
    }
    depth = torch.from_numpy(control.depth)[None, None].expand(2, 3, -1, -1).to(embeds)
    down, middle = pipeline.controlnet(
        sample,
        timestep,
        controlnet_cond=depth,
        conditioning_scale=control.strength,
        **shared,
    )
    noise = pipeline.unet(
        sample,
        timestep,
        down_block_additional_residuals=down,
        mid_block_additional_residual=middle,
        **shared,
    )[0].float()
    unconditional, conditional = noise.chunk(2)
    guided: torch.Tensor = unconditional + request.cfg * (conditional - unconditional)
    return guided.cpu()


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """||out - reference|| / ||reference||; NaN where either is not finite."""
    return float((out - reference).norm() / reference.norm())


def initial_noise(request: GenerationRequest) -> torch.Tensor:
    """(1, 4, H/8, W/8) of unit variance: what a seed means in the engine."""
    generator = torch.Generator("cpu").manual_seed(request.seed)
    return torch.randn((1, 4, request.height // 8, request.width // 8), generator=generator)


def _follow(peer: Peer, request: GenerationRequest) -> Trajectory:
    """Step by step as the pipeline's loop does."""
    scheduler = peer.pipeline.scheduler
    scheduler.set_timesteps(request.steps, device=peer.device)
    current = initial_noise(request) * float(scheduler.init_noise_sigma)
    latents, predictions = [], []
    for step in range(request.steps):
        prediction = predict(peer, request, current, step)
        latents.append(current)
        predictions.append(prediction)
        current = scheduler.step(
            prediction.to(peer.device),
            scheduler.timesteps[step],
            current.to(peer.device),
            return_dict=False,
        )[0].cpu()
    return Trajectory(request, tuple(latents), tuple(predictions))


def _sensitivity(peer: Peer, trajectory: Trajectory) -> dict[str, float]:
    request, latents = trajectory.request, trajectory.latents[0]
    control, right = request.control, trajectory.predictions[0]
    assert control is not None
    flipped = dataclasses.replace(control, depth=control.depth[::-1].copy())
    changed = {
        "prompt": dataclasses.replace(request, prompt="a steel bridge over a frozen lake"),
        "depth": dataclasses.replace(request, control=flipped),
    }
    result = {
        name: relative_error(predict(peer, other, latents, 0), right)
        for name, other in changed.items()
    }
    # the same input to the UNet but for the timestep
    scheduler = peer.pipeline.scheduler
    scheduler.set_timesteps(request.steps)
    scale = [(1 + float(scheduler.sigmas[step]) ** 2) ** 0.5 for step in (0, 3)]
    later = predict(peer, request, latents / scale[0] * scale[1], 3)
    return result | {"timestep": relative_error(later, right)}


def _draw(peer: Peer, era: str | None, seeds: int) -> list[PixelImage]:
    pictures = []
    for seed in range(seeds):
        request = standard_request(peer.files.family, seed, era)
        pictures += [np.asarray(image) for image in peer.images([request], initial_noise(request))]
    return pictures


@contextlib.contextmanager
def _true_fp32() -> Iterator[None]:
    """Without TF32, which torch permits itself in convolutions."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
