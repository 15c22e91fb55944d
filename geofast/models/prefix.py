"""Which tokens stand before the patches of an image: by experiment, those that no image changes."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import torch

from .model import Model
from .structure import Tower

_SIDE = 224


def with_counted_prefix(model: Model) -> Model:
    """Return the model with the prefix of its vision tower as its blocks see it.

    Names of parameters tell a `cls` token from a `register`, but not where it comes in: CaiT's does
    so after the blocks, Llama 4's stands after the patches. Tokens before the patches that no name
    tells of are registers. A model on the meta device, which has no numbers, stays as it is.

    Raises
    ------
    ValueError
        When what its names tell of is not what its blocks begin with.
    """
    stage, *more = model.stages
    tower = next((t for t in stage.towers if t.name == "vision"), None)
    if tower is None or model.device.type == "meta":
        return model
    counted = _counted(model, tower)
    towers = tuple(counted if t is tower else t for t in stage.towers)
    return replace(model, stages=(replace(stage, towers=towers), *more))


def _counted(model: Model, tower: Tower) -> Tower:
    one, other = (_hidden(model, tower, "vision.embed", seed) for seed in range(2))
    if one is None or other is None:  # a capture says that it does not run
        return tower
    named, same = tower.prefix, _unchanged(one, other)
    before, after = (int(s.int().cumprod(0).sum()) for s in (same, same.flip(0)))
    # Where all are the same, the image comes in later, and nothing can be told.
    if before == len(named) or before == len(same) > 0:
        return tower
    if not named:
        return replace(tower, prefix=("register",) * before)
    if before == 0 and after == len(named):
        return replace(tower, prefix=(), suffix=named)
    end = _hidden(model, tower, f"vision.layers.{len(tower.blocks) - 1}", 0)
    if not same.any() and end is not None and len(same) in (0, end.shape[1]):
        return replace(tower, prefix=(), norm=None)  # the norm would see them too
    msg = (
        f"{model.name} has {' and '.join(dict.fromkeys(named))} tokens, but its blocks do not "
        "begin with them and the patches: its tokens cannot be told apart"
    )
    raise ValueError(msg)


def _unchanged(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Say which tokens are the same in two images; of packed patches or a grid of them, none."""
    return (one == other).all(2).all(0) if one.ndim == 3 else torch.zeros(0, dtype=torch.bool)


def _hidden(model: Model, tower: Tower, name: str, seed: int) -> torch.Tensor | None:
    """Return the hidden states of an image of noise, [sequences, tokens, dim] or as they are.

    None where the site does not run.
    """
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (_SIDE, _SIDE, 3), dtype=np.uint8)
    seen: list[torch.Tensor] = []
    sites = model.sites(name)
    batch = model.prepare([Image.fromarray(pixels)])
    with ExitStack() as hooks:
        hooks.callback(sites[0].watch(lambda hidden: seen.append(hidden.cpu())).remove)
        model.until(sites).forward(batch)
    if seen and tower.tokens_first and seen[0].ndim == 3:
        return seen[0].transpose(0, 1)
    return seen[0] if seen else None
