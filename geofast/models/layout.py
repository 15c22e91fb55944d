"""Which tokens of a hidden state belong to which sample, and what each of them is.

Most models keep a sequence a sample, [batch, tokens, dim]. Others cut an image into tiles and keep
a sequence a tile, or pack the patches of all images into one sequence [patches, dim]; convolutional
ones keep [batch, dim, height, width]. All of them come out as sequences of tokens, and where a
sample is not a sequence, with the place where it begins.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from .._ops import send
from ..pooling import role_bit
from .phi4 import token_places
from .structure import Site, Tower

_PACKED = ("image_grid_thw", "grid_thw", "image_sizes")
_MASKS = {"vision": ("pixel_attention_mask", "patch_attention_mask")}
_MASKS_OF_TEXT = ("attention_mask", "real")  # the latter is of padding that the model reads


@dataclass(frozen=True)
class Layout:
    """Roles of all tokens, and where samples begin."""

    roles: torch.Tensor
    """uint8 [sequences, tokens], a bit a role."""
    starts: tuple[int, ...] | None
    """Where each sample begins in the sequences laid end to end, and the end; None where every
    sequence is a sample."""

    @property
    def samples(self) -> int:
        return self.roles.shape[0] if self.starts is None else len(self.starts) - 1

    @cached_property
    def sample(self) -> torch.Tensor:
        """Which sample each token is of: int64 [sequences * tokens], where the roles are."""
        if self.starts is None:
            of_sequence = torch.arange(self.samples, device=self.roles.device)[:, None]
            return of_sequence.expand(-1, self.roles.shape[1]).reshape(-1)
        lengths = torch.tensor(self.starts).diff()
        return send(torch.arange(self.samples).repeat_interleave(lengths), self.roles.device)

    def has(self, role: str) -> torch.Tensor:
        """Which tokens have `role`: bool [sequences, tokens]."""
        return (self.roles >> role_bit(role) & 1).bool()


@dataclass
class Call:
    """What a forward pass was called with, as far as it says what tokens are."""

    given: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the call."""
    masks: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    """By tower, the masks that modules on the way to its blocks were called with."""

    @property
    def sizes(self) -> set[int]:
        """How many samples there may be: the lengths of the arguments."""
        if isinstance(ids := self.given.get("input_ids"), torch.Tensor):
            return {len(ids)}
        if isinstance(tiles := self.given.get("tiles"), torch.Tensor):
            return {len(tiles)}
        return {len(t) for t in self.given.values() if isinstance(t, torch.Tensor) and t.ndim}

    def note_mask(self, tower: str, given: Mapping[str, Any]) -> None:
        """Keep the mask that a module on the way to the blocks of `tower` is called with."""
        for name in _MASKS.get(tower, _MASKS_OF_TEXT):
            mask = given.get(name)
            # Further in, models make [batch, 1, tokens, tokens] of a mask that was seen before.
            if isinstance(mask, torch.Tensor) and (mask.ndim == 2 or tower == "vision"):
                self.masks.setdefault(tower, []).append(mask)
            elif mask is not None and tower not in self.masks:
                got = list(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
                raise ValueError(f"{name} must be [batch, tokens] for pooling; got {got}")

    def pixel_sizes(self, sequences: int) -> list[tuple[int, int]] | None:
        """Height and width in pixels: of each sequence, or of each image in a packed one."""
        sizes = self.given.get("image_sizes")
        if sizes is not None and sequences == 1:
            return [(int(h), int(w)) for h, w in sizes]
        tensors = [x for x in self.given.values() if isinstance(x, torch.Tensor)]
        pixels = [x for x in tensors if x.ndim >= 4 and x.is_floating_point()]
        return [(pixels[0].shape[-2], pixels[0].shape[-1])] * sequences if pixels else None

    def shares(self, sequences: int) -> torch.Tensor | None:
        """How many tokens each image has in proportion to the others; None: a sequence each."""
        tiles = self.given.get("tiles")
        if isinstance(tiles, torch.Tensor) and sequences == int(tiles.sum()):
            return None if sequences == len(tiles) else tiles
        if sequences == 1 and (places := token_places(self.given)) is not None:
            return torch.tensor([len(tokens) for tokens in places])
        for name in _PACKED:
            sizes = self.given.get(name)
            if isinstance(sizes, torch.Tensor) and sizes.ndim == 2 and sequences == 1:
                return sizes.prod(1)
        return None


def grids_of(sizes: Sequence[tuple[int, int]], patches: int) -> list[tuple[int, int]] | None:
    """Return rows and columns of square patches in images of `sizes` pixels.

    `patches` is the number in all images together; None where no grid comes to it.
    """
    side = math.sqrt(sum(h * w for h, w in sizes) / max(patches, 1))
    grids = [(round(h / side), round(w / side)) for h, w in sizes]
    return grids if sum(h * w for h, w in grids) == patches else None


def as_tokens(site: Site, tower: Tower, hidden: torch.Tensor, call: Call) -> torch.Tensor:
    """Hidden states as [sequences, tokens, dim].

    Raises
    ------
    ValueError
        For any other shape.
    """
    packed = tower.tokens == "patch" and any(
        # With image_sizes, CLIP norms one vector a tile; what a projector makes of it has no tile.
        name in call.given
        for name in (_PACKED if tower.name == "projector" else _PACKED[:2])
    )
    if hidden.ndim == 2:
        return hidden[None] if packed and not site.is_vector else hidden[:, None]
    if hidden.ndim == 4:
        return hidden.flatten(2).mT if tower.channels_first else hidden.flatten(1, 2)
    if tower.tokens_first and (site.layer is not None or site.name.endswith(".embed")):
        hidden = hidden.transpose(0, 1)
    if hidden.ndim != 3:
        shape = list(hidden.shape)
        raise ValueError(
            f"{site.name} gave hidden states of shape {shape}, not [batch, tokens, dim]"
        )
    return hidden


def lay_out(site: Site, tower: Tower, tokens: torch.Tensor, call: Call) -> Layout:
    """Lay out `tokens` [sequences, tokens, dim], which `as_tokens` made.

    Raises
    ------
    ValueError
        When the sequences are not the samples of the call, nor tiles or packed images of them, or
        a mask does not fit.
    """
    sequences, length, _ = tokens.shape
    roles = _roles(site, tower, tokens, call)
    shares = call.shares(sequences) if tower.tokens == "patch" else None
    if shares is not None:
        return Layout(roles.view(1, -1), _starts(site, shares, sequences * length))
    if call.sizes and sequences not in call.sizes:
        sizes = " or ".join(map(str, sorted(call.sizes)))
        msg = (
            f"{site.name} is {list(tokens.shape)}, not [batch, tokens, dim]: the batch has {sizes} "
            "samples"
        )
        raise ValueError(msg)
    return Layout(roles, None)


def _starts(site: Site, shares: torch.Tensor, total: int) -> tuple[int, ...]:
    counts = shares.tolist()  # once: where they are on a GPU, the host waits for them
    whole, ends = sum(counts), [total * end for end in itertools.accumulate(counts)]
    if any(end % whole for end in ends):
        raise ValueError(f"{site.name}: {total} tokens cannot be shared out by {counts}")
    return (0, *(end // whole for end in ends))


def _roles(site: Site, tower: Tower, tokens: torch.Tensor, call: Call) -> torch.Tensor:
    sequences, length, _ = tokens.shape
    if site.is_vector:
        return torch.full((sequences, 1), 255, dtype=torch.uint8, device=tokens.device)
    # Made where they are needed: a CUDA graph is sent nothing.
    other = 1 << role_bit(tower.tokens) | 1
    roles = torch.full((sequences, length), other, dtype=torch.uint8, device=tokens.device)
    prefix = _prefix(site, tower, length, call)
    suffix = tower.suffix if len(prefix) + len(tower.suffix) < length else ()
    for i, role in [*enumerate(prefix), *enumerate(suffix, start=-len(suffix))]:
        roles[:, i] = 1 << role_bit(role) | 1
    if tower.name == "projector" and (places := token_places(call.given)) is not None:
        roles[:, torch.cat(places)[:, 0] < 0] = 1
    ids = call.given.get("input_ids")
    if tower.image_token is not None:
        if isinstance(ids, torch.Tensor) and ids.shape == roles.shape:
            ids = send(ids, roles.device)
            for mark in tower.image_marks:
                roles.masked_fill_(ids == mark, 1)
            roles.masked_fill_(ids == tower.image_token, 1 << role_bit("image") | 1)
        else:
            roles[:] = 1  # of embeddings alone nobody can tell text from image
    mask = _mask(tower, roles, call)
    if mask is not None:
        roles *= send(mask != 0, roles.device)
    return roles


def _prefix(site: Site, tower: Tower, length: int, call: Call) -> tuple[str, ...]:
    """Roles of the tokens that come before the others."""
    if length == 1:  # CLIP's final norm sees the CLS token alone
        return tower.prefix[:1]
    if tower.channels_first and site.name.endswith(".norm"):
        # DINOv3's ConvNeXt puts the mean of all patches before them there.
        sizes = call.pixel_sizes(1)
        if sizes and not grids_of(sizes, length) and grids_of(sizes, length - 1):
            return ("cls",)
    return tower.prefix


def _mask(tower: Tower, roles: torch.Tensor, call: Call) -> torch.Tensor | None:
    masks = call.masks.get(tower.name, [])
    for mask in reversed(masks):  # the last is the nearest to the blocks
        mask = torch.nn.functional.pad(mask.flatten(1), (0, len(tower.suffix)), value=1)
        if mask.shape == roles.shape:
            return mask
    if masks and masks[-1].ndim == 2 and not (tower.suffix and roles.shape[1] == 1):
        shape, (sequences, length) = list(masks[-1].shape), roles.shape
        msg = f"attention_mask is {shape} for hidden states of {sequences} x {length} tokens"
        raise ValueError(msg)
    return None
