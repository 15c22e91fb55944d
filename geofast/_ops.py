"""The one switch: which implementation serves the operations on a device.

A backend is a module with the functions of `_reference`. The compiled core serves the CPU; every
other device runs the reference itself, in torch on that device.
"""

from __future__ import annotations

from types import ModuleType

import torch

from . import _core, _reference

_CPU = torch.device("cpu")


def backend(device: torch.device) -> ModuleType:
    """Return the module whose operations run on `device`."""
    return _core if device.type == "cpu" else _reference


def empty(*shape: int, dtype: torch.dtype, device: torch.device = _CPU) -> torch.Tensor:
    """Return an uninitialised tensor; on the CPU in large pages, because fresh ones cost time."""
    out = torch.empty(shape, dtype=dtype, device=device)
    if out.is_cpu:
        _core.large_pages(out)
    return out


def describe(device: torch.device) -> str:
    """Say in words what serves `device`, and why nothing better does."""
    if device.type == "cpu":
        return f"C++ core ({_core.detected_isa()}, {torch.get_num_threads()} threads)"
    return f"torch float64 reference on {device} (this build has no kernels for it)"
