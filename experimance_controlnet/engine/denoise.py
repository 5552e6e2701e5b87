"""One step for many rows: ControlNet -> UNet -> guidance. The same formula as diffusers' SDXL
ControlNet pipeline, but timesteps, guidance and strengths are per row, and each request brings its
own scheduler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from experimance_controlnet.engine.graphs import Recorder, ReplayedWork
from experimance_controlnet.engine.network.attention import fastest_attention
from experimance_controlnet.engine.network.transformer import Prompt
from experimance_controlnet.engine.network.unet import (
    ControlNetwork,
    ControlResiduals,
    TextConstants,
    UnetNetwork,
    add_residuals,
)
from experimance_controlnet.engine.request import (
    Adapter,
    Conditioning,
    Control,
    GenerationRequest,
    RequestState,
)

_EXACT_ROWS = 8
"""Up to here every number of rows has its own program; beyond, numbers are rounded up."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """What the tensors of a step depend on, and with them its program."""

    rows: int
    width: int
    height: int
    token_chunks: int
    controlnets: tuple[str, ...]
    """Those that act in this step; each is evaluated for all rows."""


def shape_of(states: Sequence[RequestState]) -> StepShape:
    """The program that these requests need for their next step."""
    key = states[0].key
    rows = sum(state.request.rows for state in states)
    if rows > _EXACT_ROWS:
        rows += -rows % 4
    acting = {control.controlnet for state in states if (control := acting_control(state))}
    return StepShape(rows, key.width, key.height, key.token_chunks, tuple(sorted(acting)))


def acting_control(state: RequestState) -> Control | None:
    """The request's ControlNet, if it acts in the next step."""
    control = state.request.control
    if control is None or not control_acts(control, state.step, state.request.steps):
        return None
    return control


def control_acts(control: Control, step: int, steps: int) -> bool:
    """Whether the ControlNet acts in ``step`` (from 0), by the rule of diffusers' pipeline."""
    return control.start <= step / steps and (step + 1) / steps <= control.end


def advance(state: RequestState, noise: torch.Tensor) -> None:
    """Let the request's scheduler remove that noise; ``noise`` is (1, 4, H/8, W/8) fp32."""
    timestep = _timestep(state)
    state.latents = state.scheduler.step(
        noise, timestep, _latents(state), generator=state.generator, return_dict=False
    )[0]
    state.step += 1


@dataclass(frozen=True, slots=True)
class _Guidance:
    """Classifier-free guidance, Ho & Salimans 2022, for N requests at once.

    A request without guidance has one row, which then is both.
    """

    unconditional: torch.Tensor  # (N,) row numbers
    conditional: torch.Tensor  # (N,) row numbers
    cfg: torch.Tensor  # (N, 1, 1, 1) fp32

    def __call__(self, noise: torch.Tensor) -> torch.Tensor:
        """(R, 4, h, w) fp32 to (N, 4, h, w)."""
        unconditional = noise[self.unconditional]
        return unconditional + self.cfg * (noise[self.conditional] - unconditional)


@dataclass(slots=True)
class _Constants:
    """What stays the same as long as the same requests step together. Device buffers."""

    text: TextConstants
    control_text: dict[str, TextConstants]
    features: dict[str, torch.Tensor]  # (R, C, H/8, W/8) by ControlNet
    guidance: _Guidance


