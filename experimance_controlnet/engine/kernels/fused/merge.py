"""Merging in one launch: a grouped product whose tables say where each matrix lies.

A program writes one tile of one matrix. It finds its matrix in ``tile_layers``, the matrix's
addresses and sizes in ``layers``, and the updates in ``updates``: all int64, so that addresses are
numbers too. What is read and written besides, pristine tile and weight tile, is what copying costs.

fp16 and bf16 factors are multiplied exactly. fp32 ones lose what is beyond tf32, 10 bits as in
fp16, where the weights are of half precision too; into fp32 weights they go as three products of
tf32 parts (error about 2^-22), which is several times slower.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby

import torch
import triton
import triton.language as tl

from experimance_controlnet.engine.kernels.fused.tables import TYPES, make_table, owners_of_tiles
from experimance_controlnet.engine.kernels.merge import Target, pad_rank
from experimance_controlnet.engine.transfers import to_device

_ROWS, _COLUMNS, _WARPS = 32, 256, 4  # the fastest of eight shapes on an H100; 128 x 128 spills
_ALIGNMENT_BYTES = 16
_RANK_STEP = 32
"""Of a product at most; 16 where a rank demands it. Two values, so two compilations at most."""


@triton.jit
def _merge_kernel(
    tile_layers, layers, updates, scales,
    WEIGHT: tl.constexpr, FACTOR: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    RANK_STEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    layer = layers + 9 * tl.load(tile_layers + tile).to(tl.int64)
    weight = tl.load(layer).to(tl.pointer_type(WEIGHT))
    pristine = tl.load(layer + 1).to(tl.pointer_type(WEIGHT))
    rows = tl.load(layer + 2)
    columns = tl.load(layer + 3)
    weight_stride = tl.load(layer + 4)
    pristine_stride = tl.load(layer + 5)
    tile -= tl.load(layer + 6)
    first_update = tl.load(layer + 7).to(tl.int32)
    end_update = tl.load(layer + 8).to(tl.int32)
    if ALIGNED:
        # said of pointers: what is known of a number is lost when it becomes one
        weight = tl.multiple_of(weight, 16)
        pristine = tl.multiple_of(pristine, 16)
        columns = tl.multiple_of(columns, 8)
        weight_stride = tl.multiple_of(weight_stride, 8)
        pristine_stride = tl.multiple_of(pristine_stride, 8)
    tiles_across = tl.cdiv(columns, COLUMNS)
    row = (tile // tiles_across) * ROWS + tl.arange(0, ROWS)
    column = (tile % tiles_across) * COLUMNS + tl.arange(0, COLUMNS)
    row_mask, column_mask = (row < rows)[:, None], (column < columns)[None, :]
    mask = row_mask & column_mask

    at = pristine + row[:, None] * pristine_stride + column[None, :]
    total = tl.load(at, mask, 0.0).to(tl.float32)
    for index in range(first_update, end_update):
        update = updates + 3 * index
        up = tl.load(update).to(tl.pointer_type(FACTOR))
        down = tl.load(update + 1).to(tl.pointer_type(FACTOR))
        rank = tl.load(update + 2)
        if ALIGNED:
            up = tl.multiple_of(up, 16)
            down = tl.multiple_of(down, 16)
            rank = tl.multiple_of(rank, 16)
        step = tl.arange(0, RANK_STEP)
        up_at = up + row[:, None] * rank + step[None, :]
        down_at = down + step[:, None] * columns + column[None, :]
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        for _ in range(0, rank.to(tl.int32), RANK_STEP):
            left = tl.load(up_at, row_mask, 0.0)
            right = tl.load(down_at, column_mask, 0.0)
            if tl.bfloat16 == FACTOR:
                left, right = left.to(tl.float32), right.to(tl.float32)
            product = tl.dot(left, right, product, input_precision=PRECISION)
            up_at += RANK_STEP
            down_at += RANK_STEP * columns
        total += product * tl.load(scales + index)
    at = weight + row[:, None] * weight_stride + column[None, :]
    tl.store(at, total.to(WEIGHT), mask)


class FusedPlan:
    """See :class:`experimance_controlnet.engine.kernels.merge.MergePlan`."""

    def __init__(self, targets: Sequence[Target]) -> None:
        """One launch for each precision of the weights; matrices of odd width have their own."""
        ordered = sorted(targets, key=_launch_key)
        self._launches = [_Launch(list(group)) for _, group in groupby(ordered, key=_launch_key)]

    def run(self, strengths: Sequence[float]) -> None:
        for launch in self._launches:
            launch.run(strengths)


def _launch_key(target: Target) -> tuple[str, bool]:
    return str(target.weight.dtype), _is_aligned(target)


def _is_aligned(target: Target) -> bool:
    """Whether all rows may be read 16 bytes at a time. Factors are made to fit."""
    return target.weight.shape[1] % 8 == 0 and all(
        tensor.stride(0) % 8 == 0 and tensor.data_ptr() % _ALIGNMENT_BYTES == 0
        for tensor in (target.weight, target.pristine)
    )


class _Launch:
    """The tables of targets of one precision, on their device."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self._weight_type = targets[0].weight.dtype
        self._device = targets[0].weight.device
        self._aligned = _is_aligned(targets[0])
        updates = [update for target in targets for update in target.updates]
        self._factor_type = _common_type(update.up.dtype for update in updates)
        factors = [self._place(update.up, update.down) for update in updates]
        # what the addresses in the tables point to stays where it is as long as these are held
        self._held = (targets, factors)
        self._rank_step = math.gcd(_RANK_STEP, *(len(down) for _, down in factors))
        self._scales = torch.tensor([update.scale for update in updates], dtype=torch.float64)
        self._slots = torch.tensor([update.slot for update in updates], dtype=torch.int64)
        self._updates = make_table(
            [(up.data_ptr(), down.data_ptr(), len(down)) for up, down in factors], self._device
        )
        layers, tiles = _layer_rows(targets)
        self._layers = make_table(layers, self._device)
        self._tile_layers = owners_of_tiles(tiles, self._device)

    def _place(self, up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        up, down = (
            _aligned(factor.to(self._device, self._factor_type)) for factor in pad_rank(up, down)
        )
        return up, down

    def run(self, strengths: Sequence[float]) -> None:
        scales = self._scales * torch.tensor(strengths, dtype=torch.float64)[self._slots]
        _merge_kernel[(len(self._tile_layers),)](
            self._tile_layers,
            self._layers,
            self._updates,
            to_device(scales.float(), self._device),
            WEIGHT=TYPES[self._weight_type],
            FACTOR=TYPES[self._factor_type],
            ALIGNED=self._aligned,
            PRECISION="tf32x3" if self._weight_type == torch.float32 else "tf32",
            RANK_STEP=self._rank_step,
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
            num_warps=_WARPS,
        )


def _common_type(types: Iterable[torch.dtype]) -> torch.dtype:
    """The precision of all factors if it is one; fp32, which holds every other, if they differ."""
    found = set(types) or {torch.float16}
    return found.pop() if len(found) == 1 and found <= TYPES.keys() else torch.float32


def _aligned(factor: torch.Tensor) -> torch.Tensor:
    factor = factor.contiguous()
    return factor.clone() if factor.data_ptr() % _ALIGNMENT_BYTES else factor


def _layer_rows(targets: Sequence[Target]) -> tuple[list[tuple[int, ...]], list[int]]:
    """The kernel's table of layers, and how many tiles each of them has."""
    layers: list[tuple[int, ...]] = []
    tiles: list[int] = []
    first_tile = first_update = 0
    for target in targets:
        rows, columns = target.weight.shape
        end_update = first_update + len(target.updates)
        layers.append(
            (
                target.weight.data_ptr(),
                target.pristine.data_ptr(),
                rows,
                columns,
                target.weight.stride(0),
                target.pristine.stride(0),
                first_tile,
                first_update,
                end_update,
            )
        )
        tiles.append(triton.cdiv(rows, _ROWS) * triton.cdiv(columns, _COLUMNS))
        first_tile += tiles[-1]
        first_update = end_update
    return layers, tiles
