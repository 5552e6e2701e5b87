"""One step for many rows: ControlNet -> UNet -> guidance. The same formula as diffusers' SDXL
ControlNet pipeline, but timesteps, guidance and strengths are per row, and each request brings its
own scheduler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from experimance_controlnet.engine.constants import StepConstants
from experimance_controlnet.engine.graphs import Recorder, ReplayedWork
from experimance_controlnet.engine.network.attention import fastest_attention
from experimance_controlnet.engine.network.unet import (
    ControlNetwork,
    ControlResiduals,
    UnetNetwork,
    add_residuals,
)
from experimance_controlnet.engine.request import Control, RequestState

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
        self._unet = unet
        self._controls = controls
        self._recorder = recorder
        self._constants = StepConstants(
            shape.rows, (shape.height, shape.width), unet, controls, recorder
        )
        size = (shape.rows, unet.latent_channels, shape.height // 8, shape.width // 8)
        self._sample = torch.zeros(size, dtype=unet.dtype, device=unet.device).contiguous(
            memory_format=torch.channels_last
        )
        # what they are says _Numbers; one copy a step brings them all
        self._numbers = torch.zeros((4 + len(controls), shape.rows), device=unet.device)
        self._out = torch.zeros(size, dtype=torch.float32, device=unet.device)
        self._evaluate = ReplayedWork(self._evaluate_once, recorder)

    def __call__(self, states: Sequence[RequestState]) -> list[torch.Tensor]:
        """The guided noise prediction of each request, (1, 4, H/8, W/8) fp32.

        The requests share weights and shapes (see ``BatchKey``), and the adapters of their key are
        merged. No request is changed.
        """
        with fastest_attention(self._unet.device):
            self._constants.load(states)
            self._load_inputs(states)
            self._evaluate()
        # a copy: the next run overwrites the buffer
        return list(self._out[: len(states)].clone().split(1))

    def _evaluate_once(self) -> None:
        timesteps, cfg, unconditional, conditional, *strengths = self._numbers
        # The ControlNet is needed only where the UNet comes up again; until then each fills the
        # processors that the other leaves idle.
        control = self._recorder.branch(lambda: self._evaluate_controls(timesteps, strengths))
        noise = self._unet(self._sample, timesteps, self._constants.text, control.join).float()
        # Classifier-free guidance, Ho & Salimans 2022. The one row of a request without it is both.
        base = noise[unconditional.long()]
        guided = base + cfg[:, None, None, None] * (noise[conditional.long()] - base)
        self._out.copy_(guided)

    def _evaluate_controls(
        self, timesteps: torch.Tensor, strengths: Sequence[torch.Tensor]
    ) -> ControlResiduals | None:
        constants = self._constants
        return add_residuals(
            [
                control(
                    self._sample,
                    timesteps,
                    constants.control_text[name],
                    constants.features[name],
                    strength,
                )
                for (name, control), strength in zip(self._controls.items(), strengths, strict=True)
            ]
        )

    def _load_inputs(self, states: Sequence[RequestState]) -> None:
        numbers = _Numbers(tuple(self._controls))
        for state in states:
            timestep = _timestep(state)
            scaled = state.scheduler.scale_model_input(_latents(state), timestep)
            self._sample[numbers.add(state, timestep)].copy_(scaled)
        self._numbers.copy_(numbers.lines(len(self._sample)), non_blocking=True)


class _Numbers:
    """What changes from step to step and is one number a row or a request, in lines: by row the
    timesteps; by request guidance and its two row numbers; by row each ControlNet's strength.
    """

    def __init__(self, controlnets: tuple[str, ...]) -> None:
        self._controlnets = controlnets
        self._timesteps: list[float] = []
        self._guidance: list[tuple[float, int, int]] = []
        self._strengths: list[list[float]] = [[] for _ in controlnets]

    def add(self, state: RequestState, timestep: float) -> slice:
        """Take the request's next step in; returns the rows that are its own."""
        first, rows = len(self._timesteps), state.request.rows
        self._timesteps += [timestep] * rows
        self._guidance.append((state.request.cfg, first, first + rows - 1))
        acting = acting_control(state)
        for name, line in zip(self._controlnets, self._strengths, strict=True):
            acts = acting is not None and acting.controlnet == name
            line += [acting.strength if acting is not None and acts else 0.0] * rows
        return slice(first, first + rows)

    def lines(self, rows: int) -> torch.Tensor:
        """(4 + ControlNets, rows) fp32 on the CPU; zeros where nobody has a number."""
        lines = [self._timesteps, *zip(*self._guidance, strict=True), *self._strengths]
        return torch.tensor(
            [[*line, *[0.0] * (rows - len(line))] for line in lines], dtype=torch.float32
        )


def _timestep(state: RequestState) -> float:
    # A Python number: arithmetic on an integer tensor takes torch's default dtype, which the
    # libraries change for the whole process while they load another model.
    return state.scheduler.timesteps[state.step].item()


def _latents(state: RequestState) -> torch.Tensor:
    assert state.latents is not None, "prepare() comes before the first step"
    return state.latents
