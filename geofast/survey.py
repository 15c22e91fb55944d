"""What one sample looks like inside a model: tokens and widths at every site."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch

from .models import Model, Site

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
        shapes[site.name] = hidden.numel() // width, width

    with ExitStack() as hooks:
        for site in sites:
            hooks.callback(site.watch(partial(note, site)).remove)
        yield shapes


def token_count(shapes: Shapes) -> int:
    """Return how long a sample is to the model, in tokens of the greatest width.

    A tower that narrows and widens, as Swin's does, has many narrow tokens at first: they count by
    the numbers that they hold.
    """
    most = max(tokens * width for tokens, width in shapes.values())
    return max(1, -(-most // max(width for _, width in shapes.values())))
