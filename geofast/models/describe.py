"""The sites of a model, in lines that people read."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from .model import Model
from .structure import Tower


def describe(model: Model) -> str:
    """List the sites with shape, token roles and default pool, from one example run.

    Towers for inputs of the other kind follow, where the model has two.
    """
    lines = [f"{model.name}: {model.kind} in, {str(model.dtype).removeprefix('torch.')}"]
    lines += model.notes
    listed: set[str] = set()
    for view in (model, model.other):
        if view is None or {t.name for t in view.towers} <= listed:
            continue
        shapes = _shapes(view)
        for tower in view.towers:
            lines += _lines(tower, shapes)
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
        model.forward(model.prepare([_example(model.kind)]))
    return shapes


def _lines(tower: Tower, shapes: dict[str, str]) -> list[str]:
    prefix = [f"{tower.prefix.count(r)} {r}" for r in dict.fromkeys(tower.prefix)]
    roles = ", ".join([*prefix, f"then {tower.tokens}" if prefix else tower.tokens])
    lines = [
        f"\n{tower.name}: {len(tower.blocks)} blocks at {tower.path!r}; tokens: {roles}",
        f"{'site':28}{'tokens x width':>18}   default pool",
    ]
    for site in tower.sites():
        shape = shapes.get(site.name, "did not run")
        lines.append(f"{site.name:28}{shape:>18}   {tower.default_pool}")
    if tower.blocks:
        lines += [
            f"no .{branch}: the blocks have no module that returns that branch"
            for branch in ("attn", "mlp")
            if branch not in tower.branches
        ]
    return lines


def _example(kind: str) -> Any:
    if kind == "text":
        return "Paris"
    if kind == "location":
        return (48.8584, 2.2945)
    from PIL import Image

    return Image.new("RGB", (224, 224), "grey")
