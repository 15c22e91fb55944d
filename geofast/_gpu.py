"""The operations on a CUDA device: geofast's kernels, and torch's where those serve.

Importing it needs no GPU. What a machine lacks, `lacking` says, and torch's operations serve.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch

from . import _reference
from ._device import (
    cholesky,
    factor,
    inverse_trace,
    leverage,
    project,
    project_t,
    solve_lower,
    training_matrix,
)
from ._ops import pool_by_sample, send

__all__ = [
    "cholesky", "factor", "gram", "grams", "inverse_trace", "leverage", "pool", "pool_packed",
    "project", "project_t", "solve_lower", "training_matrix",
]  # fmt: skip

Jobs = Sequence[tuple[str, int, torch.Tensor]]


@cache
def _triton(device: torch.device) -> tuple[ModuleType, ModuleType] | str:
    """Return the kernels in Triton (pool, gram), or why there are none for `device`."""
    try:
        from .kernels import gram, pool
    except Exception as error:  # a Triton that is broken raises anything
        return f"Triton cannot be imported ({_first_line(error)})"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the kernels are for compute capability 8.0 and newer; this is {major}.{minor}"
    try:
        _try(pool, device)
    except Exception as error:  # of Triton's, of the C compiler that it calls, or of the driver
        return f"Triton cannot make a kernel here ({_first_line(error)})"
    return pool, gram


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _try(kernels: ModuleType, device: torch.device) -> None:
    """Make a small kernel: what Triton lacks, it says no earlier."""
    x, roles = (torch.zeros(1, 1, *end, device=device) for end in ((8,), ()))
    kernels.pool(x, roles.byte(), [("first", 0, torch.empty(1, 8, device=device))])


@cache
def _cuda(device: torch.device) -> Any:
    """Return the extension module, or why there is none for `device`."""
    try:
        from . import _cuda as extension
    except ImportError as error:
        return f"geofast was built without CUDA C++ ({error})"
    return extension.unavailable(device.index or 0) or extension


def lacking(device: torch.device) -> list[str]:
    """Return why torch serves where a kernel would."""
    why = {"pooling": _triton(device), "statistics": _cuda(device)}
    return [f"torch serves {what}: {one}" for what, one in why.items() if isinstance(one, str)]


def pool(x: torch.Tensor, roles: torch.Tensor, jobs: Jobs) -> None:
    """As `_reference.pool`, in one read of `x` and with sums in float32."""
    kernels = _triton(x.device)
    if isinstance(kernels, str):
        _reference.pool(x, roles, jobs)
    else:
        kernels[0].pool(x, roles, jobs)


def pool_packed(x: torch.Tensor, roles: torch.Tensor, jobs: Jobs, starts: Sequence[int]) -> None:
    """As `_ops.pool` with `starts`, in one read of `x`."""
    kernels = _triton(x.device)
    if isinstance(kernels, str):
        pool_by_sample(_reference, x, roles, jobs, starts)
    else:
        ends = x.reshape(1, -1, x.shape[-1])
        kernels[0].pool(ends, roles, jobs, send(torch.tensor(starts), x.device))


def gram(
    x: torch.Tensor,
    shift: torch.Tensor,
    z: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    out: torch.Tensor,
    *,
    products: str = "float64",
) -> None:
    """As `_reference.gram`."""
    grams([x], [shift], z, order, offsets, [out], products=products)


def grams(
    xs: Sequence[torch.Tensor],
    shifts: Sequence[torch.Tensor],
    z: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    outs: Sequence[torch.Tensor],
    *,
    products: str,
) -> None:
    """As `_ops.grams`, in one launch. The kernels allocate nothing, so all is added or nothing."""
    device = outs[0].device
    kernels, extension = _triton(device), _cuda(device)
    if products == "float32" and xs[0].dtype != torch.float64 and not isinstance(kernels, str):
        kernels[1].grams(xs, shifts, z, order, send(offsets, device), outs)
    elif not isinstance(extension, str):
        extension.gram(xs, shifts, z, order, send(offsets, device), outs)
    else:
        for x, shift, out in zip(xs, shifts, outs, strict=True):
            _reference.gram(x, shift, z, order, offsets, out)
