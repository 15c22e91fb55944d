"""Every pooling of a batch of hidden states, in one launch and one read.

A program takes one sample and one block of columns. It streams the tokens of the sample through
shared memory, keeps one float32 accumulator a job in registers, [tokens, columns] as they come, and
reduces it over the tokens once, at the end. Tokens that no reduction asks for are not read.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

Job = tuple[str, int, torch.Tensor]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPS = ("first", "last", "mean", "max", "min")
# Triton 3.6 takes no strings in a tuple of constants, so a job is (place in OPS, bit).
FIRST, LAST, MEAN, MAX, MIN = (tl.constexpr(i) for i in range(len(OPS)))

TILE_BYTES = 8192  # read at a time by a program, and two such reads under way
SCAN_TOKENS = 1024  # role bytes read at a time where nothing is reduced

# By the form of what is pooled, the kernel that Triton chose and the arguments that are no tensors:
# to check, choose and look up anew takes the host three times as long as all else in `pool`.
_launchers: dict[Hashable, tuple[Callable[..., None], tuple[Any, ...]]] = {}
_FORMS = 1024  # that are kept: batches of texts are of many lengths


@triton.jit
def _begin(OP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    # The accumulator of a job, and its mark a token: how many it took, or where it was.
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    mark = tl.zeros((BLOCK_T,), tl.int32)
    if OP == MAX:
        total = tl.full((BLOCK_T, BLOCK_D), float("-inf"), tl.float32)
    elif OP == MIN:
        total = tl.full((BLOCK_T, BLOCK_D), float("inf"), tl.float32)
    elif OP == FIRST:
        mark = tl.full((BLOCK_T,), 2147483647, tl.int32)
    elif OP == LAST:
        mark = tl.full((BLOCK_T,), -1, tl.int32)
    return total, mark


@triton.jit
def _take(OP: tl.constexpr, total, mark, values, has, t):
    if OP == FIRST:
        mark = tl.where(has, tl.minimum(mark, t), mark)
    elif OP == LAST:
        mark = tl.where(has, tl.maximum(mark, t), mark)
    else:
        mark += has.to(tl.int32)
        if OP == MEAN:
            new = total + values
        elif OP == MAX:
            new = tl.maximum(total, values, propagate_nan=tl.PropagateNan.ALL)
        else:
            new = tl.minimum(total, values, propagate_nan=tl.PropagateNan.ALL)
        total = tl.where(has[:, None], new, total)
    return total, mark


@triton.jit
def _reduced(OP: tl.constexpr, total, mark):
    count = tl.sum(mark, 0)
    if OP == MEAN:
        row = tl.div_rn(tl.sum(total, 0), tl.maximum(count, 1).to(tl.float32))
        lost = count == 0
    else:
        # tl.max leaves NaN out, so it is looked for beside it.
        bad = total != total
        lost = (tl.max(bad.to(tl.int32), 0) != 0) | (count == 0)
        if OP == MAX:
            row = tl.max(tl.where(bad, float("-inf"), total), 0)
        else:
            row = tl.min(tl.where(bad, float("inf"), total), 0)
    return tl.where(lost, float("nan"), row)


@triton.jit(do_not_specialize=["tokens", "roles_stride"])
def pool_kernel(
    x,
    roles,
    starts,
    outs,
    out_strides,
    x_stride,
    token_stride,
    roles_stride,
    tokens,
    dim,
    JOBS: tl.constexpr,  # (op, bit) of every job
    READ: tl.constexpr,  # bits that a reduction asks for
    PACKED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write every job's row of one sample, for BLOCK_D columns."""
    blocks = tl.cdiv(dim, BLOCK_D)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    cols = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < dim
    if PACKED:
        first = tl.load(starts + sample)
        length = (tl.load(starts + sample + 1) - first).to(tl.int32)
        x += first * token_stride
        roles += first
    else:
        length = tokens
        x += sample * x_stride
        roles += sample * roles_stride
    lines = tl.arange(0, BLOCK_T)
    tile = lines.to(tl.int64)[:, None] * token_stride + cols[None, :]

    totals = ()
    marks = ()
    for j in tl.static_range(len(JOBS)):
        total, mark = _begin(JOBS[j][0], BLOCK_T, BLOCK_D)
        totals += (total,)
        marks += (mark,)
    # tl.range and not range: its num_stages is for loads that feed no tl.dot, too.
    for start in tl.range(0, length, BLOCK_T, num_stages=STAGES):
        t = start + lines
        role = tl.load(roles + t, t < length, 0).to(tl.int32)
        values = 0.0
        if READ:
            asked = ((role & READ) != 0)[:, None] & inside[None, :]
            at = x + tl.cast(start, tl.int64) * token_stride
            # Widened at once: the interpreter adds the bits of bfloat16.
            values = tl.load(at + tile, asked, 0.0).to(tl.float32)
        new_totals = ()
        new_marks = ()
        for j in tl.static_range(len(JOBS)):
            has = (role >> JOBS[j][1] & 1) != 0
            total, mark = _take(JOBS[j][0], totals[j], marks[j], values, has, t)
            new_totals += (total,)
            new_marks += (mark,)
        totals = new_totals
        marks = new_marks

    for j in tl.static_range(len(JOBS)):
        if JOBS[j][0] == FIRST or JOBS[j][0] == LAST:
            at = tl.min(marks[j], 0) if JOBS[j][0] == FIRST else tl.max(marks[j], 0)
            end = tl.where((at >= 0) & (at < length), dim, 0)
            row = tl.load(x + at.to(tl.int64) * token_stride + cols, cols < end, float("nan"))
            row = row.to(tl.float32)
        else:
            row = _reduced(JOBS[j][0], totals[j], marks[j])
        tl.store(outs[j] + sample * out_strides[j] + cols, row, inside)


