"""What the engine needs of a device. One implementation makes SDXL images (``sdxl.py``), another
only pretends to (``fake.py``), so that the engine can be tested without a model.

All methods but :meth:`Runner.load` and :meth:`Runner.gpu_memory` are called on the engine's thread,
the properties on any.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from experimance_controlnet.engine.request import (
    Asset,
    GenerationRequest,
    PixelImage,
    RequestState,
)


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """Device memory, bytes."""

    allocated_bytes: int
    reserved_bytes: int
    total_bytes: int


LoadSource = Literal["disk", "host"]

Stage = Literal["prepare", "predict", "decode"]
"""What can be done again: nothing of the request has changed when it fails."""


class PendingFrame(Protocol):
    """An image that the device may still be working on."""

    def ready(self) -> bool:
        """Whether :meth:`result` would not wait."""

    @property
    def decode_s(self) -> float:
        """What decoding took on the device; call it after :meth:`result`."""

    def result(self) -> tuple[PixelImage, list[str]]:
        """Wait for the pixels; also says what had to be done differently for them.

        Raises:
            NanOutputError: no usable frame in full precision either.
        """


class Runner(Protocol):
    """Owns the device, the models on it and all tensors."""

    @property
    def device_name(self) -> str:
        """For people: ``NVIDIA H200`` or ``cpu``."""

    @property
    def precision(self) -> str:
        """What it computes in: ``fp32``, ``fp16`` or ``fp8``. The same for its whole life."""

    @property
    def memory_tier(self) -> str:
        """``resident``, ``parked`` or ``minimal``: how much stays on the device."""

    @property
    def loaded_models(self) -> tuple[str, ...]:
        """Names of the models on the device, ready to use."""

    @property
    def parked_models(self) -> tuple[str, ...]:
        """Names of the models that wait in the host's memory and come back without the disk."""

    def gpu_memory(self) -> GpuMemory | None:
        """None without a GPU. Safe on any thread."""

    def missing(self, request: GenerationRequest) -> Asset | None:
        """The next thing to load before the request can begin, its model first; None: nothing."""

    def has(self, asset: Asset) -> bool:
        """Whether it is on the device."""

    def source(self, asset: Asset) -> LoadSource:
        """Where :meth:`load` would take it from."""

    @property
    def load_share(self) -> float | None:
        """0..1: how much of what :meth:`load` brings is there, about; None: that is not known."""

    def make_room(self, asset: Asset, in_use: Collection[Asset]) -> bool:
        """Make what is not in use leave the device, least recently used first, until the asset
        fits. False: by estimate it does not. What leaves is parked where the host has room.

        Raises:
            ModelFileError: its files are missing.
        """

    def load(self, asset: Asset) -> Any:
        """Read it, or bring it back from where it is parked. Slow; runs on the loader's thread
        while the engine goes on.

        The libraries swap process-wide settings while they inject a LoRA (how parameters are
        registered), so nothing but this method may load, and never two at a time.

        Raises:
            ModelFileError: its files are missing, damaged or not to be trusted.
            BadAdapterError: a LoRA that does not fit the model.
        """

    def install(self, asset: Asset, loaded: Any) -> None:
        """Take over what :meth:`load` returned; from now on the asset is on the device."""

    def unload(self, model: str) -> None:
        """Free a model that no request uses, and its LoRAs, on the device and where they are
        parked; without effect where there is nothing of it.
        """

    def admit(self, request: GenerationRequest, accepted_s: float) -> RequestState:
        """Everything about a request that is cheap and needs no device. Nothing is missing.

        Raises:
            InvalidRequestError: the request does not suit the model.
        """

    def prepare(self, state: RequestState) -> None:
        """Make what the first step needs: embeddings, control image, noise. The same each time."""

    def predict(self, states: Sequence[RequestState]) -> Sequence[Any]:
        """Evaluate the network once for all; one prediction a request. Changes no state.

        May return while the device is still at it, but never more than one step ahead of it.
        """

    def advance(self, state: RequestState, prediction: Any) -> None:
        """Let the request's own scheduler take the step that the prediction is for."""

    def decode(self, state: RequestState) -> PendingFrame:
        """Begin to make pixels of the latents; others may step meanwhile."""

    def warm_up(self) -> bool:
        """Do one piece of preparation that can wait; the engine asks when it has nothing else to
        do. False where nothing is left to prepare.
        """

    def release_memory(self) -> None:
        """Give cached device memory back after an out-of-memory error."""

    def relieve(self, state: RequestState, stage: Stage, in_use: Collection[Asset]) -> str | None:
        """There was too little memory for ``stage`` of this request, which will be tried again: do
        the mildest thing against it that was not done for this request yet. Returns a note that
        says what; None where nothing is left to do.
        """
