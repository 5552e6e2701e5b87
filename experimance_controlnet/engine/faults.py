"""What an exception on the engine's thread means for the request and for the process."""

from __future__ import annotations

import torch

from experimance_controlnet.errors import DeviceMemoryError, GenerationError, WorkerError

_FATAL_MESSAGES = (
    "illegal memory access",
    "device-side assert",
    "unspecified launch failure",
    "misaligned address",
    "hardware stack error",
    "ecc error",
)


def is_out_of_memory(error: BaseException) -> bool:
    """The device or the host has no room for a tensor; smaller work may still succeed."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError)


def is_fatal(error: BaseException) -> bool:
    """The CUDA context is lost: nothing in this process can use the device again."""
    if is_out_of_memory(error) or not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    return any(message in text for message in _FATAL_MESSAGES)


def as_worker_error(error: Exception) -> WorkerError:
    """The typed error that the client gets; the cause stays in the log."""
    if isinstance(error, WorkerError):
        return error
    if is_out_of_memory(error):
        return DeviceMemoryError(
            "The device has too little memory for this request; ask for a smaller image."
        )
    return GenerationError("The model failed on this request; the server's log has the cause.")
