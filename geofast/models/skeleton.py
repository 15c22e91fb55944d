"""A checkpoint without its weights: modules on the meta device, which have shapes and no memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import nn

from .assemble import assemble
from .checkpoint import DeviceMap, auto_class, default_dtype, quantisation, read_config
from .hub import said
from .load import LIBRARIES, Loading, called, default_device, find_checkpoint, require_fitting
from .model import Model
from .packages import quietly
from .processors import OfCheckpoint
from .structure import block_lists
from .twin import require_twin_of


class NumbersNeededError(RuntimeError):
    """A model's class cannot be built without its weights."""


def has_skeleton(model: str | Path | nn.Module | Model) -> TypeGuard[str | Path]:
    """Whether `skeleton` takes what `load` takes: a checkpoint of transformers that is named."""
    return isinstance(model, str | Path) and str(model).partition(":")[0] not in LIBRARIES


@quietly()
def skeleton(
    model: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    device_map: DeviceMap | None = None,
    adapter: str | Path | None = None,
    merge: bool = False,
    trust_remote_code: bool = False,
    twin: bool = False,
) -> Model:
    """Make the `Model` that `load` would make of a checkpoint, from its configuration alone.

    Processors and tokenizers are read; no weight is. It runs on the meta device.

    Parameters
    ----------
    model
        A checkpoint of transformers, for which `has_skeleton` is true.
    device, dtype, device_map, adapter, merge, trust_remote_code
        What `load` takes.
    twin
        Refuse a model that has no twin of random weights.

    Raises
    ------
    FileNotFoundError, PermissionError, ConnectionError, ValueError
        As `load`; ValueError when it has no twin, too.
    RuntimeError
        As `load`; NumbersNeededError when the model's class does not work without numbers.
    """
    loading: Loading = {
        "device": device, "dtype": dtype, "device_map": device_map, "adapter": adapter,
        "merge": merge, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    require_fitting(model, loading)
    source, worn = find_checkpoint(model, loading)
    config = read_config(source)
    name = called(source, worn, merge=merge)
    if twin:
        require_twin_of(name, config, adapted=worn is not None and not merge)
    chosen: Any = dtype or default_dtype(default_device(device))
    if chosen == "auto":
        chosen = getattr(config, "dtype", None) or torch.float32
    try:
        with torch.device("meta"):
            module = auto_class(config).from_config(
                config, dtype=chosen, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # its code may be anybody's, and do anything
        msg = (
            f"{source.name} cannot be built without its weights ({said(error)}): load it, and give "
            "gf.plan the loaded model"
        )
        raise NumbersNeededError(msg) from error
    return assemble(name, module.eval(), OfCheckpoint(source))


def weight_bytes(module: nn.Module) -> dict[torch.dtype, int]:
    """Return the bytes of parameters and buffers, by dtype.

    On the meta device, the matrices of blocks that are quantised count as int8 with their bits.
    """
    quantised = quantisation(getattr(module, "config", None))
    packed: set[int] = set()
    if quantised and next(module.parameters()).is_meta:
        for _, blocks in block_lists(module):
            linear = (m for m in blocks.modules() if isinstance(m, nn.Linear))
            packed |= {id(m.weight) for m in linear}
    sizes: Counter[torch.dtype] = Counter()
    for tensor in chain(module.parameters(), module.buffers()):
        if id(tensor) in packed:
            sizes[torch.int8] += tensor.numel() * _bits(quantised or {}) // 8
        else:
            sizes[tensor.dtype] += tensor.nbytes
    return dict(sizes)


def _bits(quantised: Mapping[str, Any]) -> int:
    if quantised.get("load_in_4bit"):
        return 4
    return int(quantised.get("bits") or quantised.get("w_bit") or 8)
