"""The gate before every weight file: safetensors or nothing."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from experimance_controlnet.errors import BadWeightsError


def verify_safetensors(path: Path) -> None:
    """Check that a file is complete safetensors; reads only its header.

    The library's own parser does it: header of at most 100 MB, JSON, tensors that cover the file
    to its last byte without gap or overlap. A pickle or zip under that name fails at the length.
    Raises BadWeightsError; OSError where the file cannot be read.
    """
    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise BadWeightsError(f"{path.name} is not a whole safetensors file: {reason}") from error
