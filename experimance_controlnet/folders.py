"""Where model files are kept when nobody says it, and whether a folder can be used.

Apart from ``settings.py``, for commands that must start faster than its library.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from platformdirs import user_data_path

DEFAULT_MODELS_DIR = Path("/workspace/models")


def per_user_folder() -> Path:
    """The platform's place for a user's data, where ``/workspace`` cannot be written."""
    return user_data_path("experimance_controlnet")


def why_unusable(folder: Path) -> str | None:
    """Why nothing can be written there; None where it can, and the folder then exists."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return f"{folder} cannot be written: {error.strerror}"
    return None


def default_models_dir(wanted: Path = DEFAULT_MODELS_DIR, per_user: Path | None = None) -> Path:
    """The folder that the server uses where MODELS_DIR is not set. Creates nothing."""
    nearest = next(folder for folder in (wanted, *wanted.parents) if folder.exists())
    usable = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    return wanted if usable else (per_user or per_user_folder()) / "models"
