"""The kernels in Triton. Importing this package needs triton; see the parent for the meaning."""

from experimance_controlnet.engine.kernels.fused.group_norm import group_norm
from experimance_controlnet.engine.kernels.fused.layer_norm import (
    add_layer_norm,
    add_layer_norm_quantised,
    layer_norm,
    layer_norm_quantised,
)
from experimance_controlnet.engine.kernels.fused.pointwise import (
    add_bias,
    geglu,
    geglu_quantised,
    interleave,
    join,
)
from experimance_controlnet.engine.kernels.fused.quantise import scaled_product

__all__ = [
    "add_bias",
    "add_layer_norm",
    "add_layer_norm_quantised",
    "geglu",
    "geglu_quantised",
    "group_norm",
    "interleave",
    "join",
    "layer_norm",
    "layer_norm_quantised",
    "scaled_product",
]
