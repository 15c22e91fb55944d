"""The pooling vocabulary: from the tokens of one sample to one vector.

A pool is written `cls`, `last`, `mean`, `max` or `min`, with a role where one is needed
(`mean:patch`, `max:image`), and `a+b` concatenates. `each:patch` pools nothing: every patch is a
row of its own, with the targets, fold and group of its sample. A role says what a token is:

`cls`
    the token that a vision tower is trained to gather an image in;
`register`
    tokens beside it that stand for no part of the image (DeiT's distillation token is one);
`patch`
    a vision tower's tokens of the image, and what a projector makes of them, in the model's order;
`image`
    an image's tokens inside a language model, the ends of lines among them that LLaVA-NeXT adds;
`text`
    all other tokens of a language model or a text tower, its special ones and those of the chat
    template included, but not those that only stand around an image (`<|vision_start|>`,
    `[IMG_BREAK]`), which have no role of their own;
`all`
    every token that is not padding. `last` takes the last of them, on whichever side padding is.

Roles travel as one byte a token, a bit a role, so that a single read of the hidden states serves
every pool. `geofast.tokens` tells the role and the place of every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import _ops

ROLES = ("all", "cls", "register", "patch", "image", "text")
"""What a token can be, in the order of its bits. `all` is every token that is not padding."""

_SHORT = {"cls": ("first", "cls"), "last": ("last", "all")}
_REDUCTIONS = ("mean", "max", "min")
_EACH = "each"


def role_bit(role: str) -> int:
    """Return the bit of `role` in a role byte."""
    return ROLES.index(role)


@dataclass(frozen=True)
class Pool:
    """One pooling: parts that are concatenated, each an operation over the tokens of a role."""

    name: str
    parts: tuple[tuple[str, str], ...]
    """(operation, role) pairs; the operation is `first`, `last`, `mean`, `max`, `min` or, alone,
    `each`."""

    @property
    def each(self) -> str | None:
        """The role whose every token is a row of its own; None for one row a sample."""
        operation, role = self.parts[0]
        return role if operation == _EACH else None

    @property
    def role(self) -> str | None:
        """What it reads, as an edit's role: `last`, or what tokens are; None of joined parts."""
        (operation, role), *more = self.parts
        return None if more else operation if operation == "last" else role

    @classmethod
    def parse(cls, text: str) -> Pool:
        """Read `mean:patch`, `cls`, `max+min` and the like.

        Raises
        ------
        ValueError
            For a word outside the vocabulary; the message gives the vocabulary.
        """
        parts = tuple(_parse_part(part, text) for part in text.split("+"))
        if len(parts) > 1 and any(operation == _EACH for operation, _ in parts):
            raise ValueError(f"pool {text!r}: each takes every token by itself, and joins no other")
        return cls(text, parts)

    def width(self, dim: int) -> int:
        """Return the length of the pooled vector for hidden states of width `dim`."""
        return dim * len(self.parts)


def _parse_part(part: str, text: str) -> tuple[str, str]:
    operation, colon, role = part.strip().partition(":")
    if operation in _SHORT and not colon:
        return _SHORT[operation]
    if operation in (*_REDUCTIONS, _EACH) and (role in ROLES or not colon):
        return operation, role or "all"
    msg = (
        f"unknown pool {text!r}: write cls, last, mean, max, min or each; the last four take a "
        f"role after a colon ({', '.join(ROLES)}), and a+b concatenates"
    )
    raise ValueError(msg)


def parse_pools(pools: str | Sequence[str]) -> tuple[Pool, ...]:
    """Read one pool or several, each once.

    Raises
    ------
    ValueError
        When a pool is unknown or none is given.
    """
    names = [pools] if isinstance(pools, str) else list(dict.fromkeys(pools))
    if not names:
        raise ValueError("no pool was given; write for example pool='mean:patch'")
    return tuple(Pool.parse(name) for name in names)


def pool(
    hidden: torch.Tensor,
    roles: torch.Tensor,
    pools: Sequence[Pool],
    out: Sequence[torch.Tensor],
    starts: Sequence[int] | None = None,
) -> bool:
    """Pool hidden states into rows; every pool comes out of one read of the tokens.

    Parameters
    ----------
    hidden
        [batch, tokens, dim], float32, float16 or bfloat16; the last dimension contiguous.
    roles
        [batch, tokens] uint8, a bit a role (see `ROLES`), on the device of `hidden`.
    pools
        What to compute; one row a sample, so no `each`.
    out
        For each pool a float32 tensor [batch, pool.width(dim)] on the device of `hidden`, written
        in place. Sums are float32 or better; with float64 tensors the reference computes them. A
        sample with no token of the role gives NaN.
    starts
        Where a sample is not a sequence of `hidden`: where each begins in the sequences laid end to
        end, and the end, [samples + 1]; `roles` are [1, sequences * tokens].

    Returns
    -------
    bool
        True when all rows are known to be finite; the kernels of the CPU tell.
    """
    dim = hidden.shape[-1]
    jobs = [
        (operation, role_bit(role), rows[:, i * dim : (i + 1) * dim])
        for pool_, rows in zip(pools, out, strict=True)
        for i, (operation, role) in enumerate(pool_.parts)
    ]
    return _ops.pool(hidden, roles, jobs, starts)
