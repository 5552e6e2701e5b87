"""SDXL image generation steered by depth maps, in the style of historical eras."""

__version__ = "0.1.0"
