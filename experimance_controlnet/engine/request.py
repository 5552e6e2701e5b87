"""One image to make, what becomes of it, and what comes out.

A :class:`GenerationRequest` is immutable and speaks in catalogue names. A :class:`RequestState` is
the only lasting truth about a request under way: batches are temporary views of it, so a request
can join, leave or be overtaken between any two steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from experimance_controlnet.catalog.specs import SchedulerName

if TYPE_CHECKING:
    import torch

    from experimance_controlnet.engine.schedulers import NoiseScheduler

DepthImage = NDArray[np.float32]
"""(height, width), 0 far .. 1 near; any size: the engine resizes it."""

PixelImage = NDArray[np.uint8]
"""(height, width, 3) RGB."""


@dataclass(frozen=True, slots=True, order=True)
class Adapter:
    """A LoRA of the catalogue at its final weight."""

    name: str
    weight: float


@dataclass(frozen=True, slots=True)
class Control:
    """Depth conditioning: acts in step i of n while start <= i/n and (i+1)/n <= end."""

    controlnet: str
    depth: DepthImage
    strength: float
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One image to make. Every name has been looked up in the catalogue, every default applied."""

    request_id: str
    model: str
    prompt: str
    negative_prompt: str | None
    width: int
    height: int
    steps: int
    cfg: float
    seed: int
    scheduler: SchedulerName
    use_karras_sigmas: bool | None = None
    adapters: tuple[Adapter, ...] = ()
    """Sorted by name, weights not 0, so that equal sets compare equal."""
    control: Control | None = None
    workload: float = 0.0
    deadline_s: float | None = None
    """On the engine's monotonic clock: too late to begin after this."""

    @property
    def rows(self) -> int:
        """UNet evaluations a step: guidance needs an unconditional one beside the conditional."""
        return 2 if self.cfg > 1 else 1

    @property
    def assets(self) -> tuple[Asset, ...]:
        """What has to be in memory before it can begin, the model first."""
        assets = [Asset("model", self.model)]
        if self.control is not None:
            assets.append(Asset("controlnet", self.control.controlnet))
        assets += [Asset("lora", adapter.name, self.model) for adapter in self.adapters]
        return tuple(assets)


AssetKind = Literal["model", "controlnet", "lora"]


@dataclass(frozen=True, slots=True)
class Asset:
    """Something that has to be on the device before a request can begin."""

    kind: AssetKind
    name: str
    model: str | None = None
    """The model that a LoRA is for: it is read against its modules. None for the other kinds."""

    def __post_init__(self) -> None:
        if (self.model is None) == (self.kind == "lora"):
            raise ValueError(f"{self}: a LoRA is for one model, nothing else is")


@dataclass(frozen=True, slots=True)
class BatchKey:
    """Requests with equal keys may share one UNet evaluation; nothing else matters.

    Steps, schedulers, guidance, strengths and even the ControlNet may differ: those are per row.
    """

    # the weights that are live on the device
    model: str
    adapters: tuple[Adapter, ...]
    # the tensor shapes
    width: int
    height: int
    token_chunks: int
    """Prompt length in chunks of 77 tokens: the longer of prompt and negative prompt."""


@dataclass(frozen=True, slots=True)
class Progress:
    """A step of a request is done."""

    step: int
    steps: int


ProgressListener = Callable[[Progress], None]
"""Called on the engine's thread: must return at once and must not raise."""


@dataclass(slots=True)
class PhaseTimer:
    """Moments of a request's life on the engine's monotonic clock, seconds; None until reached."""

    accepted_s: float
    started_s: float | None = None
    """First work on the device."""
    encoded_s: float | None = None
    denoised_s: float | None = None
    decoded_s: float | None = None


@dataclass(slots=True)
class Conditioning:
    """What steers a request: made once before its first step, constant thereafter.

    R is the request's rows: 2 with guidance (unconditional first), else 1; T is 77 x chunks.
    """

    prompt_embeds: torch.Tensor  # (R, T, D) model dtype, on the device
    pooled_embeds: torch.Tensor  # (R, P) model dtype, on the device
    control_features: torch.Tensor | None
    """(1, C, height/8, width/8): the depth map, embedded by its ControlNet; None without one."""
    prompt_tokens: int
    negative_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A finished image and what was really applied to it."""

    pixels: PixelImage
    scheduler_class: str
    use_karras_sigmas: bool
    prompt_tokens: int
    negative_prompt_tokens: int
    queue_s: float
    encode_s: float
    denoise_s: float
    decode_s: float
    notes: tuple[str, ...]


@dataclass(slots=True, eq=False)
class RequestState:
    """A request under way. Identity is the object: two states are never equal."""

    request: GenerationRequest
    key: BatchKey
    timer: PhaseTimer
    # its own noise scheduler and generator: both carry state from step to step
    scheduler: NoiseScheduler
    generator: torch.Generator
    step: int = 0
    """Steps done."""
    latents: torch.Tensor | None = None
    """(1, 4, height/8, width/8) fp32 on the device; None before the first step."""
    conditioning: Conditioning | None = None
    """None before the first step."""
    tiled: bool = False
    """There was too little memory to decode it in one piece."""
    notes: list[str] = field(default_factory=list)
    """What the engine had to do differently for this request (e.g. decode again in fp32)."""

    @property
    def finished(self) -> bool:
        """All steps done; what is left is to decode."""
        return self.step >= self.request.steps

    def result(self, pixels: PixelImage) -> GenerationResult:
        """Sum the finished request up. All moments of the timer have been reached."""
        timer, conditioning = self.timer, self.conditioning
        assert conditioning is not None
        assert timer.started_s is not None and timer.encoded_s is not None
        assert timer.denoised_s is not None and timer.decoded_s is not None
        return GenerationResult(
            pixels=pixels,
            scheduler_class=type(self.scheduler).__name__,
            use_karras_sigmas=bool(self.scheduler.config.get("use_karras_sigmas", False)),
            prompt_tokens=conditioning.prompt_tokens,
            negative_prompt_tokens=conditioning.negative_prompt_tokens,
            queue_s=timer.started_s - timer.accepted_s,
            encode_s=timer.encoded_s - timer.started_s,
            denoise_s=timer.denoised_s - timer.encoded_s,
            decode_s=timer.decoded_s - timer.denoised_s,
            notes=tuple(dict.fromkeys(self.notes)),  # each once
        )
