"""Inputs to try a model with, where nobody gives any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from .model import Model

_TEXTS = (
    "Paris",
    "The city of Buenos Aires",
    "What are the latitude and longitude of the city of Reykjavik, in Iceland?",
)
_PLACES = ((48.8584, 2.2945), (-34.6, -58.38), (64.15, -21.94))
_SIZES = ((224, 224), (180, 320), (400, 240))  # height and width: square, wide, tall
_SIDE = 224  # of an image, in pixels, where the config does not say


def examples_of(kind: str) -> list[Any]:
    """Return three inputs of `kind` and of different sizes."""
    if kind == "text":
        return list(_TEXTS)
    if kind == "location":
        return list(_PLACES)
    from PIL import Image

    images = []
    for i, (height, width) in enumerate(_SIZES):
        y, x = np.mgrid[:height, :width]
        waves = [128 + 127 * np.sin(x / (7 + 5 * c + 3 * i) + y * (c + i) / 40) for c in range(3)]
        images.append(Image.fromarray(np.stack(waves, -1).astype(np.uint8)))
    return images


def example_for(model: Model) -> Any:
    """Return an input that the model takes as it is.

    A grey image has the side that the config says, because some processors do not resize.
    """
    if model.kind != "image":
        return examples_of(model.kind)[0]
    from PIL import Image

    return Image.new("RGB", _side(model.module), "grey")


def _side(module: nn.Module) -> tuple[int, int]:
    """Return width and height in pixels."""
    config: Any = getattr(module, "config", None)
    config = getattr(config, "vision_config", None) or config
    size = getattr(config, "image_size", None)
    height, width = size if isinstance(size, Sequence) and len(size) == 2 else (size, size)
    across, down = (
        side if isinstance(side, int) and side > 0 else _SIDE for side in (width, height)
    )
    return across, down
