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
from .checkpoint import auto_class, default_dtype, quantisation, read_config
from .hub import find, said
from .load import base_and_adapter, default_device
from .model import Model
from .packages import quietly
from .processors import OfCheckpoint
from .structure import block_lists

_OF_LIBRARIES = ("open_clip", "timm", "location")


class NumbersNeededError(RuntimeError):
    """A model's class cannot be built without its weights."""


def has_skeleton(model: str | Path | nn.Module | Model) -> TypeGuard[str | Path]:
    """Whether `skeleton` takes what `load` takes: a checkpoint of transformers that is named."""
    return isinstance(model, str | Path) and str(model).partition(":")[0] not in _OF_LIBRARIES


@quietly()
def skeleton(
    model: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    adapter: str | Path | None = None,
    trust_remote_code: bool = False,
) -> Model:
    """Make the `Model` that `load` would make of a checkpoint, from its configuration alone.

    Processors and tokenizers are read; no weight is. It runs on the meta device.

    Raises
    ------
    FileNotFoundError, PermissionError, ConnectionError, ValueError
        As `load`.
    RuntimeError
        As `load`; NumbersNeededError when the model's class does not work without numbers.
    """
    text = str(model).removeprefix("hf:")
    found = find(text, trust_remote_code=trust_remote_code)
    source, worn = base_and_adapter(text, found, adapter)
    config = read_config(source)
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
    name = source.name if worn is None else f"{source.name} + {worn.name}"
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
