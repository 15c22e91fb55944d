"""Gram matrices of many layers and cells with float32 products, in one launch.

A program makes one tile of the lower triangle of one cell of one problem. It gathers the rows of
the cell, subtracts the shift and multiplies on the tensor cores, where a product of float32 is
three of TF32. The float32 sums take in at most 128 rows before they are added to float64 ones.
Other programs of the same launch make the rows of z, in float64.

The interpreter shows what the split into TF32 loses, and rounds its sums as float32 does. Tensor
cores cut them off: how much that adds, only a GPU shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Rows of a float32 sum, as in the CPU core.
CHUNK = 128
# Problems of a launch. Their pointers are arguments of the kernel, which has 4 KB for them. A table
# on the device would be copied there before every launch, and a CUDA graph would hold an old one.
PROBLEMS = (1, 8, 32)
TARGETS = 4  # columns of z that share one read of x


@triton.jit
def _gathered(source, at, ok, cols, end):
    return tl.load(source + at[:, None] + cols[None, :], ok[:, None] & (cols < end)[None, :], 0.0)


@triton.jit
def _split(x):
    # Two numbers of TF32 that are x but for 2^-22 of it. The first is rounded to nearest, so that
    # the product of two rests, which is left out, is 4e-8 of the diagonal. What input_precision
    # "tf32x3" does instead takes 375 instructions for 16 rows of a tile and this 263, and they
    # decide how fast the kernel is.
    head = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    rest = ((x - head).to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)
    return head, rest


@triton.jit
def _tile(
    x,
    shift,
    stride,
    order,
    rows,
    out,
    dim,
    p,
    tile,
    CHUNK: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Squares of BLOCK_I, of the lower triangle, each cut into parts of BLOCK_J columns.
    square = tile // (BLOCK_I // BLOCK_J)
    i = ((tl.sqrt(8.0 * square + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > square, i - 1, i)  # where the root was rounded
    i = tl.where((i + 1) * (i + 2) // 2 <= square, i + 1, i)
    j = square - i * (i + 1) // 2
    high = i * BLOCK_I + tl.arange(0, BLOCK_I)
    wide = j * BLOCK_I + tile % (BLOCK_I // BLOCK_J) * BLOCK_J + tl.arange(0, BLOCK_J)
    # The shift as two float32: x less the first is exact where they are close, so that the
    # difference of the float64 shift is rounded once. Conversions to float64 would cost more than
    # the products: there are 16 a clock.
    shift_i = tl.load(shift + high, high < dim, 0.0)
    shift_j = tl.load(shift + wide, wide < dim, 0.0)
    head_i = shift_i.to(tl.float32)
    head_j = shift_j.to(tl.float32)
    tail_i = (shift_i - head_i).to(tl.float32)
    tail_j = (shift_j - head_j).to(tl.float32)

    lines = tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_I, BLOCK_J), tl.float64)
    for chunk in range(0, rows, CHUNK):
        part = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
        for start in tl.range(chunk, tl.minimum(chunk + CHUNK, rows), BLOCK_N, num_stages=STAGES):
            ok = start + lines < rows
            at = tl.load(order + start + lines, ok, 0) * stride
            # Widened at once: the interpreter subtracts the bits of bfloat16.
            left = _gathered(x, at, ok, high, dim).to(tl.float32)
            right = _gathered(x, at, ok, wide, dim).to(tl.float32)
            left = (left - head_i[None, :]) - tail_i[None, :]
            right = (right - head_j[None, :]) - tail_j[None, :]
            left = tl.where(ok[:, None], left, 0.0)
            left, left_rest = _split(tl.trans(left))
            right, right_rest = _split(right)
            part = tl.dot(left_rest, right, part, input_precision="tf32")
            part = tl.dot(left, right_rest, part, input_precision="tf32")
            part = tl.dot(left, right, part, input_precision="tf32")
        total += part.to(tl.float64)
    to = out + high.to(tl.int64)[:, None] * p + wide[None, :]
    keep = (high < dim)[:, None] & (wide[None, :] <= high[:, None])
    tl.store(to, tl.load(to, keep, 0.0) + total, keep)


@triton.jit
def _target_rows(
    source,
    shift,
    stride,
    width,
    z,
    q,
    order,
    rows,
    out,
    p,
    first,
    group,
    block,
    TARGETS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    # out[k, first + c] += sum of z[r, k] * (source[r, c] - shift[c]) for TARGETS columns k of z.
    cols = block * BLOCK + tl.arange(0, BLOCK)
    lines = tl.arange(0, BLOCK_N)
    totals = ()
    for _ in tl.static_range(TARGETS):
        totals += (tl.zeros((BLOCK_N, BLOCK), tl.float64),)
    about = tl.zeros((BLOCK,), tl.float64)
    if shift is not None:
        about = tl.load(shift + cols, cols < width, 0.0)
    for start in tl.range(0, rows, BLOCK_N, num_stages=STAGES):
        ok = start + lines < rows
        row = tl.load(order + start + lines, ok, 0)
        values = _gathered(source, row * stride, ok, cols, width)
        if values.dtype != tl.float64:
            values = values.to(tl.float32)
        values = values.to(tl.float64) - about[None, :]
        new = ()
        for t in tl.static_range(TARGETS):
            k = tl.minimum(group * TARGETS + t, q - 1)
            weight = tl.load(z + row * q + k, ok, 0.0)
            new += (totals[t] + weight[:, None] * values,)
        totals = new
    for t in tl.static_range(TARGETS):
        k = group * TARGETS + t
        to = out + (p - q + k).to(tl.int64) * p + first + cols
        keep = (cols < tl.where(k < q, width, 0)) & (first + cols <= p - q + k)
        tl.store(to, tl.load(to, keep, 0.0) + tl.sum(totals[t], 0), keep)


@triton.jit
def gram_kernel(
    xs,
    shifts,
    strides,
    outs,
    z,
    order,
    offsets,
    problems,
    cells,
    dim,
    q,
    CHUNK: tl.constexpr,
    TARGETS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_Z: tl.constexpr,
    BLOCK_ZN: tl.constexpr,
):
    """Add one tile of one cell of one problem: first those of the rows of z, which take longest."""
    x_blocks = tl.cdiv(dim, BLOCK_Z)
    z_blocks = x_blocks + tl.cdiv(q, BLOCK_Z)
    z_tiles = tl.cdiv(q, TARGETS) * z_blocks
    side = tl.cdiv(dim, BLOCK_I)
    tiles = side * (side + 1) // 2 * (BLOCK_I // BLOCK_J)
    tile = tl.program_id(0)
    in_z = tile < problems * cells * z_tiles
    if in_z:
        cell = tile // z_tiles
        tile = tile % z_tiles
    else:
        tile -= problems * cells * z_tiles
        cell = tile // tiles
        tile = tile % tiles
    problem = cell // cells
    cell = (cell % cells).to(tl.int64)
    x = xs[0]
    shift = shifts[0]
    stride = strides[0]
    out = outs[0]
    for i in tl.static_range(1, len(xs)):
        x = tl.where(problem == i, xs[i], x)
        shift = tl.where(problem == i, shifts[i], shift)
        stride = tl.where(problem == i, strides[i], stride)
        out = tl.where(problem == i, outs[i], out)
    p = dim + q
    out += cell * p * p
    first = tl.load(offsets + cell)
    rows = (tl.load(offsets + cell + 1) - first).to(tl.int32)
    order += first
    if in_z:
        group = tile // z_blocks
        block = tile % z_blocks
        if block < x_blocks:
            _target_rows(
                x, shift, stride, dim, z, q, order, rows, out, p, 0, group, block,
                TARGETS, BLOCK_Z, BLOCK_ZN, STAGES,
            )  # fmt: skip
        else:
            _target_rows(
                z, None, q, q, z, q, order, rows, out, p, dim, group, block - x_blocks,
                TARGETS, BLOCK_Z, BLOCK_ZN, STAGES,
            )  # fmt: skip
    else:
        _tile(
            x, shift, stride, order, rows, out, dim, p, tile,
            CHUNK, BLOCK_I, BLOCK_J, BLOCK_N, STAGES,
        )  # fmt: skip


def blocks(capability: int) -> dict[str, int]:
    """Choose the tile of a program; `bench/gpu.py` can put others in its place.

    Registers decide. From compute capability 9 on, the tensor cores read one operand or both from
    shared memory, and a thread has room for 32 float64 and 32 float32 sums, though not for the 32
    rows at a time with which a row of odd width spills; before, operands are in registers too.
    """
    return {
        "BLOCK_I": 64,
        "BLOCK_J": 64 if capability >= 9 else 32,
        "BLOCK_N": 16,
        "STAGES": 3 if capability >= 9 else 2,
        "BLOCK_Z": 32,
        "BLOCK_ZN": 32,
        "num_warps": 4,
    }


def launch(
    xs: Sequence[torch.Tensor],
    shifts: Sequence[torch.Tensor],
    z: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    outs: Sequence[torch.Tensor],
    capability: int = 9,
) -> tuple[int, dict[str, Any]]:
    """Return the number of programs and the arguments of `gram_kernel` for at most 32 problems."""
    problems, cells = len(xs), offsets.shape[0] - 1
    dim, q = xs[0].shape[1], z.shape[1]
    slots = next(slots for slots in PROBLEMS if slots >= problems)
    fill = [0] * (
        slots - problems
    )  # the rest of the table: the first problem, which nobody asks for
    choice = blocks(capability)
    arguments = {
        "xs": tuple(xs[i] for i in (*range(problems), *fill)),
        "shifts": tuple(shifts[i] for i in (*range(problems), *fill)),
        "strides": tuple(xs[i].stride(0) for i in (*range(problems), *fill)),
        "outs": tuple(outs[i] for i in (*range(problems), *fill)),
        "z": z,
        "order": order,
        "offsets": offsets,
        "problems": problems,
        "cells": cells,
        "dim": dim,
        "q": q,
        "CHUNK": CHUNK,
        "TARGETS": TARGETS,
        "enable_fp_fusion": True,  # the default, said because Triton 3.9 warns where it is not
    }
    z_blocks = triton.cdiv(dim, choice["BLOCK_Z"]) + triton.cdiv(q, choice["BLOCK_Z"])
    side = triton.cdiv(dim, choice["BLOCK_I"])
    tiles = side * (side + 1) // 2 * (choice["BLOCK_I"] // choice["BLOCK_J"])
    programs = problems * cells * (triton.cdiv(q, TARGETS) * z_blocks + tiles)
    return programs, arguments | choice


@cache
def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def grams(
    xs: Sequence[torch.Tensor],
    shifts: Sequence[torch.Tensor],
    z: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    outs: Sequence[torch.Tensor],
) -> None:
    """Add [x - shift, z]' [x - shift, z] of every cell of every problem, in one launch for 32.

    Products of x with x are those of float32 (three of TF32 each), in float32 sums of at most 128
    rows that are added up in float64: errors are expected at 1e-6 of sqrt(G_ii G_jj). Products with
    z are float64.

    Parameters
    ----------
    xs
        Of each problem [n, dim] on a GPU: float32, float16 or bfloat16, the same dtype and shape
        for all, rows contiguous.
    shifts
        Of each problem float64 [dim].
    z
        float64 [n, q], contiguous.
    order, offsets
        int64 on the GPU; cell c holds the rows order[offsets[c]:offsets[c + 1]] of every x and of
        z, repeats allowed.
    outs
        Of each problem float64 [cells, dim + q, dim + q], contiguous; the lower triangle is added
        to, the upper one left alone.

    Raises
    ------
    ValueError
        When a dtype, a shape or a device is not as above.
    """
    _check(xs, shifts, z, order, offsets, outs)
    if not (xs and outs[0].numel()):
        return
    with torch.cuda.device_of(z):
        for at in range(0, len(xs), PROBLEMS[-1]):
            part = slice(at, at + PROBLEMS[-1])
            programs, arguments = launch(
                xs[part], shifts[part], z, order, offsets, outs[part], _capability(z.device)
            )
            gram_kernel[(programs,)](**arguments)


def _check(
    xs: Sequence[torch.Tensor],
    shifts: Sequence[torch.Tensor],
    z: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    outs: Sequence[torch.Tensor],
) -> None:
    if not len(xs) == len(shifts) == len(outs):
        counts = f"{len(xs)} xs, {len(shifts)} shifts and {len(outs)} outs"
        raise ValueError(f"expected as many xs as shifts and outs; got {counts}")
    if not xs:
        return
    n, dim = xs[0].shape
    p, cells = dim + z.shape[1], len(offsets) - 1
    for x, shift, out in zip(xs, shifts, outs, strict=True):
        rows = dim < 2 or x.stride(1) == 1
        if x.dtype not in DTYPES or x.dtype != xs[0].dtype or x.shape != (n, dim) or not rows:
            want = "float32, float16 or bfloat16, all of one dtype, with contiguous rows"
            raise _unfit("x", x, f"{[n, dim]} of {want}")
        _expect("shift", shift, torch.float64, (dim,), x.device)
        _expect("out", out, torch.float64, (cells, p, p), x.device)
    _expect("z", z, torch.float64, (n, p - dim), xs[0].device)
    _expect("order", order, torch.int64, order.shape, xs[0].device)
    _expect("offsets", offsets, torch.int64, offsets.shape, xs[0].device)


def _expect(
    name: str, got: torch.Tensor, dtype: torch.dtype, shape: Sequence[int], device: torch.device
) -> None:
    fits = got.dtype == dtype and got.shape == tuple(shape) and got.is_contiguous()
    if not fits or got.device != device:
        dtype_name = str(dtype).removeprefix("torch.")
        raise _unfit(name, got, f"{dtype_name} {list(shape)}, contiguous, on {device}")


def _unfit(name: str, got: torch.Tensor, want: str) -> ValueError:
    dtype = str(got.dtype).removeprefix("torch.")
    what = f"{dtype} {list(got.shape)} with strides {list(got.stride())} on {got.device}"
    return ValueError(f"{name} is {what}; expected {want}")
