"""Noise schedulers by their API names: a table of diffusers classes and configurations.

The server looks names up here while the libraries are still being imported, so only
:func:`make_scheduler` needs them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast

from experimance_controlnet.catalog.specs import ModelSpec, SchedulerName
from experimance_controlnet.errors import InvalidRequestError

if TYPE_CHECKING:
    import torch


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


_TABLE: Mapping[SchedulerName, tuple[str, Mapping[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpm_sde": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "solver_type": "midpoint", "use_karras_sigmas": True},
    ),
    "dpm_multi": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm_single": (
        "DPMSolverSinglestepScheduler",
        {"algorithm_type": "dpmsolver++", "lower_order_final": True},
    ),
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "lcm": ("LCMScheduler", {}),
}
"""diffusers' class, and what makes it the one that the name promises."""

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


def karras_in_use(
    name: SchedulerName, model_config: Mapping[str, Any], wish: bool | None = None
) -> bool:
    """Whether the noise levels are spaced after Karras: as wished, else as the model or the
    scheduler has it.

    Raises:
        InvalidRequestError: wished for of a scheduler that has none.
    """
    if name not in KARRAS_SCHEDULERS:
        if wish:
            raise InvalidRequestError(
                "use_karras_sigmas",
                f"The scheduler {name} has no Karras sigmas; use one of "
                f"{', '.join(sorted(KARRAS_SCHEDULERS))}.",
            )
        return False
    if wish is not None:
        return wish
    config = {**_TABLE[name][1], **model_config}
    return bool(config.get("use_karras_sigmas", False))


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
    class_name, overrides = _TABLE[name]
    scheduler_class = _scheduler_class(class_name)
    karras = karras_in_use(name, model_config, use_karras_sigmas)
    config = {**overrides, **model_config, "use_karras_sigmas": karras}
    known = _config_keys(name)
    scheduler = scheduler_class(**{key: value for key, value in config.items() if key in known})
    scheduler.set_timesteps(steps, device="cpu")
    return cast(NoiseScheduler, scheduler)


def _scheduler_class(name: str) -> Any:
    import diffusers

    return getattr(diffusers, name)


@functools.cache
def _config_keys(name: SchedulerName) -> frozenset[str]:
    """Cached: ``from_config`` inspects signatures, four fifths of the time to make a scheduler."""
    return frozenset(_scheduler_class(_TABLE[name][0]).from_config({}).config)
