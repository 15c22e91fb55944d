"""The same model with weights that nobody trained: what its architecture alone can do."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from .adapters import wears_one
from .checkpoint import pinned
from .model import Model


def random_twin(model: Model, seed: int = 0) -> Model:
    """Return a copy of `model` with random weights, as its class draws them before training.

    Parameters
    ----------
    model
        Of transformers, open_clip or timm, or of modules that all draw their own parameters
        (`reset_parameters`).
    seed
        For the weights; the global generators stay as they are.

    Raises
    ------
    ValueError
        When parts of the model do not say how they are drawn; when it is quantised, offloaded or
        has an adapter on.
    """
    if why := _no_twin(model.module):
        raise ValueError(f"{model.name} has no twin of random weights: {why}")
    twin = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        config: Any = getattr(model.module, "config", None)
        if model.untrained is not None:
            twin.module.load_state_dict(model.untrained().state_dict())
        elif hasattr(model.module, "base_model_prefix") and config is not None:
            fresh = type(model.module)(copy.deepcopy(config))
            twin.module.load_state_dict(fresh.state_dict())
        else:
            _draw(model.name, twin.module)
    return twin


def _no_twin(module: nn.Module) -> str | None:
    if wears_one(module):
        return "an adapter is on; merge it (merge=True, --merge-adapter) or leave it out"
    return pinned(module)


def _draw(name: str, module: nn.Module) -> None:
    for path, part in module.named_modules():
        reset: Any = getattr(part, "reset_parameters", None)
        if callable(reset):
            reset()
        elif mine := [n for n, _ in part.named_parameters(recurse=False)]:
            msg = (
                f"{path or name}.{mine[0]} of {name} does not say how it is drawn: give "
                f"{type(part).__name__} a reset_parameters method to have a twin of random weights"
            )
            raise ValueError(msg)
