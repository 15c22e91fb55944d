"""Hooks against the hidden states that the model itself returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from ..models import Model, Stage, Tower
from ..models.model import as_taken, evaluating
from .compare import Check, Given


def check_hidden_states(model: Model, given: Given) -> Check:
    batch = model.prepare(given.examples)
    notes: list[str] = []
    none: list[str] = []
    if "prompts" in batch:  # twice the same: what the first does to the image shows in the second
        batch["prompts"] *= 2
    mine = _raw(model, partial(model.forward, batch))
    with evaluating(model.module), torch.inference_mode():
        if unlike := _unlike_whole(model, batch, mine):
            return _misplaced(unlike)
        for stage, arguments in _calls(model, batch):
            states = _states(stage, arguments)
            for tower in stage.towers:
                if not tower.blocks:
                    continue
                if states is None or len(states) != 1 + len(tower.blocks):
                    none.append(tower.name)
                elif wrong := _unlike(tower, mine, states):
                    known, detail = wrong
                    if not known:
                        return _misplaced(detail)
                    notes.append(detail)
    if none:
        notes.append(f"the model gives none of {', '.join(none)}")
    return Check("", "note" if notes else "pass", "; ".join(notes) or "every site is the same")


def _misplaced(detail: str) -> Check:
    return Check("", "fail", detail, "the hooks read another place: report this model")


def _unlike_whole(
    model: Model, batch: Mapping[str, Any], mine: Mapping[str, torch.Tensor]
) -> str | None:
    """Say where two calls, the image's and the prompt's, do not give what one for both does."""
    if "prompts" not in batch:
        return None
    stage, arguments = _calls(model, batch)[-1]
    whole = _raw(model, partial(stage.body, **arguments))
    wrong = [name for name, x in mine.items() if name not in whole or not _same(x, whole[name])]
    if not wrong:
        return None
    said = f"{len(wrong)} of {len(mine)} sites differ from those of one call for image and prompt"
    return f"{said}, the first {wrong[0]}"


def _unlike(
    tower: Tower, mine: Mapping[str, torch.Tensor], states: Sequence[torch.Tensor]
) -> tuple[bool, str] | None:
    """Say where a tower's sites differ from the hidden states, and whether that is known."""
    layers = [f"{tower.name}.layers.{i}" for i in range(len(tower.blocks))]
    names = [f"{tower.name}.embed", *layers]
    wrong = [name for name, y in zip(names, states, strict=True) if not _same(mine[name], y)]
    if not wrong:
        return None
    normed = mine.get(f"{tower.name}.norm")
    if wrong == layers[-1:] and normed is not None and _same(normed, states[-1]):
        return True, f"{layers[-1]}: theirs is after the final norm, geofast's before it"
    return False, f"{len(wrong)} of {len(names)} sites differ, the first {wrong[0]}"


def _same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two passes gave one tensor; a GPU may sum in another order from pass to pass."""
    if x.shape != y.shape:
        return False
    limit = max(1e-5, 2 * torch.finfo(y.dtype).eps)
    return bool((x.double() - y.double()).norm() <= limit * y.double().norm())


def _calls(model: Model, batch: Mapping[str, Any]) -> list[tuple[Stage, dict[str, Any]]]:
    if "prompts" not in batch:
        return [(model.stages[0], dict(batch))]
    look, talk = model.stages
    return [(look, batch["image"]), (talk, {**as_taken(batch["image"]), **batch["prompts"][0]})]


def _states(stage: Stage, given: Mapping[str, Any]) -> Sequence[torch.Tensor] | None:
    try:
        out = stage.body(**given, output_hidden_states=True, return_dict=True)
    except TypeError:  # not a model of transformers
        return None
    states: Sequence[torch.Tensor] | None = getattr(out, "hidden_states", None)
    return states


def _raw(model: Model, call: Callable[[], Any]) -> dict[str, torch.Tensor]:
    """Return the hidden states before, between and after the blocks while `call` runs the model."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str, hidden: torch.Tensor) -> None:
        seen[name] = hidden

    norms = [site for site in model.every_site if site.name.endswith(".norm")]
    with ExitStack() as hooks:
        for site in [*model.sites(), *norms]:
            hooks.callback(site.watch(partial(keep, site.name)).remove)
        call()
    return seen
