"""The same model with weights that nobody trained: what its architecture alone can do."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from .adapters import wears_one
from .checkpoint import QUANTISED, pinned, quantisation
from .model import Model

_PUBLIC, _OWN = "reset_parameters", "_reset_parameters"
"""What torch calls the method that draws a part's parameters; the latter in MultiheadAttention."""

_ADAPTED = "an adapter is on; merge it (merge=True, --merge-adapter) or leave it out"


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
    require_twin(model)
    twin = copy.deepcopy(model)
    gpus = sorted({p.device.index for p in model.module.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=gpus), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            torch.cuda.default_generators[gpu].manual_seed(seed)
        if model.untrained is not None:
            twin.module.load_state_dict(model.untrained().state_dict())
        elif _of_transformers(model.module):
            kind: Any = type(model.module)
            fresh = kind(copy.deepcopy(model.module.config))
            twin.module.load_state_dict(fresh.state_dict())
        else:
            parts = [*twin.module.modules()]
            # MultiheadAttention draws its output's bias too, after that has drawn itself.
            for part, draws in [(p, _PUBLIC) for p in parts] + [(p, _OWN) for p in parts[::-1]]:
                if callable(draw := getattr(part, draws, None)):
                    draw()
    return twin


def require_twin(model: Model) -> None:
    """Refuse a model that `random_twin` cannot copy.

    Raises
    ------
    ValueError
        See `random_twin`.
    """
    _refuse(model.name, _no_twin(model))


def require_twin_of(name: str, config: Any, *, adapted: bool) -> None:
    """Refuse, before its weights are loaded, a checkpoint that `random_twin` cannot copy.

    Raises
    ------
    ValueError
        When it is quantised, or will have an adapter on (`adapted`).
    """
    _refuse(name, _ADAPTED if adapted else QUANTISED if quantisation(config) else None)


def _refuse(name: str, why: str | None) -> None:
    if why:
        raise ValueError(f"{name} has no twin of random weights: {why}")


def _no_twin(model: Model) -> str | None:
    if wears_one(model.module):
        return _ADAPTED
    drawn = model.untrained is not None or _of_transformers(model.module)
    return pinned(model.module) or (None if drawn else _undrawn(model))


def _of_transformers(module: nn.Module) -> bool:
    return hasattr(module, "base_model_prefix") and getattr(module, "config", None) is not None


def _undrawn(model: Model) -> str | None:
    for path, part in model.module.named_modules():
        mine = [name for name, _ in part.named_parameters(recurse=False)]
        if mine and not any(callable(getattr(part, name, None)) for name in (_PUBLIC, _OWN)):
            return (
                f"{path or model.name}.{mine[0]} does not say how it is drawn: give "
                f"{type(part).__name__} a reset_parameters method"
            )
    return None
