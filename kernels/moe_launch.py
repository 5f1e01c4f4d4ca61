"""How the kernels of moe_triton.py are launched: grids and tile sizes, by dtype and by how many rows there are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .launch import Launch, power_of_two, triton_module
from .rows import cdiv


class Tiles(NamedTuple):
    """Rows, outputs and inputs of a tile, and the stages in which tiles are on their way."""

    rows: int
    outputs: int
    inputs: int
    stages: int


# On every device: three stages of bfloat16 take 74 KiB of shared memory, less than any of them has. Few rows, as in
# decoding, are a tile of 16, the least that tensor cores take. In float32 a tile is what registers hold.
NARROW, FEW_ROWS, SINGLE = Tiles(64, 128, 64, 3), Tiles(16, 128, 64, 3), Tiles(32, 64, 32, 2)
OUTER, SINGLE_OUTER = Tiles(64, 64, 128, 3), Tiles(32, 32, 64, 2)
FEW, WARPS = 16, 4  # rows a group on average that are few


def tiles_of(x: Tensor, groups: int) -> Tiles:
    if x.dtype == torch.float32:
        return SINGLE
    return FEW_ROWS if len(x) <= FEW * groups else NARROW


def product_launch(x: Tensor, weight: Tensor, ends: Tensor, turned: bool, y: Tensor) -> Launch:
    """y [m, N] of x [m, K] with rows that are contiguous; see `moe.grouped_product`."""
    tiles, groups = tiles_of(x, len(ends)), len(ends)
    matrix = weight.mT if turned else weight  # [E, N, K]
    outputs, inputs = matrix.shape[1:]
    # Every group may leave a tile unfilled, and so many tiles are launched whatever the groups are.
    grid = (cdiv(len(x), tiles.rows) + min(groups, len(x)), cdiv(outputs, tiles.outputs))
    arguments = {
        "x": x, "weight": matrix, "ends": ends, "y": y, "s_x_m": x.stride(0),
        "s_weight_e": matrix.stride(0), "s_weight_n": matrix.stride(1), "s_weight_k": matrix.stride(2),
        "s_y_m": y.stride(0), "GROUPS": groups, "N": outputs, "K": inputs, "GROUPS_2": power_of_two(groups),
        "BLOCK_M": tiles.rows, "BLOCK_N": tiles.outputs, "BLOCK_K": tiles.inputs, "STAGES": tiles.stages,
    }  # fmt: skip
    return Launch(triton_module("moe_triton").grouped_rows, grid, arguments, WARPS, tiles.stages)


def gradient_launch(y: Tensor, x: Tensor, ends: Tensor, out: Tensor) -> Launch:
    """out [E, N, K] of y [m, N] and x [m, K] with rows that are contiguous; see `moe.grouped_gradient`."""
    tiles = SINGLE_OUTER if x.dtype == torch.float32 else OUTER
    (_, outputs), inputs = y.shape, x.shape[1]
    grid = (len(ends), cdiv(outputs, tiles.outputs), cdiv(inputs, tiles.inputs))
    arguments = {
        "y": y, "x": x, "ends": ends, "out": out, "s_y_m": y.stride(0), "s_x_m": x.stride(0), "N": outputs, "K": inputs,
        "BLOCK_M": tiles.rows, "BLOCK_N": tiles.outputs, "BLOCK_K": tiles.inputs, "STAGES": tiles.stages,
    }  # fmt: skip
    return Launch(triton_module("moe_triton").grouped_outer, grid, arguments, WARPS, tiles.stages)


def triton_product(x: Tensor, weight: Tensor, ends: Tensor, turned: bool) -> Tensor:
    """`moe.grouped_product` by Triton."""
    x = in_rows(x)
    y = x.new_empty(len(x), weight.shape[2 if turned else 1])
    if len(x):
        product_launch(x, weight, ends, turned, y).enqueue(x)
    return y


def triton_gradient(y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """`moe.grouped_gradient` by Triton."""
    out = x.new_empty(len(ends), y.shape[1], x.shape[1])
    gradient_launch(in_rows(y), in_rows(x), ends, out).enqueue(x)
    return out


def in_rows(x: Tensor) -> Tensor:
    """x [m, C] with neighbouring columns side by side."""
    return x if x.stride(1) == 1 else x.contiguous()
