"""The kernels in Triton. Importing this package needs triton; see the parent for the meaning."""

from experimance_controlnet.engine.kernels.fused.group_norm import group_norm
from experimance_controlnet.engine.kernels.fused.layer_norm import add_layer_norm, layer_norm
from experimance_controlnet.engine.kernels.fused.pointwise import add_bias, geglu, interleave, join

__all__ = [
    "add_bias",
    "add_layer_norm",
    "geglu",
    "group_norm",
    "interleave",
    "join",
    "layer_norm",
]
