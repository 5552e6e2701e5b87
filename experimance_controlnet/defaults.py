"""What requests mean where they name nothing; without any import, for whoever must start fast."""

from __future__ import annotations

DEFAULT_MODEL = "lightning"
DEFAULT_CONTROLNET = "sdxl_small"