def blocks(itemsize: int, samples: int, dim: int, processors: int, reads: bool) -> dict[str, int]:
    """Choose the tile of a program by the shape; `bench/gpu.py` can put others in its place.

    A load takes at least 128 bytes of a token, the least that memory gives at full rate, and more
    where that leaves four programs to every multiprocessor.
    """
    if not reads:
        return {"BLOCK_T": SCAN_TOKENS, "BLOCK_D": 256, "STAGES": 1, "num_warps": 4}
    wide = 128 // itemsize
    while wide < 512 and samples * triton.cdiv(dim, 2 * wide) >= 4 * processors:
        wide *= 2
    block_t = TILE_BYTES // (wide * itemsize)
    if dim * itemsize % 16:  # loads of a number each go through registers, of which 3.6 then lacks
        block_t //= 2
    return {"BLOCK_T": block_t, "BLOCK_D": wide, "STAGES": 3, "num_warps": 8}


def launch(
    x: torch.Tensor,
    roles: torch.Tensor,
    jobs: Sequence[Job],
    starts: torch.Tensor | None = None,
    processors: int = 132,
) -> tuple[int, dict[str, Any]]:
    """Return the number of programs and the arguments of `pool_kernel` for arguments of `pool`."""
    samples = _samples(x, starts)
    tokens, dim = x.shape[1:]
    read = 0
    for op, bit, _ in jobs:
        read |= (op not in ("first", "last")) << bit
    choice = blocks(x.element_size(), samples, dim, processors, read != 0)
    arguments = {
        "x": x,
        "roles": roles,
        "starts": starts,
        "outs": tuple(out for _, _, out in jobs),
        "out_strides": tuple(out.stride(0) for _, _, out in jobs),
        "x_stride": x.stride(0),
        "token_stride": x.stride(1),
        "roles_stride": roles.stride(0),
        "tokens": tokens,
        "dim": dim,
        "JOBS": tuple((OPS.index(op), bit) for op, bit, _ in jobs),
        "READ": read,
        "PACKED": starts is not None,
        "enable_fp_fusion": True,  # the default, said because Triton 3.9 warns where it is not
    }
    return samples * triton.cdiv(dim, choice["BLOCK_D"]), arguments | choice


@cache
def _processors(device: torch.device) -> int:
    # 132 is an H100's: what the interpreter on a CPU goes by.
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 132
    )


