"""`doctor`: does geofast read this model rightly? Numerical checks against the model itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from .capture import capture
from .models import DeviceMap, Model, Stage, load
from .models.checkpoint import pinned
from .models.twin import random_twin

Outcome = Literal["pass", "note", "fail", "skip"]
Examples = Sequence[Any]

_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_TEXTS = (
    "Paris",
    "The city of Buenos Aires",
    "What are the latitude and longitude of the city of Reykjavik, in Iceland?",
)
_PLACES = ((48.8584, 2.2945), (-34.6, -58.38), (64.15, -21.94))
_SIZES = ((224, 224), (180, 320), (400, 240))  # height and width: square, wide, tall


@dataclass(frozen=True)
class Check:
    """One check: what came out, and what to do about it."""

    name: str
    outcome: Outcome
    detail: str
    advice: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All checks of a model, by kind of input."""

    model: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return all(check.outcome != "fail" for check in self.checks)

    def __str__(self) -> str:
        wide = max(len(check.name) for check in self.checks)
        lines = [f"{self.model}: {'all is well' if self.ok else 'NOT to be trusted as it is'}"]
        for check in self.checks:
            lines.append(f"  {check.outcome:5} {check.name:{wide}}  {check.detail}")
            if check.advice:
                lines.append(f"  {'':5} {'':{wide}}  -> {check.advice}")
        return "\n".join(lines)


