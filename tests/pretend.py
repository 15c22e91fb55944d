"""A stand-in for a GPU: tensors that claim another device while their numbers lie on the CPU.

`with Pretend() as gpu:` serves the device `gpu.device`, and `gpu.syncs` lists, by operator, where
the host would wait for the device. An operator refuses to mix the two devices where CUDA does: CPU
tensors of no dimension are welcome in element-wise operators, and CPU indices may index a tensor on
the device, which waits for their copy. A copy between the devices waits unless it is non_blocking.

`gpu.allocated` is how many bytes of tensors there are on the device, what they share counted once,
and `gpu.peak` the most since `reset_peak`. What a library takes inside of an operator is not seen.

It cannot find a race between streams, a wait that CUDA libraries hide, a dtype or shape that only
CUDA refuses, or a difference of CUDA's numbers. `x[mask] = 0.0` counts as a wait, which on CUDA is
none. The device is called `meta`, because torch without CUDA makes no tensors that say `cuda`: code
that asks for the type `cuda` takes its other way here. Nothing of this is for autograd.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
DEVICE = torch.device("meta")
_CPU = torch.device("cpu")
_TRANSFERS = {aten._to_copy, aten.copy_}
_INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
_WAITING = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.unique_dim,
    aten.unique_consecutive,
    aten._unique,
    aten._unique2,
    aten.bincount,
    aten.equal,
    aten.repeat_interleave,
    aten._linalg_check_errors,
    aten._linalg_eigh,
    aten._linalg_svd,
}
_FILLING = {aten.masked_fill, aten.masked_fill_}  # element-wise, though torch has no tag on them


class Far(torch.Tensor):
    """A tensor that says that it lies on `DEVICE`; `near` holds its numbers."""

    near: torch.Tensor

    @staticmethod
    def __new__(cls, near: torch.Tensor) -> Far:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=DEVICE,
        )
        made.near = near
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a pretended device, outside of `with Pretend()`")


class Pretend(TorchDispatchMode):
    """The device is there while this is entered; see the module."""

    device = DEVICE

    def __init__(self) -> None:
        super().__init__()
        self.syncs: list[str] = []
        self.allocated = self.peak = 0
        self._storages: set[int] = set()
        self._literals = _Literals()

    def reset_peak(self) -> None:
        """Have `peak` begin again, at what there is now."""
        self.peak = self.allocated

    def __enter__(self) -> Pretend:
        self._literals.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._literals.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func.overloadpacket is aten.detach_:  # of what never had a gradient
            return args[0]
        op = func.overloadpacket
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        far = [x for x in tensors if isinstance(x, Far)]
        if any(_is_there(x.device) and not isinstance(x, Far) for x in tensors):
            raise RuntimeError(f"{func} on a tensor that was not made inside of `with Pretend()`")
        if op in _TRANSFERS:
            there = (
                _is_there(kwargs["device"]) if kwargs.get("device") else isinstance(args[0], Far)
            )
            source = isinstance(args[op is aten.copy_], Far)
            waits = source != there and not _is_non_blocking(func, args, kwargs)
        else:
            mixed = bool(far) and len(far) < len(tensors)
            if mixed and not _may_mix(func, args):
                devices = [str(x.device) for x in tensors]
                raise RuntimeError(f"{func} on tensors of several devices: {', '.join(devices)}")
            there = _is_there(kwargs["device"]) if kwargs.get("device") else bool(far)
            masks = op in _INDEXING and any(
                i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
            )
            waits = bool(far) and (op in _WAITING or masks or (mixed and op in _INDEXING))
        if waits:
            self.syncs.append(str(op).removeprefix("aten."))
        wrapped = {id(x.near): x for x in far}
        out = func(*tree_map(_near, args), **tree_map(_near, kwargs))
        if torch.Tag.inplace_view in func.tags and there:
            with no_dispatch():  # the shape of what stands for it changes too
                return func(*args, **kwargs)

        def wrap(x: Any) -> Any:
            if not there or not isinstance(x, torch.Tensor):
                return x
            if id(x) in wrapped:
                return wrapped[id(x)]
            self._allocate(x.untyped_storage())
            return Far(x)

        return tree_map(wrap, out)

    def _allocate(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._storages:  # of a view
            return
        self._storages.add(id(storage))
        self.allocated += storage.nbytes()
        self.peak = max(self.peak, self.allocated)
        weakref.finalize(storage, self._free, id(storage), storage.nbytes())

    def _free(self, which: int, nbytes: int) -> None:
        self._storages.discard(which)
        self.allocated -= nbytes


class _Literals(TorchFunctionMode):
    """Numbers of Python's go to the device by way of the CPU; torch makes empty ones for meta."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func not in (torch.tensor, torch.as_tensor) or not kwargs.get("device"):
            return func(*args, **kwargs)
        device = kwargs.pop("device")
        return func(*args, **kwargs).to(device)


def _near(x: Any) -> Any:
    if isinstance(x, torch.device):
        return _CPU
    return x.near if isinstance(x, Far) else x


def _is_there(device: torch.device | str) -> bool:
    return torch.device(device).type == DEVICE.type


def _is_non_blocking(func: Any, args: Any, kwargs: Any) -> bool:
    names = [a.name for a in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return bool(given.get("non_blocking", False))


def _may_mix(func: Any, args: Any) -> bool:
    """Whether CUDA lets these CPU tensors meet tensors of the device: see the module."""
    if func.overloadpacket in _INDEXING:
        values = args[2:3]
        return isinstance(args[0], Far) and all(isinstance(v, Far) or not v.ndim for v in values)
    if torch.Tag.pointwise not in func.tags and func.overloadpacket not in _FILLING:
        return False
    writes = [a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments]
    written = [x for x, w in zip(args, writes, strict=False) if w and not isinstance(x, Far)]
    return not written and all(isinstance(x, Far) or not x.ndim for x in _tensors(args))


def _tensors(args: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
