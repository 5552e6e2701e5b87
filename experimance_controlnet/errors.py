"""Every error this package raises on purpose.

::

    WorkerError
    ├── InvalidRequestError        the client can mend it; names the field
    │   ├── UnknownNameError       a model, era, LoRA, ControlNet that the catalogue does not hold
    │   ├── BadDepthMapError       the depth map cannot be read
    │   └── BadAdapterError        a LoRA that does not fit the model
    ├── SettingsError              the operator can mend it: a flag or an environment variable
    ├── CatalogError               the operator can mend it: a catalogue file
    ├── ModelFileError             weights that are missing, broken or not to be trusted
    │   ├── DownloadError
    │   │   └── NotFoundUpstreamError   the origin answers that the file does not exist
    │   │       └── AccessDeniedError   or that it may not be read
    │   ├── BadWeightsError
    │   │   └── ChecksumMismatchError   whole, but not the file that the catalogue means
    │   ├── DiskFullError
    │   └── FileInUseError          it cannot be removed: a transfer or another entry needs it
    ├── UnavailableError           not now; worth another try later
    │   ├── QueueFullError
    │   ├── DrainingError
    │   ├── ModelBusyError
    │   ├── DeviceMemoryError
    │   └── EngineDeadError
    ├── DeadlineExceededError      the request waited longer than its deadline
    ├── RequestAbortedError        nobody waits for the result any more
    └── GenerationError            the model produced no usable image
        └── NanOutputError

The message of an error is written for the person who can mend it and says what to do. It never
holds a traceback, a secret or more of the client's input than a name. The HTTP status of each
class is in one table, ``server/problems.py``.
"""

from __future__ import annotations


class WorkerError(Exception):
    """Base of all. ``code`` is the stable, machine-readable name in the problem body."""

    code = "internal_error"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidRequestError(WorkerError):
    """A request that can never succeed as it is. ``field`` names the part to change."""

    code = "invalid_request"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class UnknownNameError(InvalidRequestError):
    """A name that is not in the catalogue."""

    code = "unknown_name"


class BadDepthMapError(InvalidRequestError):
    """A depth map that cannot be decoded, or must not be."""

    code = "bad_depth_map"


class BadAdapterError(InvalidRequestError):
    """A LoRA whose layers or shapes do not belong to the model it is asked for."""

    code = "bad_weights"


class SettingsError(WorkerError):
    """A bad flag or environment variable; stops the start."""

    code = "bad_settings"


class CatalogError(WorkerError):
    """A catalogue that cannot be used; stops the start. Names the file and the key."""

    code = "bad_catalog"


class ModelFileError(WorkerError):
    """Model files cannot be had."""

    code = "model_file_error"


class DownloadError(ModelFileError):
    """The origin of a file cannot be reached, or broke off."""

    code = "download_failed"


class NotFoundUpstreamError(DownloadError):
    """The origin of a file says that it does not exist."""

    code = "not_found_upstream"


class AccessDeniedError(NotFoundUpstreamError):
    """The origin of a file wants an access token, or does not accept the one it got.

    Some origins answer so for files that do not exist, hence the base.
    """

    code = "access_denied"


class BadWeightsError(ModelFileError):
    """A file that is not safetensors, is damaged, or does not fit the model."""

    code = "bad_weights"


class ChecksumMismatchError(BadWeightsError):
    """The content that an origin sent is not what the catalogue, or the origin, says it is."""

    code = "checksum_mismatch"


class DiskFullError(ModelFileError):
    """Not enough room in MODELS_DIR."""

    code = "disk_full"


class FileInUseError(ModelFileError):
    """A file that is to be removed, but that a transfer or another entry needs."""

    code = "file_in_use"


class UnavailableError(WorkerError):
    """The server cannot take this now. ``retry_after_s`` says when to come back."""

    code = "unavailable"

    def __init__(self, message: str, retry_after_s: float = 5.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFullError(UnavailableError):
    """As many images wait as the operator allows."""

    code = "queue_full"


class DrainingError(UnavailableError):
    """The server is stopping and takes no new work."""

    code = "draining"


class ModelBusyError(UnavailableError):
    """A model cannot be freed while requests use it."""

    code = "model_busy"


class DeviceMemoryError(UnavailableError):
    """One request alone does not fit into the device's memory."""

    code = "out_of_memory"


class EngineDeadError(UnavailableError):
    """The engine stopped for good; the process is about to exit."""

    code = "engine_dead"


class DeadlineExceededError(WorkerError):
    """The request's deadline passed before its first step."""

    code = "deadline_exceeded"


class RequestAbortedError(WorkerError):
    """The request was cancelled, usually because the client has gone."""

    code = "client_gone"


class GenerationError(WorkerError):
    """The model failed on this request."""

    code = "generation_failed"


class NanOutputError(GenerationError):
    """The decoded frame is not a number, or black, in full precision too."""

    code = "nan_output"
