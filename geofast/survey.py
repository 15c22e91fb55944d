"""What one sample looks like inside a model: tokens and widths at every site, work and memory.

A survey runs the model over one sample. On the meta device, where tensors have shapes and no
numbers, that takes no memory and works before weights are loaded. Where the model asks for a number
on its way (how many tokens is this image?), a meta tensor has none: then the shapes of the blocks
and of the prepared sample must do.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .models import Batch, Model, Site, Tower

Shapes = Mapping[str, tuple[int, int]]
"""By site: tokens of all samples together, and their width."""


@contextmanager
def shapes_of(model: Model, sites: Sequence[Site]) -> Iterator[dict[str, tuple[int, int]]]:
    """Note the shape of the hidden states at `sites` while the model runs."""
    shapes: dict[str, tuple[int, int]] = {}
    convolving = {tower.name for tower in model.towers if tower.channels_first}

    def note(site: Site, hidden: torch.Tensor) -> None:
        # Four axes are an image's: channels come first in convolutions, last in Swin and SAM.
        width = hidden.shape[1 if hidden.ndim == 4 and site.tower in convolving else -1]
        shape = hidden.numel() // width, width
        shapes[site.name] = max(shape, shapes.get(site.name, shape))  # of prompts, the longest

    with ExitStack() as hooks:
        for site in sites:
            hooks.callback(site.watch(partial(note, site)).remove)
        yield shapes


def up_to(model: Model, sites: Sequence[Site]) -> tuple[Site, ...]:
    """Return all sites up to the deepest of `sites`: a batch must fit the towers before it too."""
    names = [site.name for site in model.every_site]
    return model.every_site[: names.index(model.deepest(sites).name) + 1]


def token_count(shapes: Shapes) -> int:
    """Return how long a sample is to the model, in tokens of the greatest width.

    A tower that narrows and widens, as Swin's does, has many narrow tokens at first: they count by
    the numbers that they hold.
    """
    most = max(tokens * width for tokens, width in shapes.values())
    return max(1, -(-most // max(width for _, width in shapes.values())))


@dataclass(frozen=True)
class Survey:
    """One sample's way through a model."""

    shapes: Shapes
    flops: float
    """Floating-point operations up to the deepest site; a multiplication and an addition are two.
    """
    peak: int
    """Bytes of all tensors that are alive at once, weights apart."""
    how: str
    """How it was found."""


def survey(model: Model, sites: Sequence[Site], batch: Batch) -> Survey:
    """Run the model over `batch`, or on the meta device, if it cannot run there, estimate.

    Parameters
    ----------
    model
        Loaded, or on the meta device. It stops at its deepest site.
    sites
        Those that will be read.
    batch
        One sample, as `model.collate` makes it.
    """
    if model.device.type != "meta":
        return _run(model, sites, batch, "one sample was run")
    try:
        return _run(model, sites, batch, "one sample was run without numbers")
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).partition("\n")[0][:100].rstrip(".!")
        how = (
            f"estimated from the shapes of the blocks, as it does not run without weights: {reason}"
        )
        return estimate(model, sites, batch, how)


def _run(model: Model, sites: Sequence[Site], batch: Batch, how: str) -> Survey:
    from torch.utils.flop_counter import FlopCounterMode

    ready, counted, alive = model.to_device(batch), FlopCounterMode(display=False), _Alive(model)
    with shapes_of(model, sites) as shapes, counted, alive:
        model.forward(ready)
    return Survey(shapes, float(counted.get_total_flops()), alive.most, how)


_aten = torch.ops.aten
_ASKS = (_aten._local_scalar_dense.default, _aten.item.default, _aten.is_nonzero.default)


class _Alive(TorchDispatchMode):
    """Follows how many bytes of tensors are alive, the weights of the model apart."""

    def __init__(self, model: Model) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = self._now = 0
        weights = (*model.module.parameters(), *model.module.buffers())
        self._known = {id(tensor.untyped_storage()) for tensor in weights}
        self._weights = weights  # or their storages could go, and others take their place

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Before it makes a mask, transformers asks whether it needs one: is nothing padded, are
        # all positions in order? Of a single sample, yes.
        if func in _ASKS and args[0].is_meta and args[0].dtype == torch.bool:
            return True
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._known:
            return
        self._known.add(id(storage))
        self._now += storage.nbytes()
        self.most = max(self.most, self._now)
        weakref.finalize(storage, self._forget, id(storage), storage.nbytes())

    def _forget(self, which: int, nbytes: int) -> None:
        self._known.discard(which)
        self._now -= nbytes


