"""Which parameters a forward pass reads: those that can change what a site is."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from .model import Model


def reaching(model: Model, inputs: Sequence[Any], tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of those parameters that reach a site of `model`.

    NaN is put in their place, spreads to all that is computed from them, and is taken out again. A
    pooler, a mask token or a language model's head leave every site as it is.

    Parameters
    ----------
    model
        From `load`.
    inputs
        What a pass is made over: one if none of `tensors` reaches a site, else one for each too.
    tensors
        Parameters and buffers of the model, by name. What is not there to be changed counts as
        read: because it is quantised, or kept elsewhere and its module runs before the last site.
    """
    fixed = {name for name, t in tensors.items() if t.is_meta or not t.is_floating_point()}
    rest = {name: t for name, t in tensors.items() if name not in fixed}
    if any(tensors[name].is_meta for name in fixed):
        late = _not_run(model, inputs)
        fixed -= {
            name for name in fixed if tensors[name].is_meta and name.rpartition(".")[0] in late
        }
    if rest and _spoilt(model, inputs, rest.values()):
        before = _spoilt(model, inputs, ())
        fixed |= {name for name, t in rest.items() if _spoilt(model, inputs, [t]) - before}
    return [name for name in tensors if name in fixed]


def _not_run(model: Model, inputs: Sequence[Any]) -> set[str]:
    """Return the modules that have not run when the last site is met.

    What is kept elsewhere is fetched when its own module runs, and only then.
    """
    modules = dict(model.module.named_modules())
    ran: set[str] = set()
    before: set[str] = set()

    def meet(_hidden: torch.Tensor) -> None:
        before.update(ran)

    def run(name: str, *_: Any) -> None:
        ran.add(name)

    with ExitStack() as hooks:
        for site in model.every_site:
            hooks.callback(site.watch(meet).remove)
        for name, module in modules.items():
            hooks.callback(module.register_forward_pre_hook(partial(run, name)).remove)
        model.forward(model.prepare(inputs))
    return {*modules} - before


def _spoilt(model: Model, inputs: Sequence[Any], tensors: Collection[torch.Tensor]) -> set[str]:
    """Return the sites that are NaN somewhere while `tensors` are."""
    found: set[str] = set()

    def look(name: str, hidden: torch.Tensor) -> None:
        if bool(hidden.isnan().any()):
            found.add(name)

    with _nan(tensors), ExitStack() as hooks:
        for site in model.every_site:
            hooks.callback(site.watch(partial(look, site.name)).remove)
        try:
            model.forward(model.prepare(inputs))
        except (ValueError, RuntimeError, IndexError):
            if not tensors:
                raise
            return {site.name for site in model.every_site}  # NaN got so far that it cannot go on
    return found


@contextmanager
def _nan(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    kept = [(t, t.detach().clone()) for t in tensors]
    with torch.no_grad():
        for t, _ in kept:
            t.fill_(torch.nan)
    try:
        yield
    finally:
        with torch.no_grad():
            for t, was in kept:
                t.copy_(was)
