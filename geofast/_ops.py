"""The one switch: which implementation serves the operations on a device.

A backend is a module with the functions of `_reference`. The compiled core serves the CPU, kernels
of ours and torch a CUDA device, torch every other. A backend may also have `pool_packed` and
`grams`, which do in one call what `pool` and `grams` here do in several.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from types import ModuleType

import torch

from . import _core, _reference

_KEPT_BYTES = 64 << 20


def backend(device: torch.device) -> ModuleType:
    """Return the module whose operations run on `device`."""
    if device.type == "cpu":
        return _core
    return import_module(f".{'_gpu' if device.type == 'cuda' else '_device'}", __package__)


def pool(
    x: torch.Tensor,
    roles: torch.Tensor,
    jobs: Sequence[tuple[str, int, torch.Tensor]],
    starts: Sequence[int] | None = None,
) -> bool:
    """Do what the backend's `pool` does; in float64, what the reference does.

    Returns True when all that was written is known to be finite; others need not know.

    With `starts` [samples + 1], sample s is tokens starts[s]:starts[s + 1] of the sequences laid
    end to end, `roles` are [1, sequences * tokens], and rows are [samples, dim].
    """
    if torch.compiler.is_compiling():
        operations = " ".join(operation for operation, _, _ in jobs)
        bits, outs = [bit for _, bit, _ in jobs], [out for _, _, out in jobs]
        _compiled_pool(x, roles, operations, bits, outs, None if starts is None else list(starts))
        return False
    wide = torch.float64 in (x.dtype, jobs[0][2].dtype)
    ops = _reference if wide else backend(x.device)
    if starts is None:
        return ops.pool(x, roles, jobs) is True
    if hasattr(ops, "pool_packed"):
        return ops.pool_packed(x, roles, jobs, starts) is True
    return pool_by_sample(ops, x, roles, jobs, starts)


def pool_by_sample(
    ops: ModuleType,
    x: torch.Tensor,
    roles: torch.Tensor,
    jobs: Sequence[tuple[str, int, torch.Tensor]],
    starts: Sequence[int],
) -> bool:
    """Do what `pool` does with `starts`, by one call of a backend's `pool` for every sample."""
    ends, finite = x.reshape(1, -1, x.shape[-1]), True
    for i, (a, b) in enumerate(itertools.pairwise(starts)):
        one = [(operation, bit, rows[i : i + 1]) for operation, bit, rows in jobs]
        finite = ops.pool(ends[:, a:b], roles[:, a:b], one) is True and finite
    return finite


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
    """Do what the backend's `gram` does for every x, shift and out, all of one dtype and shape."""
    if torch.compiler.is_compiling():
        _compiled_grams(list(xs), list(shifts), z, order, offsets, list(outs), products)
        return
    ops = backend(outs[0].device)
    if hasattr(ops, "grams"):
        ops.grams(xs, shifts, z, order, offsets, outs, products=products)
        return
    for x, shift, out in zip(xs, shifts, outs, strict=True):
        ops.gram(x, shift, z, order, offsets, out, products=products)


# torch.compile sees one operator where the kernels are, and need not look inside.


@torch.library.custom_op("geofast::pool", mutates_args={"outs"})
def _compiled_pool(
    x: torch.Tensor,
    roles: torch.Tensor,
    operations: str,
    bits: list[int],
    outs: list[torch.Tensor],
    starts: list[int] | None,
) -> None:
    pool(x, roles, list(zip(operations.split(), bits, outs, strict=True)), starts)


@torch.library.custom_op("geofast::grams", mutates_args={"outs"})
def _compiled_grams(
    xs: list[torch.Tensor],
    shifts: list[torch.Tensor],
    z: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    outs: list[torch.Tensor],
    products: str,
) -> None:
    grams(xs, shifts, z, order, offsets, outs, products=products)


@_compiled_pool.register_fake
@_compiled_grams.register_fake
def _nothing_new(*_: object) -> None:
    """Write in place, and return nothing."""


_CPU = torch.device("cpu")


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return `tensor` on `device`; the host does not wait for a GPU that it is sent to."""
    return tensor.to(device, non_blocking=device.type != "cpu")


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


def no_gpu(device: torch.device | None = None) -> str | None:
    """Return why torch cannot use `device`, a GPU, or None where it can; without one, the first."""
    if torch.cuda.is_available():
        return _unusable(device or torch.device("cuda"))
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    why = None
    with suppress(ImportError):
        from . import _cuda as extension

        why = extension.unavailable()
    return why or f"torch {torch.__version__}, for CUDA {torch.version.cuda}, finds none"


@cache
def _unusable(device: torch.device) -> str | None:
    """Have torch run a kernel: that it lacks one for this chip, it says no earlier."""
    try:
        torch.zeros(1, device=device).add_(1).item()
    except (RuntimeError, AssertionError) as error:
        return f"torch {torch.__version__} cannot use {device} ({str(error).splitlines()[0]})"
    return None


def describe(device: torch.device) -> str:
    """Say in words what serves `device`, and why nothing better does."""
    if device.type == "cpu":
        core = f"C++ core ({_core.detected_isa()}, {torch.get_num_threads()} threads)"
        return core if (why := no_gpu()) is None else f"{core}; no GPU: {why}"
    if device.type != "cuda":
        return f"torch on {device} (geofast has no kernels for it)"
    from . import _gpu

    name = torch.cuda.get_device_name(device)
    return "; ".join([f"kernels on {device}, {name}", *_gpu.lacking(device)])
