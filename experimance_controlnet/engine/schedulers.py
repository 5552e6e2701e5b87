"""Noise schedulers by their API names: a table of diffusers classes and configurations."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Protocol, cast

import diffusers
import torch

from experimance_controlnet.catalog.specs import ModelSpec, SchedulerName
from experimance_controlnet.errors import InvalidRequestError


class NoiseScheduler(Protocol):
    """The part of a diffusers scheduler that the engine uses. Stateful: one a request."""

    config: Mapping[str, Any]
    timesteps: torch.Tensor  # (steps,) on the CPU
    init_noise_sigma: Any

    def set_timesteps(self, num_inference_steps: int, device: str) -> None:
        """Lay out the steps."""

    def scale_model_input(self, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        """What the network gets to see of the sample."""

    def step(
        self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, ...]:
        """From one noise level to the next."""


_TABLE: Mapping[SchedulerName, tuple[type[Any], Mapping[str, Any]]] = {
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_a": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "dpm_sde": (
        diffusers.DPMSolverMultistepScheduler,
        {"algorithm_type": "sde-dpmsolver++", "solver_type": "midpoint", "use_karras_sigmas": True},
    ),
    "dpm_multi": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    "dpm_single": (
        diffusers.DPMSolverSinglestepScheduler,
        {"algorithm_type": "dpmsolver++", "lower_order_final": True},
    ),
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    "lcm": (diffusers.LCMScheduler, {}),
}
"""Class, and what makes it the one that the name promises."""

SCHEDULER_NAMES: tuple[SchedulerName, ...] = tuple(_TABLE)
KARRAS_SCHEDULERS = frozenset({"euler", "dpm_sde", "dpm_multi", "dpm_single"})
"""Those that can space their noise levels after Karras et al. 2022."""


_NOISE_SCHEDULE = frozenset(
    {
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "prediction_type",
        "rescale_betas_zero_snr",
        "timestep_spacing",
        "steps_offset",
    }
)
"""How the model was trained: holds for every scheduler. The rest of a model's configuration belongs
to the scheduler that the model recommends."""


def scheduler_config(spec: ModelSpec, name: SchedulerName) -> Mapping[str, Any]:
    """What the model's configuration says to this scheduler."""
    if name == spec.scheduler:
        return spec.scheduler_config
    return {key: value for key, value in spec.scheduler_config.items() if key in _NOISE_SCHEDULE}


def make_scheduler(
    name: SchedulerName,
    model_config: Mapping[str, Any],
    steps: int,
    use_karras_sigmas: bool | None = None,
) -> NoiseScheduler:
    """A fresh scheduler with its ``steps`` laid out.

    ``model_config`` is in diffusers' words, see :func:`scheduler_config`.
    ``use_karras_sigmas`` overrides the scheduler's own choice. All its tables stay on the CPU: the
    look-ups of a step then never wait for the device.

    Raises:
        InvalidRequestError: Karras sigmas asked of a scheduler that has none.
    """
    scheduler_class, overrides = _TABLE[name]
    config = {**overrides, **model_config}
    if use_karras_sigmas is not None:
        if use_karras_sigmas and name not in KARRAS_SCHEDULERS:
            raise InvalidRequestError(
                "use_karras_sigmas",
                f"The scheduler {name} has no Karras sigmas; use one of "
                f"{', '.join(sorted(KARRAS_SCHEDULERS))}.",
            )
        if name in KARRAS_SCHEDULERS:
            config["use_karras_sigmas"] = use_karras_sigmas
    known = _config_keys(name)
    scheduler = scheduler_class(**{key: value for key, value in config.items() if key in known})
    scheduler.set_timesteps(steps, device="cpu")
    return cast(NoiseScheduler, scheduler)


@functools.cache
def _config_keys(name: SchedulerName) -> frozenset[str]:
    """Cached: ``from_config`` inspects signatures, four fifths of what a scheduler takes to make.

    Every request makes two, one of them on the engine's thread.
    """
    return frozenset(_TABLE[name][0].from_config({}).config)
