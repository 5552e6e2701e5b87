"""One step for many rows: ControlNet -> UNet -> guidance. The same formula as diffusers' SDXL
ControlNet pipeline, but timesteps, guidance and strengths are per row, and each request brings its
own scheduler.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from experimance_controlnet.engine.request import Conditioning, Control, RequestState


@dataclass(frozen=True, slots=True)
class RowBatch:
    """The rows of several requests side by side; R rows. A view for one evaluation, then gone."""

    sample: torch.Tensor  # (R, 4, H/8, W/8) model dtype
    timesteps: torch.Tensor  # (R,) fp32
    prompt_embeds: torch.Tensor  # (R, T, D) model dtype
    added: Mapping[str, torch.Tensor]  # text_embeds (R, P), time_ids (R, 6), model dtype

    def select(self, rows: Sequence[int]) -> RowBatch:
        """Some of the rows; all of them, the usual case, cost nothing."""
        if len(rows) == len(self.sample):
            return self
        index = torch.tensor(rows).to(self.sample.device, non_blocking=True)
        return RowBatch(
            sample=self.sample[index],
            timesteps=self.timesteps[index],
            prompt_embeds=self.prompt_embeds[index],
            added={name: tensor[index] for name, tensor in self.added.items()},
        )


@dataclass(frozen=True, slots=True)
class ControlResiduals:
    """What ControlNets add to the UNet's skip connections and to its middle block."""

    down: tuple[torch.Tensor, ...]  # each (R, C, h, w)
    middle: torch.Tensor  # (R, C, h, w)


def control_acts(control: Control, step: int, steps: int) -> bool:
    """Whether the ControlNet acts in ``step`` (from 0), by the rule of diffusers' pipeline."""
    return control.start <= step / steps and (step + 1) / steps <= control.end


def predict_noise(
    unet: UNet2DConditionModel,
    controlnets: Mapping[str, ControlNetModel],
    states: Sequence[RequestState],
) -> list[torch.Tensor]:
    """The guided noise prediction of each request, (1, 4, H/8, W/8) fp32.

    The requests share weights and shapes (see ``BatchKey``). No request is changed.
    """
    rows = _gather(unet, states)
    residuals = _run_controlnets(controlnets, states, rows)
    noise = unet(
        rows.sample,
        rows.timesteps,
        encoder_hidden_states=rows.prompt_embeds,
        added_cond_kwargs=rows.added,
        down_block_additional_residuals=residuals.down if residuals else None,
        mid_block_additional_residual=residuals.middle if residuals else None,
        return_dict=False,
    )[0]
    per_request = noise.float().split([state.request.rows for state in states])
    return [
        _guide(prediction, state.request.cfg)
        for prediction, state in zip(per_request, states, strict=True)
    ]


def advance(state: RequestState, noise: torch.Tensor) -> None:
    """Let the request's scheduler remove that noise; ``noise`` is (1, 4, H/8, W/8) fp32."""
    timestep = _timestep(state)
    state.latents = state.scheduler.step(
        noise, timestep, _latents(state), generator=state.generator, return_dict=False
    )[0]
    state.step += 1


def _guide(prediction: torch.Tensor, cfg: float) -> torch.Tensor:
    """Classifier-free guidance, Ho & Salimans 2022; one row alone means none."""
    if len(prediction) == 1:
        return prediction
    unconditional, conditional = prediction.chunk(2)
    return unconditional + cfg * (conditional - unconditional)


def _gather(unet: UNet2DConditionModel, states: Sequence[RequestState]) -> RowBatch:
    samples, timesteps = [], []
    for state in states:
        timestep = _timestep(state)
        scaled = state.scheduler.scale_model_input(_latents(state), timestep)
        samples.append(scaled.expand(state.request.rows, -1, -1, -1))
        timesteps += [timestep] * state.request.rows
    ready = [_conditioning(state) for state in states]
    return RowBatch(
        sample=torch.cat(samples).to(unet.dtype),
        timesteps=torch.tensor(timesteps, dtype=torch.float32).to(unet.device, non_blocking=True),
        prompt_embeds=torch.cat([part.prompt_embeds for part in ready]),
        added={
            "text_embeds": torch.cat([part.pooled_embeds for part in ready]),
            "time_ids": torch.cat([part.time_ids for part in ready]),
        },
    )


def _timestep(state: RequestState) -> float:
    # A Python number: arithmetic on an integer tensor takes torch's default dtype, which the
    # libraries change for the whole process while they load another model.
    return state.scheduler.timesteps[state.step].item()


def _latents(state: RequestState) -> torch.Tensor:
    assert state.latents is not None, "prepare() comes before the first step"
    return state.latents


def _conditioning(state: RequestState) -> Conditioning:
    assert state.conditioning is not None, "prepare() comes before the first step"
    return state.conditioning


def _run_controlnets(
    controlnets: Mapping[str, ControlNetModel], states: Sequence[RequestState], rows: RowBatch
) -> ControlResiduals | None:
    """Each ControlNet sees only the rows in which it acts in this step; None where none does."""
    acting: defaultdict[str, list[tuple[int, RequestState]]] = defaultdict(list)
    first_row = 0
    for state in states:
        control = state.request.control
        if control is not None and control_acts(control, state.step, state.request.steps):
            acting[control.controlnet].append((first_row, state))
        first_row += state.request.rows
    parts = [
        (_row_numbers(some), _run_controlnet(controlnets[name], some, rows))
        for name, some in acting.items()
    ]
    return _combine(parts, row_count=first_row) if parts else None


def _row_numbers(acting: Sequence[tuple[int, RequestState]]) -> list[int]:
    return [first + row for first, state in acting for row in range(state.request.rows)]


def _run_controlnet(
    controlnet: ControlNetModel, acting: Sequence[tuple[int, RequestState]], rows: RowBatch
) -> ControlResiduals:
    chosen = rows.select(_row_numbers(acting))
    images: list[torch.Tensor] = []
    strengths: list[float] = []
    for _, state in acting:
        image, control = _conditioning(state).control_image, state.request.control
        assert image is not None and control is not None
        images.append(image.expand(state.request.rows, -1, -1, -1))
        strengths += [control.strength] * state.request.rows
    down, middle = controlnet(
        chosen.sample,
        chosen.timesteps,
        encoder_hidden_states=chosen.prompt_embeds,
        controlnet_cond=torch.cat(images),
        added_cond_kwargs=chosen.added,
        return_dict=False,
    )
    strength = torch.tensor(strengths, dtype=middle.dtype, device="cpu").to(
        middle.device, non_blocking=True
    )[:, None, None, None]
    return ControlResiduals(tuple(part * strength for part in down), middle * strength)


def _combine(
    parts: Sequence[tuple[list[int], ControlResiduals]], row_count: int
) -> ControlResiduals:
    """Rows without a ControlNet get zeros, which leave the UNet's own values as they are."""
    if len(parts) == 1 and len(parts[0][0]) == row_count:
        return parts[0][1]

    device = parts[0][1].middle.device
    indices = [torch.tensor(rows).to(device, non_blocking=True) for rows, _ in parts]

    def spread(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        whole = tensors[0].new_zeros(row_count, *tensors[0].shape[1:])
        for index, tensor in zip(indices, tensors, strict=True):
            whole[index] = tensor
        return whole

    down = zip(*(residuals.down for _, residuals in parts), strict=True)
    return ControlResiduals(
        down=tuple(spread(level) for level in down),
        middle=spread([residuals.middle for _, residuals in parts]),
    )
