"""Is what we time the right picture? Two figures, each with and without adapters:

* the relative error of the guided UNet output, ||out - reference|| / ||reference||, at every step
  along the fp32 trajectory, so that all see the same latents;
* the PSNR of finished pictures, where each goes its own way from the same noise.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.ours import Ours
from benchmarks.references import COMPARED_ERAS, References, relative_error
from benchmarks.standard_request import standard_request
from benchmarks.timing import progress
from experimance_controlnet.engine.request import PixelImage

Result = dict[str, Any]

MAX_RELATIVE_ERROR = {"fp16": 0.01, "fp8": 0.15}
"""Beyond this the picture is another one, and its speed means nothing."""
MIN_SENSITIVITY = 0.01
"""Below this the random weights do not depend on an input, and an error in it would not show."""


def verify(references: References, ours: Ours) -> Result:
    """The error of each prediction along the fp32 trajectory, beside the eager pipeline's."""
    errors = {
        name: [
            relative_error(mine, right)
            for mine, right in zip(
                ours.predictions_along(trajectory.request, trajectory.predictions),
                trajectory.predictions,
                strict=True,
            )
        ]
        for name, trajectory in references.trajectories.items()
    }
    result = {
        "right": is_right(ours.precision, errors, references.sensitivity),
        "unet_relative_error": _rounded(errors),
        "unet_relative_error_eager": _rounded(references.eager_errors),
        "sensitivity": {name: round(value, 4) for name, value in references.sensitivity.items()},
    }
    progress(f"verify {ours.precision}: {result}")
    return result


def is_right(
    precision: str,
    errors: Mapping[str, Sequence[float]],
    sensitivity: Mapping[str, float],
) -> bool:
    """Whether every error is within the precision's limit, and every input is seen at all.
    Anything that is not a number is wrong.
    """
    limit = MAX_RELATIVE_ERROR[precision]
    close = all(error <= limit for steps in errors.values() for error in steps)
    return close and all(change >= MIN_SENSITIVITY for change in sensitivity.values())


def compare_pictures(references: References, ours: Ours) -> Result:
    """PSNR in dB of 255 levels over the seeds.

    ``contrast``: the standard deviation of our pictures' levels, for a flat one compares well.
    """
    result: Result = {}
    for name, era in COMPARED_ERAS.items():
        eager, fp32 = references.eager_pictures[name], references.fp32_pictures[name]
        mine = [ours.draw(standard_request(ours.family, seed, era)) for seed in range(len(eager))]
        result[name] = {
            "seeds": len(eager),
            "psnr_ours_to_eager_db": _summary(mine, eager),
            "psnr_ours_to_fp32_db": _summary(mine, fp32),
            "psnr_eager_to_fp32_db": _summary(eager, fp32),
            "contrast": round(statistics.median(float(image.std()) for image in mine), 1),
        }
    progress(f"quality {ours.precision}: {result}")
    return result


def psnr_db(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of two pictures; 99 where they are equal."""
    mean_square = float(np.mean((one.astype(np.float32) - other.astype(np.float32)) ** 2))
    return 99.0 if mean_square == 0 else 10 * float(np.log10(255**2 / mean_square))


def _summary(images: Sequence[PixelImage], others: Sequence[PixelImage]) -> Result:
    """As many as both have."""
    values = [psnr_db(*pair) for pair in zip(images, others, strict=False)]
    if not values:
        return {}
    return {"median": round(statistics.median(values), 2), "worst": round(min(values), 2)}


def _rounded(errors: dict[str, list[float]]) -> dict[str, list[float]]:
    return {name: [float(f"{value:.3g}") for value in steps] for name, steps in errors.items()}