def doctor(
    model: str | Path | nn.Module | Model,
    examples: Examples | None = None,
    *,
    only: Sequence[str] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    device_map: DeviceMap | None = None,
    adapter: str | Path | None = None,
    merge: bool = False,
    trust_remote_code: bool = False,
) -> Diagnosis:
    """Check that what geofast reads in a model is what the model computes.

    Parameters
    ----------
    model
        What `load` takes.
    examples
        Three inputs or more (PIL images or strings); None makes some of different sizes.
    only
        Names of checks; None makes all of them.
    device, dtype, device_map, adapter, merge, trust_remote_code
        What `load` takes.

    Returns
    -------
    Diagnosis
        `ok`, and a table by `str`. Checks: `repeats` (two passes agree), `batch` (a batch gives
        what single inputs give), `padding` (left against right), `hidden_states` (hooks against
        transformers' own), `roles` (an image's tokens against the processor's ids), `dtype` (noise
        against float32), `weights` (unlike a twin with random weights). Differences are relative
        to how far the inputs are apart at the site.

    Raises
    ------
    ValueError, FileNotFoundError, RuntimeError
        As `load`.
    """
    loaded = load(
        model, device=device, dtype=dtype, device_map=device_map, adapter=adapter, merge=merge,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    checks: list[Check] = []
    for view in (loaded, loaded.other):
        if view is not None:
            given = examples if examples is not None and view is loaded else example(view.kind)
            prefix = f"{view.kind}: " if loaded.other else ""
            checks += [
                replace(check(view, given), name=prefix + name)
                for name, check in _CHECKS.items()
                if only is None or name in only
            ]
    return Diagnosis(loaded.name, tuple(checks))


def example(kind: str) -> list[Any]:
    """Return three inputs of `kind` and of different sizes."""
    if kind == "text":
        return list(_TEXTS)
    if kind == "location":
        return list(_PLACES)
    import numpy as np
    from PIL import Image

    images = []
    for i, (height, width) in enumerate(_SIZES):
        y, x = np.mgrid[:height, :width]
        waves = [128 + 127 * np.sin(x / (7 + 5 * c + 3 * i) + y * (c + i) / 40) for c in range(3)]
        images.append(Image.fromarray(np.stack(waves, -1).astype(np.uint8)))
    return images


def quick(model: Model, prepared: Examples, *, batched: bool = True) -> list[Check]:
    """Make the checks that a probe cannot do without, on inputs that are transformed already."""
    model = replace(model, transform=None, stop=None)
    names = ("repeats", "batch") if batched else ("repeats",)
    return [replace(_CHECKS[name](model, prepared), name=name) for name in names]


# ------ what is compared


def _rows(model: Model, inputs: Examples) -> dict[str, torch.Tensor]:
    """Rows of the default pools, and of the mean over all tokens, which no mistake escapes."""
    pools = {t.name: [t.default_pool, "mean"] for t in model.towers}
    with capture(model, pool=pools) as rows:
        model.forward(model.prepare(inputs), lambda i: setattr(rows, "label", str(i)))
    return dict(rows)


def _difference(
    rows: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> tuple[str, float]:
    """Return the key of the largest difference, relative to the spread of the inputs, and that."""
    worst, where = 0.0, next(iter(expected))
    for key, x in expected.items():
        spread = (x - x.mean(0)).norm(dim=1).mean()
        least = 0.1 * x.norm(dim=1).mean()  # inputs may be much the same
        off = float((rows[key] - x).norm(dim=1).max() / torch.maximum(spread, least))
        if not off <= worst:  # NaN too
            worst, where = off, key
    return where, worst


def _judge(model: Model, where: str, off: float, advice: str) -> Check:
    fine = off <= _TOLERANCE.get(model.dtype, 1e-4)
    detail = f"largest difference {off:.1e} of the inputs' spread, at {where}"
    return Check("", "pass" if fine else "fail", detail, "" if fine else advice)


# ------ the checks


def _repeats(model: Model, examples: Examples) -> Check:
    where, off = _difference(_rows(model, examples), _rows(model, examples))
    advice = "something in the model is random, as masking or dropout is: switch it off"
    return _judge(model, where, off, advice)


def _batch(model: Model, examples: Examples) -> Check:
    alone = [_rows(model, [one]) for one in examples]
    single = {key: torch.cat([rows[key] for rows in alone]) for key in alone[0]}
    where, off = _difference(_rows(model, examples), single)
    advice = "padding or batching changes the result: use batch_size=1"
    return _judge(model, where, off, advice)


def _padding(model: Model, examples: Examples) -> Check:
    if model.kind != "text":
        return Check("", "skip", "for texts")
    batch = model.prepare(examples)
    if "attention_mask" not in batch:
        return Check("", "skip", "the model reads its padding, always on the right")
    left = _to_the_left(batch)
    rows = []
    for given in (left, batch):
        pools = {t.name: [t.default_pool, "mean"] for t in model.towers}
        with capture(model, pool=pools) as one:
            model.forward(given)
        rows.append(dict(one))
    where, off = _difference(*rows)
    check = _judge(model, where, off, "")
    if check.outcome == "pass":
        return check
    detail = f"{check.detail}; geofast pads on the right, where texts stand as they do alone"
    return Check("", "note", detail)


def _to_the_left(batch: Mapping[str, Any]) -> dict[str, Any]:
    mask = batch["attention_mask"]
    order = mask.argsort(dim=1, stable=True)  # padding first
    moved = {k: v.gather(1, order) for k, v in batch.items() if v.shape == mask.shape}
    return {**batch, **moved}


def _hidden_states(model: Model, examples: Examples) -> Check:
    batch = model.prepare(examples)
    notes: list[str] = []
    for stage, given in _calls(model, batch):
        states = _states(stage, given)
        for tower in stage.towers:
            if not tower.blocks:
                continue
            if states is None or len(states) != 1 + len(tower.blocks):
                notes.append(f"{tower.name}: the model gives none of its own")
                continue
            mine = _raw(stage, given, [f"{tower.name}.embed", f"{tower.name}.layers.*"])
            wrong = [
                name
                for (name, x), y in zip(mine.items(), states, strict=True)
                if x.shape != y.shape or not torch.allclose(x, y, rtol=1e-4, atol=1e-5)
            ]
            if wrong == [f"{tower.name}.layers.{len(tower.blocks) - 1}"]:
                notes.append(f"{wrong[0]}: theirs is after the final norm, geofast's before it")
            elif wrong:
                detail = f"{len(wrong)} of {len(mine)} sites differ, the first {wrong[0]}"
                return Check("", "fail", detail, "the hooks read another place: report this model")
    return Check("", "note" if notes else "pass", "; ".join(notes) or "every site is the same")


def _calls(model: Model, batch: Mapping[str, Any]) -> list[tuple[Stage, dict[str, Any]]]:
    if "prompts" not in batch:
        return [(model.stages[0], dict(batch))]
    image = {k: v for k, v in batch["image"].items() if k != "tiles"}
    look, talk = model.stages
    return [(look, batch["image"]), (talk, {**image, **batch["prompts"][0]})]


@torch.inference_mode()
def _states(stage: Stage, given: Mapping[str, Any]) -> Sequence[torch.Tensor] | None:
    try:
        out = stage.body(**given, output_hidden_states=True, return_dict=True)
    except TypeError:  # not a model of transformers
        return None
    states: Sequence[torch.Tensor] | None = getattr(out, "hidden_states", None)
    return states


@torch.inference_mode()
def _raw(stage: Stage, given: Mapping[str, Any], patterns: list[str]) -> dict[str, torch.Tensor]:
    from .models import match_sites

    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[[torch.Tensor], None]:
        return lambda hidden: seen.update({name: hidden})

    with ExitStack() as hooks:
        for site in match_sites(stage.towers, patterns):
            hooks.callback(site.watch(keep(site.name)).remove)
        stage.body(**given)
    return seen


def _roles(model: Model, examples: Examples) -> Check:
    tower = model.towers[-1]
    if tower.image_token is None or model.kind != "image":
        prefix = ", ".join(tower.prefix) or "none"
        return Check("", "skip", f"no image among text; before the {tower.tokens} tokens: {prefix}")
    batch = model.prepare(examples)
    ids = batch["prompts"][0]["input_ids"]
    image = ids == tower.image_token
    seen: list[torch.Tensor] = []
    watch = model.sites(f"{tower.name}.embed")[0].watch(seen.append)
    model.forward(batch)
    watch.remove()
    with capture(model, f"{tower.name}.embed", {tower.name: "mean:image"}) as rows:
        model.forward(batch)
    expected = torch.stack(
        [h[i].float().mean(0).cpu() for h, i in zip(seen[0], image, strict=True)]
    )
    where, off = _difference(dict(rows), {f"{tower.name}.embed/mean:image": expected})
    check = _judge(model, where, off, "tokens of images are taken for others: report this model")
    counts = ", ".join(map(str, image.sum(1).tolist()))
    return replace(check, detail=f"{counts} image tokens in the examples; {check.detail}")


def _dtype(model: Model, examples: Examples) -> Check:
    if model.dtype == torch.float32:
        return Check("", "skip", "float32 is what it runs in")
    if why := pinned(model.module):
        return Check("", "skip", why)
    import copy

    exact = copy.deepcopy(model)
    exact.module.float()
    where, off = _difference(_rows(model, examples), _rows(exact, examples))
    return _judge(model, where, off, "too coarse: load the model with dtype=torch.float32")


def _weights(model: Model, examples: Examples) -> Check:
    try:
        twin = random_twin(model)
    except ValueError as error:
        return Check("", "skip", str(error))
    pairs = zip(model.module.parameters(), twin.module.parameters(), strict=True)
    matrices = [(a.float().std(), b.float().std()) for a, b in pairs if a.ndim > 1]
    trained = sum(bool(abs(a - b) > 0.05 * b) for a, b in matrices)
    detail = f"{trained} of {len(matrices)} matrices are spread unlike those of a random twin"
    if trained >= 0.2 * len(matrices):
        return Check("", "pass", detail)
    return Check("", "fail", detail, "nobody has trained this model: load its weights")


_CHECKS: dict[str, Callable[[Model, Examples], Check]] = {
    "repeats": _repeats,
    "batch": _batch,
    "padding": _padding,
    "hidden_states": _hidden_states,
    "roles": _roles,
    "dtype": _dtype,
    "weights": _weights,
}
