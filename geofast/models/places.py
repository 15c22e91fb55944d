"""Where in an image a token comes from: tile, row and column.

Nothing here runs during a capture. A place is worked out when somebody asks, from the shape of the
hidden states, from what the forward pass was called with and from the model's settings. What cannot
be known that way is -1, and never a guess.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..pooling import role_bit
from .layout import Call, Layout, grids_of
from .phi4 import token_places
from .structure import Tower

Grids = list[list[tuple[int, int]]]
"""Rows and columns of patches: of every tile of every sample."""


def find_grids(
    around: Sequence[nn.Module], tower: Tower, shape: torch.Size, call: Call, layout: Layout
) -> Grids | None:
    """Return how many rows and columns of patches every tile has; None where that is not known.

    Parameters
    ----------
    around
        The modules from the one that was called down to the tower's blocks.
    tower
        A vision tower.
    shape
        Of the hidden states, as the model has them.
    call, layout
        What the pass was called with, and what `lay_out` made of the hidden states.
    """
    if len(shape) == 4:
        rows_columns = shape[2:] if tower.channels_first else shape[1:3]
        return _by_sample([tuple(rows_columns)] * shape[0], layout)
    for name in ("image_grid_thw", "grid_thw"):
        if (grid := call.given.get(name)) is not None:
            return [[(h, w)] * t for t, h, w in grid.tolist()]
    if (shapes := call.given.get("spatial_shapes")) is not None:
        return [[(h, w)] for h, w in shapes.tolist()]
    sequences = shape[0] if len(shape) == 3 else 1
    sizes = call.pixel_sizes(sequences)
    patches = int((~_special(layout)).sum())
    if "noise" in inspect.signature(around[0].forward).parameters:
        if "noise" not in call.given:  # a masked autoencoder then keeps patches in random order
            return None
        patches = call.given["noise"].numel()
    tiles = grids_of(sizes, patches) if sizes else None
    if tiles is None:
        return None
    return [[tile] for tile in tiles] if len(tiles) > sequences else _by_sample(tiles, layout)


def patch_places(
    around: Sequence[nn.Module], tower: Tower, shape: torch.Size, call: Call, layout: Layout
) -> torch.Tensor:
    """Return tile, row and column of every token at a site of a vision tower.

    Returns
    -------
    torch.Tensor
        int64 [sequences * tokens, 3], in the order of the hidden states; -1 for tokens that are no
        patch, and for all where it is not known.
    """
    total = layout.roles.numel()
    grids = find_grids(around, tower, shape, call, layout)
    if grids is None:
        return _nowhere(total)
    grid_thw = any(name in call.given for name in ("image_grid_thw", "grid_thw"))
    merge = _known(around, "spatial_merge_size") or 1 if grid_thw else 1
    window = _window(around, merge) if grid_thw else None
    tiles = [
        _tile(number, _order(h, w, merge, window))
        for sample in grids
        for number, (h, w) in enumerate(sample)
    ]
    if (noise := call.given.get("noise")) is not None:
        kept = (total // len(noise)) - _leading(layout)
        order = noise.argsort(1)[:, :kept].cpu()
        tiles = [tile[o] for tile, o in zip(tiles, order, strict=True)]
    return _laid_out(tiles, total, _leading(layout))


def projected_places(
    around: Sequence[nn.Module], grids: Grids, total: int, call: Call
) -> torch.Tensor:
    """Return tile, row and column of every token that a projector returns, `total` of them.

    Rows and columns count in the projector's own grid, where it merges patches.

    Returns
    -------
    torch.Tensor
        int64 [total, 3], -1 where it is not known.
    """
    if (known := token_places(call.given)) is not None:
        return torch.cat(known)
    window = _window(around, _known(around, "spatial_merge_size") or 1)
    tiles = []
    for sample in grids:
        for number, (h, w) in enumerate(sample):
            merge = _merge(around, h * w)
            tiles.append(_tile(number, _order(h // merge, w // merge, 1, window)))
    return _laid_out(tiles, total, (total - sum(map(len, tiles))) // len(tiles))


def image_places(
    around: Sequence[nn.Module], grids: Grids, counts: Sequence[int], call: Call
) -> list[torch.Tensor]:
    """Return tile, row and column of the tokens of each sample's image in a language model.

    Parameters
    ----------
    around
        The modules from the one that was called down to the blocks of the vision tower.
    grids
        Of the vision tower.
    counts
        How many image tokens each sample has.
    call
        The one of the vision tower.

    Returns
    -------
    list of torch.Tensor
        Of each sample int64 [count, 3], -1 where it is not known and where a token stands for no
        part of the image, as the end of a line.
    """
    if (known := token_places(call.given)) is not None:
        return known
    packs = next((m for m in around if hasattr(m, "pack_image_features")), None)
    sizes = call.given.get("image_sizes")
    found = []
    for i, (sample, count) in enumerate(zip(grids, counts, strict=True)):
        if packs is not None and sizes is not None:
            tokens = _joined(packs, sample, sizes[i].tolist())
        else:
            tiles = []
            for number, (h, w) in enumerate(sample):
                merge = _merge(around, h * w)
                tiles.append(_tile(number, _order(h // merge, w // merge, 1, None)))
            tokens = torch.cat(tiles)
        found.append(tokens if len(tokens) == count else _nowhere(count))
    return found


# ------ pieces


def _known(around: Sequence[nn.Module], name: str) -> Any:
    """Return a setting of the innermost module that has it, or None."""
    for module in reversed(around):
        for owner in (module, getattr(module, "config", None)):
            if (value := getattr(owner, name, None)) is not None:
                return value
    return None


def _leading(layout: Layout) -> int:
    """Count the tokens before the patches of a sequence."""
    return int(_special(layout)[0].int().cumprod(0).sum())


def _special(layout: Layout) -> torch.Tensor:
    """Tell which tokens are there whatever the image is."""
    roles = (1 << role_bit("cls")) | (1 << role_bit("register"))
    return (layout.roles & roles) != 0


def _by_sample(tiles: Sequence[tuple[int, ...]], layout: Layout) -> Grids:
    pairs = [(int(h), int(w)) for h, w in tiles]
    if layout.starts is None:
        return [[pair] for pair in pairs]
    length = layout.starts[-1] // len(pairs)
    return [pairs[a // length : b // length] for a, b in itertools.pairwise(layout.starts)]


def _order(rows: int, columns: int, merge: int, window: int | None) -> torch.Tensor:
    """Return [rows * columns, 2], row and column of patches in the order in which they follow.

    Row by row; but patches that a projector merges follow each other (Qwen2-VL), and so do the
    blocks of a window (Qwen2.5-VL), whose side `window` is in blocks.
    """

    def key(place: tuple[int, int]) -> tuple[int, ...]:
        row, column = place
        block = row // merge, column // merge
        return (*(b // window for b in block if window), *block, row, column)

    return torch.tensor(sorted(itertools.product(range(rows), range(columns)), key=key))


def _window(around: Sequence[nn.Module], merge: int) -> int | None:
    # What tells Qwen2.5-VL's tower, which sorts its tokens by window, from those that do not.
    if _known(around, "fullatt_block_indexes") is None:
        return None
    return int(_known(around, "window_size") // merge // _known(around, "patch_size"))


def _merge(around: Sequence[nn.Module], patches: int) -> int:
    """Return the side of the square of patches that becomes one token of the language model."""
    if (side := _known(around, "spatial_merge_size") or _known(around, "scale_factor")) is not None:
        return int(side)
    if (shrink := _known(around, "downsample_ratio")) is not None:
        return round(1 / float(shrink))
    if (tokens := _known(around, "mm_tokens_per_image")) is not None:
        return round(math.sqrt(patches / int(tokens)))
    return 1


def _tile(number: int, order: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(order, (1, 0), value=number)


def _nowhere(tokens: int) -> torch.Tensor:
    return torch.full((tokens, 3), -1)


def _laid_out(tiles: Sequence[torch.Tensor], total: int, leading: int) -> torch.Tensor:
    """Lay tiles end to end, each with the tokens before it; padded to equal lengths."""
    if sum(map(len, tiles)) == total:
        return torch.cat(list(tiles))
    length = total // len(tiles)
    if total % len(tiles) or any(leading + len(tile) > length for tile in tiles):
        return _nowhere(total)
    out = _nowhere(total).view(len(tiles), length, 3)
    for row, tile in zip(out, tiles, strict=True):
        row[leading : leading + len(tile)] = tile
    return out.flatten(0, 1)


def _joined(module: Any, tiles: Sequence[tuple[int, int]], size: Sequence[int]) -> torch.Tensor:
    """Return the places of an image's tokens where tiles are joined and what pads them is cut off.

    LLaVA-NeXT and OneVision do that, end every line with a token of its own, and OneVision shrinks
    what is too large: then a token's place is that of the patch where its centre lies. The model's
    own function packs the coordinates as it packs features.
    """
    from transformers.image_processing_utils import select_best_resolution

    config = module.config
    (rows, columns), count = tiles[0], len(tiles)
    _, width = select_best_resolution(tuple(size), config.image_grid_pinpoints)
    across = width // config.vision_config.image_size
    coordinates = torch.stack([_tile(0, _order(rows, columns, 1, None))] * count).float()
    for i in range(1, count):
        down, right = divmod(i - 1, across)
        coordinates[i] += torch.tensor([1, down * rows, right * columns])
    takes = inspect.signature(module.pack_image_features).parameters
    names = ("vision_feature_select_strategy", "vision_aspect_ratio")
    packed, _ = module.pack_image_features(
        [coordinates], torch.tensor([size]), image_newline=torch.full((3,), torch.nan),
        **{name: getattr(config, name) for name in names if name in takes},
    )  # fmt: skip
    part, row, column = packed[0].nan_to_num(-1).round().long().T
    tile = torch.where(part > 0, 1 + row // rows * across + column // columns, part)
    inside = torch.stack([tile, row % rows, column % columns], 1)
    return torch.where((part >= 0)[:, None], inside, -1)
