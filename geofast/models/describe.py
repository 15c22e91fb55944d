"""The sites of a model, in lines that people read."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from itertools import groupby

import torch

from .example import example_for
from .model import Model
from .structure import Tower

_NARROWEST = 36  # column of sites


def describe(model: Model) -> str:
    """List the sites with shape, token roles and default pool, from one example run.

    Towers for inputs of the other kind follow, where the model has two.
    """
    takes = model.kind + " with a prompt" * bool(model.prompts)
    takes += f" or {model.other.kind}" if model.other else ""
    lines = [f"{model.name}: {takes} in, {str(model.dtype).removeprefix('torch.')}"]
    lines += model.notes
    listed: set[str] = set()
    for view in (model, model.other):
        if view is None or {t.name for t in view.towers} <= listed:
            continue
        shapes = _shapes(view)
        for tower in view.towers:
            lines += _lines(view, tower, shapes)
        listed |= {t.name for t in view.towers}
    return "\n".join(lines)


def _shapes(model: Model) -> dict[str, str]:
    shapes: dict[str, str] = {}

    def note(name: str, hidden: torch.Tensor) -> None:
        # One sample, but several tiles of it, or packed patches without an axis for samples.
        shape = hidden.shape[1:] if hidden.shape[0] == 1 else hidden.shape
        shapes[name] = " x ".join(map(str, shape))

    with ExitStack() as hooks:
        for site in model.every_site:
            hooks.callback(site.watch(partial(note, site.name)).remove)
        model.forward(model.prepare([example_for(model)]))
    return shapes


def _lines(view: Model, tower: Tower, shapes: dict[str, str]) -> list[str]:
    where = f"{len(tower.blocks)} blocks at" if tower.blocks else "at"
    kinds: dict[str, list[str]] = {}
    for site in tower.sites():
        last = site.name.rpartition(".")[2]
        kinds.setdefault("stream" if last == "embed" or last.isdecimal() else last, []).append(
            site.name
        )
    rows = [
        (site_range([*alike]), shape)
        for names in kinds.values()
        for shape, alike in groupby(names, lambda name: shapes.get(name, "did not run"))
    ]
    wide = max(_NARROWEST, *(len(names) for names, _ in rows))
    lines = [
        f"\n{tower.name}: {where} {tower.path!r}; tokens: {_tokens(view, tower)}",
        f"{'site':{wide}}{'tokens x width':>18}   default pool",
        *(f"{names:{wide}}{shape:>18}   {tower.default_pool}" for names, shape in rows),
    ]
    if tower.blocks:
        lines += [
            f"no .{branch}: the blocks have no module that returns that branch"
            for branch in ("attn", "mlp")
            if branch not in tower.branches
        ]
    return lines


def _tokens(view: Model, tower: Tower) -> str:
    """Say what the tokens of a tower are; those with places of their own are counted."""
    image = "image and " if view.kind == "image" and tower.image_token is not None else ""
    before, after = (
        [f"{roles.count(r)} {r}" for r in dict.fromkeys(roles)]
        for roles in (tower.prefix, tower.suffix)
    )
    return ", then ".join(
        [part for part in (", ".join(before), image + tower.tokens, *after) if part]
    )


def site_range(names: Sequence[str]) -> str:
    """Name sites that are alike: the first, the last and how many there are."""
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)})"