# ------ without a run


def estimate(model: Model, sites: Sequence[Site], batch: Batch, how: str) -> Survey:
    """Estimate a survey from the shapes of the blocks and of the prepared sample.

    Every matrix of a block multiplies every token once, and attention compares all tokens of a
    sequence, twice: 2 T P + 4 T^2 d operations a block (Kaplan et al. 2020, arXiv:2001.08361,
    section 2.1). At its widest place a block holds three times its inner width beside the stream.
    """
    counts = _tokens(model, batch)
    widths = {t.name: _width(t) for t in model.towers if t.blocks}
    widths["projector"] = widths.get("lm", 0)
    shapes = {site.name: (counts[site.tower][0], widths[site.tower]) for site in sites}
    rounds = len(batch.get("prompts", [None]))
    flops, peak = 0.0, 0
    for tower, blocks in _before(model):
        tokens, sequences = counts[tower.name]
        d = widths[tower.name]
        matrices = [(p, _share(model, p)) for b in blocks for p in b.parameters() if p.ndim > 1]
        work = 2 * tokens * sum(p.numel() * share for p, share in matrices)
        if tower.blocks:
            work += 4 * tokens**2 / sequences * d * len(blocks)
        flops += work * (rounds if tower.name == "lm" else 1)
        inner = max((max(p.shape[-2:]) for p, _ in matrices), default=d)
        peak = max(peak, tokens * (3 * d + 3 * inner) * model.dtype.itemsize)
    return Survey(shapes, flops, peak, how)


def _before(model: Model) -> Iterator[tuple[Tower, Sequence[nn.Module]]]:
    """Yield what runs until the model stops."""
    for tower in model.towers:
        last = model.stop if model.stop is not None and model.stop.tower == tower.name else None
        if tower.blocks:
            yield (
                tower,
                tower.blocks[: None if last is None or last.layer is None else last.layer + 1],
            )
        elif tower.head is not None:
            yield tower, (tower.head,)
        if last is not None:
            return


def _tokens(model: Model, batch: Batch) -> dict[str, tuple[int, int]]:
    """Return tokens and sequences of the sample, by tower."""
    image = batch.get("image", batch)
    texts = [p["input_ids"] for p in batch.get("prompts", [batch]) if "input_ids" in p]
    counts = {}
    for tower in model.towers:
        if tower.name == "vision":
            counts["vision"] = _patches(model, tower, image)
        elif tower.name != "projector" and texts:
            counts[tower.name] = max(ids.shape[1] for ids in texts), 1
    if "vision" in counts and texts:
        token = next(t.image_token for t in model.towers if t.name == "lm")
        counts["projector"] = max(1, int((texts[0] == token).sum())), 1
    return counts


def _patches(model: Model, tower: Tower, image: Mapping[str, Any]) -> tuple[int, int]:
    pixels: torch.Tensor = image["pixel_values"]
    if pixels.ndim < 4:  # packed patches [patches, numbers], or [images, patches, numbers]
        return prod(pixels.shape[:-1]), 1
    kinds = (nn.Conv2d, nn.Conv3d)
    stride = next(m.stride for m in model.module.modules() if isinstance(m, kinds))[-2:]
    tiles = pixels.shape[:-3].numel()
    each = prod(side // step for side, step in zip(pixels.shape[-2:], stride, strict=True))
    return tiles * (each + len(tower.prefix)), tiles


def _width(tower: Tower) -> int:
    """Return the width of the residual stream: what the first norm of a block takes."""
    for name, part in tower.blocks[0].named_children():
        weights = list(part.parameters(recurse=False))
        if "norm" in (name + type(part).__name__).lower() and weights:
            return len(weights[0])
    raise ValueError(f"the blocks of {tower.path!r} have no norm that tells their width")


def _share(model: Model, matrix: nn.Parameter) -> float:
    """Return the share of a stack of experts that a token goes through; 1 for any other matrix."""
    config: Any = getattr(model.module, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    chosen = getattr(config, "num_experts_per_tok", None)
    return chosen / len(matrix) if chosen and matrix.ndim == 3 else 1.0
