"""The one switch: which implementation serves the operations on a device.

A backend is a module with the functions of `_reference`. The compiled core serves the CPU; every
other device runs the reference itself, in torch on that device.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from types import ModuleType

import torch

from . import _core, _reference

_KEPT_BYTES = 64 << 20


def backend(device: torch.device) -> ModuleType:
    """Return the module whose operations run on `device`."""
    return _core if device.type == "cpu" else _reference


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
    """Do what `gram` does for every x, shift and out, all of one dtype and shape."""
    ops = backend(outs[0].device)
    if hasattr(ops, "grams"):
        ops.grams(xs, shifts, z, order, offsets, outs, products=products)
        return
    for x, shift, out in zip(xs, shifts, outs, strict=True):
        ops.gram(x, shift, z, order, offsets, out, products=products)


_CPU = torch.device("cpu")


def empty(*shape: int, dtype: torch.dtype, device: torch.device = _CPU) -> torch.Tensor:
    """Return an uninitialised tensor, on the CPU in large pages: fresh small ones cost time."""
    out = torch.empty(shape, dtype=dtype, device=device)
    if out.is_cpu:
        _core.large_pages(out)
    return out


class _Kept(threading.local):
    """Memory of a thread for what does not outlive one call.

    Solving layer after layer, fresh pages cost more than the factors that are written to them.
    """

    def __init__(self) -> None:
        self._blocks: dict[str, torch.Tensor] = {}

    def empty(self, use: str, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialised CPU tensor; the next call for the same `use` takes it back."""
        size = math.prod(shape) * dtype.itemsize
        if size > _KEPT_BYTES:
            return empty(*shape, dtype=dtype)
        if use not in self._blocks or self._blocks[use].nbytes < size:
            self._blocks[use] = empty(size, dtype=torch.uint8)
        return self._blocks[use][:size].view(dtype).view(shape)


kept = _Kept()


def describe(device: torch.device) -> str:
    """Say in words what serves `device`, and why nothing better does."""
    if device.type == "cpu":
        return f"C++ core ({_core.detected_isa()}, {torch.get_num_threads()} threads)"
    return f"torch float64 reference on {device} (this build has no kernels for it)"