def pool(
    x: torch.Tensor,
    roles: torch.Tensor,
    jobs: Sequence[Job],
    starts: torch.Tensor | None = None,
) -> None:
    """Reduce the tokens of a role to one row a sample, for every job, in one launch.

    Parameters
    ----------
    x
        [batch, tokens, dim] on a GPU: float32, float16 or bfloat16, the last dimension contiguous.
    roles
        [batch, tokens] uint8; bit k says whether a token has role k. Rows are contiguous.
    jobs
        (op, bit, out): op is `first`, `last`, `mean`, `max` or `min`, and out a float32 tensor
        [samples, dim] with contiguous rows; outs do not overlap. Sums are float32. NaN passes
        through max and min; a sample with no token of the role gives NaN.
    starts
        Where samples are not the sequences of x: int64 [samples + 1] on the GPU. x is then
        [1, tokens, dim], and sample s holds the tokens starts[s]:starts[s + 1].

    Raises
    ------
    ValueError
        When a dtype, a shape, a device, an op or a bit is not as above.
    """
    # All that is checked and chosen, here and by Triton, follows from these; the two functions are
    # there because bench/gpu.py and tests put others in their place.
    form = (
        (blocks, launch, _form(x), _form(roles), None if starts is None else _form(starts)),
        *[(op, bit, _form(out)) for op, bit, out in jobs],
    )
    with torch.cuda.device_of(x):
        if launcher := _launchers.get(form):
            run, rest = launcher
            run(x, roles, starts, tuple([out for _, _, out in jobs]), *rest)
            return
        _check(x, roles, jobs, starts)
        if not (jobs and _samples(x, starts) and x.shape[2]):
            return
        programs, arguments = launch(x, roles, jobs, starts, _processors(x.device))
        _keep(form, pool_kernel[(programs,)](**arguments), programs, arguments)


def _form(tensor: torch.Tensor) -> Hashable:
    """Return what checks and Triton's specialisation ask of a tensor: all but where it lies."""
    where = tensor.data_ptr() % 16
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride(), where


def _keep(form: Hashable, kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
    # The interpreter has no kernel, and on AMD's GPUs Triton asks how large a storage is, too.
    if kernel is None or torch.version.hip is not None:
        return
    if len(_launchers) >= _FORMS:
        _launchers.clear()
    rest = tuple(arguments[name] for name in pool_kernel.arg_names[4:])
    _launchers[form] = kernel[(programs, 1, 1)], rest


def _samples(x: torch.Tensor, starts: torch.Tensor | None) -> int:
    return x.shape[0] if starts is None else starts.shape[0] - 1


def _check(
    x: torch.Tensor, roles: torch.Tensor, jobs: Sequence[Job], starts: torch.Tensor | None
) -> None:
    if x.dtype not in DTYPES or x.ndim != 3 or not _rows(x):
        raise _unfit("x", x, "float32, float16 or bfloat16 [batch, tokens, dim], contiguous in dim")
    if roles.dtype != torch.uint8 or roles.shape != x.shape[:2] or not _rows(roles):
        raise _unfit("roles", roles, f"uint8 {list(x.shape[:2])} with contiguous rows")
    if starts is not None and (starts.dtype != torch.int64 or starts.ndim != 1 or len(x) != 1):
        raise _unfit("starts", starts, f"int64 [samples + 1] and one sequence; x has {len(x)}")
    shape = (_samples(x, starts), x.shape[2])
    for op, bit, out in jobs:
        if op not in OPS or not 0 <= bit < 8:
            raise ValueError(
                f"job ({op!r}, {bit}): expected {', '.join(OPS)} and a bit from 0 to 7"
            )
        if out.dtype != torch.float32 or out.shape != shape or not _rows(out):
            raise _unfit(f"the out of {op}", out, f"float32 {list(shape)} with contiguous rows")
    for tensor in (roles, *(() if starts is None else (starts,)), *(out for _, _, out in jobs)):
        if tensor.device != x.device:
            raise ValueError(f"x is on {x.device} and a tensor beside it on {tensor.device}")


def _rows(x: torch.Tensor) -> bool:
    return x.shape[-1] < 2 or x.stride(-1) == 1


def _unfit(name: str, got: torch.Tensor, want: str) -> ValueError:
    dtype = str(got.dtype).removeprefix("torch.")
    what = f"{dtype} {list(got.shape)} with strides {list(got.stride())}"
    return ValueError(f"{name} is {what}; expected {want}")
