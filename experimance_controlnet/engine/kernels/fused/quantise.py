"""fp8: what kernels that end in it share, the product, and all weights of a network in one launch.

The table of weights holds addresses, as the one of ``merge.py`` does: a network has some two
hundred weights, and two hundred launches from Python would take longer than the work.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from experimance_controlnet.engine.kernels.fused.tables import TYPES, make_table, owners_of_tiles
from experimance_controlnet.engine.kernels.quantise import (
    E4M3_MAX,
    SMALLEST_AMAX,
    Quantised,
    WeightCopy,
)

_ROWS, _COLUMNS, _WARPS = 8, 256, 4
_MAX = tl.constexpr(E4M3_MAX)
_SMALLEST_AMAX = tl.constexpr(SMALLEST_AMAX)


@triton.jit
def scale_of(amax):
    """Of a row whose largest magnitude is ``amax``."""
    return tl.maximum(amax, _SMALLEST_AMAX) / _MAX


@triton.jit
def _quantise_kernel(
    tile_layers, layers,
    WEIGHT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    layer = layers + 7 * tl.load(tile_layers + tile).to(tl.int64)
    # said of the pointers: what is known of a number is lost when it becomes one
    weight = tl.multiple_of(tl.load(layer).to(tl.pointer_type(WEIGHT)), 16)
    values = tl.multiple_of(tl.load(layer + 1).to(tl.pointer_type(tl.float8e4nv)), 16)
    scales = tl.load(layer + 2).to(tl.pointer_type(tl.float32))
    rows = tl.load(layer + 3)
    columns = tl.multiple_of(tl.load(layer + 4), 16)
    stride = tl.multiple_of(tl.load(layer + 5), 8)
    row = (tile - tl.load(layer + 6)) * ROWS + tl.arange(0, ROWS)
    row_mask = (row < rows)[:, None]
    step = tl.arange(0, COLUMNS)[None, :]
    weight_at = weight + row[:, None] * stride + step
    values_at = values + row[:, None] * columns + step
    # twice through the row: the second time it comes from the cache
    largest = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, columns.to(tl.int32), COLUMNS):
        mask = row_mask & (step < columns - first)
        largest = tl.maximum(largest, tl.abs(tl.load(weight_at + first, mask, 0.0).to(tl.float32)))
    scale = scale_of(tl.max(largest, axis=1))
    tl.store(scales + row, scale, row < rows)
    for first in range(0, columns.to(tl.int32), COLUMNS):
        mask = row_mask & (step < columns - first)
        value = tl.load(weight_at + first, mask, 0.0).to(tl.float32)
        tl.store(values_at + first, (value / scale[:, None]).to(tl.float8e4nv), mask)


class FusedPlan:
    """See :class:`experimance_controlnet.engine.kernels.quantise.QuantisePlan`."""

    def __init__(self, copies: Sequence[WeightCopy]) -> None:
        """Raises:
        ValueError: the weights differ in precision, or their rows cannot be read 16 bytes at a
            time.
        """
        # what the addresses in the table point to stays where it is as long as these are held
        self._copies = copies
        self._weight_type = copies[0].weight.dtype
        layers: list[tuple[int, ...]] = []
        tiles: list[int] = []
        for copy in copies:
            if copy.weight.dtype != self._weight_type or not _is_aligned(copy):
                raise ValueError(f"{copy.weight.dtype}, strides {copy.weight.stride()}")
            rows, columns = copy.weight.shape
            place = copy.weight.data_ptr(), *_places(copy.quantised)
            layers.append((*place, rows, columns, copy.weight.stride(0), sum(tiles)))
            tiles.append(triton.cdiv(rows, _ROWS))
        device = copies[0].weight.device
        self._layers = make_table(layers, device)
        self._tile_layers = owners_of_tiles(tiles, device)

    def run(self) -> None:
        _quantise_kernel[(len(self._tile_layers),)](
            self._tile_layers, self._layers,
            WEIGHT=TYPES[self._weight_type], ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=_WARPS,
        )  # fmt: skip


def _is_aligned(copy: WeightCopy) -> bool:
    tensors = copy.weight, copy.quantised.values
    dense = copy.weight.shape[1] % 16 == 0 and copy.weight.stride(0) % 8 == 0
    return dense and all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


def _places(quantised: Quantised) -> tuple[int, int]:
    return quantised.values.data_ptr(), quantised.scales.data_ptr()


def scaled_product(a: Quantised, b: Quantised, dtype: torch.dtype) -> torch.Tensor:
    return torch._scaled_mm(
        a.values,
        b.values.t(),
        a.scales,
        b.scales.t(),
        out_dtype=dtype,
        # partial sums in fewer bits than fp32: what the operands have lost is far more
        use_fast_accum=True,
    )