class StepProgram:
    """Evaluates steps of one shape for one model. Its buffers stay where they are, so that it can
    be recorded as a CUDA graph. Adapters may be merged or unmerged between two runs.
    """

    def __init__(
        self,
        shape: StepShape,
        unet: UnetNetwork,
        controls: Mapping[str, ControlNetwork],
        recorder: Recorder,
    ) -> None:
        """``controls``: those that the shape names."""
        self._shape = shape
        self._unet = unet
        self._controls = controls
        size = (shape.rows, unet.latent_channels, shape.height // 8, shape.width // 8)
        self._sample = torch.zeros(size, dtype=unet.dtype, device=unet.device).contiguous(
            memory_format=torch.channels_last
        )
        # timesteps, then each ControlNet's strengths, so that one copy brings all
        self._scalars = torch.zeros(
            (1 + len(controls), shape.rows), dtype=torch.float32, device=unet.device
        )
        self._out = torch.zeros(size, dtype=torch.float32, device=unet.device)
        self._constants: _Constants | None = None
        self._owners: tuple[tuple[Adapter, ...], list[Conditioning]] | None = None
        self._evaluate = ReplayedWork(self._evaluate_once, recorder)

    def __call__(self, states: Sequence[RequestState]) -> list[torch.Tensor]:
        """The guided noise prediction of each request, (1, 4, H/8, W/8) fp32.

        The requests share weights and shapes (see ``BatchKey``), and the adapters of their key are
        merged. No request is changed.
        """
        with fastest_attention(self._unet.device):
            self._load_constants(states)
            self._load_inputs(states)
            self._evaluate()
        # a copy: the next run overwrites the buffer
        return list(self._out[: len(states)].clone().split(1))

    def _evaluate_once(self) -> None:
        constants, timesteps = self._constants, self._scalars[0]
        assert constants is not None
        residuals: list[ControlResiduals] = []
        for index, (name, control) in enumerate(self._controls.items()):
            text, features = constants.control_text[name], constants.features[name]
            strength = self._scalars[1 + index]
            residuals.append(control(self._sample, timesteps, text, features, strength))
        noise = self._unet(self._sample, timesteps, constants.text, add_residuals(residuals))
        guided = constants.guidance(noise.float())
        self._out[: len(guided)].copy_(guided)

    def _load_inputs(self, states: Sequence[RequestState]) -> None:
        samples = []
        scalars: list[list[float]] = [[] for _ in self._scalars]
        for state in states:
            timestep, rows = _timestep(state), state.request.rows
            scaled = state.scheduler.scale_model_input(_latents(state), timestep)
            samples.append(scaled.expand(rows, -1, -1, -1))
            acting = acting_control(state)
            scalars[0] += [timestep] * rows
            for row, name in zip(scalars[1:], self._controls, strict=True):
                acts = acting is not None and acting.controlnet == name
                row += [acting.strength if acting is not None and acts else 0.0] * rows
        sample = torch.cat(samples)
        self._sample[: len(sample)].copy_(sample)
        numbers = torch.tensor(scalars, dtype=torch.float32)
        self._scalars[:, : numbers.shape[1]].copy_(numbers, non_blocking=True)

    def _load_constants(self, states: Sequence[RequestState]) -> None:
        ready = [_conditioning(state) for state in states]
        adapters = states[0].key.adapters
        if self._owners is not None:
            known_adapters, known = self._owners
            same = len(known) == len(ready) and all(
                one is other for one, other in zip(known, ready, strict=True)
            )
            if same and known_adapters == adapters:
                return
        self._owners = None  # until done: an error half-way must not leave a claim behind
        fresh = self._make_constants(ready, [state.request for state in states])
        if self._constants is None:
            self._constants = fresh
        else:
            _overwrite(self._constants, fresh)
        self._owners = (adapters, ready)

    def _make_constants(
        self, ready: Sequence[Conditioning], requests: Sequence[GenerationRequest]
    ) -> _Constants:
        pad = self._shape.rows - sum(request.rows for request in requests)
        embeds = _padded([part.prompt_embeds for part in ready], pad)
        pooled = _padded([part.pooled_embeds for part in ready], pad)
        time_ids = _padded([part.time_ids for part in ready], pad)
        return _Constants(
            text=self._unet.text_constants(embeds, pooled, time_ids),
            control_text={
                name: control.text_constants(embeds, pooled, time_ids)
                for name, control in self._controls.items()
            },
            features={
                name: _padded(
                    [_features(part, request, name, control) for part, request in
                     zip(ready, requests, strict=True)], pad
                ).contiguous(memory_format=torch.channels_last)
                for name, control in self._controls.items()
            },
            guidance=self._make_guidance(requests),
        )  # fmt: skip

    def _make_guidance(self, requests: Sequence[GenerationRequest]) -> _Guidance:
        first_rows, row = [], 0
        for request in requests:
            first_rows.append(row)
            row += request.rows
        spare = [0] * (self._shape.rows - len(requests))
        last_rows = [
            first + request.rows - 1 for first, request in zip(first_rows, requests, strict=True)
        ]
        device = self._unet.device
        cfg = torch.tensor([request.cfg for request in requests] + [0.0] * len(spare))
        return _Guidance(
            torch.tensor(first_rows + spare).to(device),
            torch.tensor(last_rows + spare).to(device),
            cfg.to(device, torch.float32)[:, None, None, None],
        )


def _features(
    part: Conditioning, request: GenerationRequest, name: str, control: ControlNetwork
) -> torch.Tensor:
    """(request's rows, C, H/8, W/8): zeros where it has another ControlNet or none."""
    if request.control is None or request.control.controlnet != name:
        size = (request.rows, control.channels, request.height // 8, request.width // 8)
        return torch.zeros(size, dtype=control.dtype, device=control.device)
    assert part.control_features is not None
    return part.control_features.expand(request.rows, -1, -1, -1)


def _padded(parts: list[torch.Tensor], pad: int) -> torch.Tensor:
    """The parts behind each other, and ``pad`` empty rows that nobody reads."""
    if pad:
        parts = [*parts, parts[0].new_zeros((pad, *parts[0].shape[1:]))]
    return torch.cat(parts)


def _overwrite(old: _Constants, new: _Constants) -> None:
    """Bring the new values to where the old ones are."""
    for target, source in zip(_tensors(old), _tensors(new), strict=True):
        target.copy_(source)


def _tensors(constants: _Constants) -> list[torch.Tensor]:
    texts = [constants.text, *constants.control_text.values()]
    prompts = [text.prompt for text in texts if isinstance(text.prompt, Prompt)]
    guidance = constants.guidance
    return [
        *(prompt.keys_values for prompt in prompts),
        *(text.added for text in texts),
        *constants.features.values(),
        guidance.unconditional,
        guidance.conditional,
        guidance.cfg,
    ]


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
