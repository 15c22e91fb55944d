"""Which tokens stand around the patches of an image: by experiment, those that no image changes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from .example import example_for
from .model import Model
from .structure import Tower

_MOST = 16
"""More tokens than these, of which no name tells, are no registers."""


def with_counted_prefix(model: Model) -> Model:
    """Return the model with the prefix of its vision tower as its blocks see it.

    Names of parameters tell a `cls` token from a `register`, but not where it comes in: CaiT's does
    so after the blocks, Llama 4's stands after the patches. Tokens before or after the patches that
    no name tells of are registers, if they are few, as are those of YOLOS that are to find
    something. A model on the meta device, which has no numbers, stays
    as it is, as does one that cannot take an image of the side that its config says.

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
    try:
        batch = model.prepare([example_for(model)])
    except Exception:  # of whatever processor; a capture says why it does not run
        return tower
    batches = [_noise(batch, seed) for seed in range(2)]
    one, other = (_hidden(model, tower, "vision.embed", b) for b in batches)
    if one is None or other is None:
        return tower
    named, same = tower.prefix, _unchanged(one, other)
    before, after = (int(s.int().cumprod(0).sum()) for s in (same, same.flip(0)))
    if before == len(same) > 0:  # the image comes in later, and nothing can be told
        return tower
    most = max(_MOST, getattr(getattr(model.module, "config", None), "num_detection_tokens", 0))
    if before == len(named):
        return replace(tower, suffix=("register",) * after) if 0 < after <= most else tower
    if not named:
        return replace(tower, prefix=("register",) * before) if before <= _MOST else tower
    if before == 0 and after == len(named):
        return replace(tower, prefix=(), suffix=named)
    if not same.any():
        end = _hidden(model, tower, f"vision.layers.{len(tower.blocks) - 1}", batches[0])
        if end is None:
            return tower
        if len(same) in (0, end.shape[1]):
            return replace(tower, prefix=(), norm=None)  # the norm would see them too
    msg = (
        f"{model.name} has {' and '.join(dict.fromkeys(named))} tokens, but its blocks do not "
        "begin with them and the patches: its tokens cannot be told apart"
    )
    raise ValueError(msg)


def _unchanged(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Say which tokens are the same in two images; of packed patches or a grid of them, none."""
    return (one == other).all(2).all(0) if one.ndim == 3 else torch.zeros(0, dtype=torch.bool)


def _noise(batch: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return the batch with noise for pixels, the margins that a processor adds included."""
    generator = torch.Generator().manual_seed(seed)
    pixels = {
        key: torch.rand(x.shape, generator=generator).to(x)
        if isinstance(x, torch.Tensor) and x.is_floating_point()
        else x
        for key, x in (batch["image"] if "prompts" in batch else batch).items()
    }
    return {**batch, "image": pixels} if "prompts" in batch else pixels


def _hidden(model: Model, tower: Tower, name: str, batch: Mapping[str, Any]) -> torch.Tensor | None:
    """Return the hidden states of a batch, [sequences, tokens, dim] or as they are.

    None where the site does not run, or the model does not take the batch.
    """
    seen: list[torch.Tensor] = []
    sites = model.sites(name)
    with ExitStack() as hooks:
        hooks.callback(sites[0].watch(lambda hidden: seen.append(hidden.cpu())).remove)
        try:
            model.until(sites).forward(batch)
        except Exception:  # of whatever model; a capture says why it does not run
            return None
    if seen and tower.tokens_first and seen[0].ndim == 3:
        return seen[0].transpose(0, 1)
    return seen[0] if seen else None
