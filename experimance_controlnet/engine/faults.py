"""What an exception on the engine's thread means for the request and for the process.

torch is imported where it is needed: whoever imports this should not have to wait for it.
"""

from __future__ import annotations

from collections.abc import Callable

from experimance_controlnet.errors import DeviceMemoryError, GenerationError, WorkerError

_OUT_OF_MEMORY_MESSAGES = (
    "out of memory",  # CUDA's own, outside torch's allocator
    "can't allocate memory",  # torch's CPU allocator
    "alloc_failed",  # cuBLAS and cuDNN
)
_FATAL_MESSAGES = ("cuda error", "cublas_status", "cudnn_status")
"""After any of these but out of memory the context may be lost; a new process is certain."""


def is_out_of_memory(error: BaseException) -> bool:
    """The device or the host has no room for a tensor; smaller work may still succeed."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _says(error, _OUT_OF_MEMORY_MESSAGES)


def is_fatal(error: BaseException) -> bool:
    """The CUDA context is lost: nothing in this process can use the device again."""
    import torch

    if is_out_of_memory(error) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.AcceleratorError) or _says(error, _FATAL_MESSAGES)


def attempt(work: Callable[[], object]) -> Exception | None:
    """Do work for one request, or for none. Returns what went wrong with it, None: nothing.

    The only place where the engine catches whatever may come. A fatal error goes on. One for want
    of memory comes without its traceback, whose frames would keep the tensors alive that should
    make room.
    """
    try:
        work()
    except Exception as error:
        if is_fatal(error):
            raise
        if not is_out_of_memory(error):
            return error
        error.__cause__ = error.__context__ = None
        return error.with_traceback(None)
    return None


def drop_frames(error: BaseException) -> None:
    """Let go of the tensors that the frames of tracebacks keep alive, those of its causes too."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__


def as_worker_error(error: Exception) -> WorkerError:
    """The typed error that the client gets; the cause stays in the log."""
    if isinstance(error, WorkerError):
        return error
    if is_out_of_memory(error):
        return DeviceMemoryError(
            "The device has too little memory for this request; ask for a smaller image."
        )
    return GenerationError("The model failed on this request; the server's log has the cause.")


def _says(error: BaseException, messages: tuple[str, ...]) -> bool:
    text = str(error).lower()
    return any(message in text for message in messages)
