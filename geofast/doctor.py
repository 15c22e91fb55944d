"""`doctor`: does geofast read this model rightly? Numerical checks against the model itself."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .batching import Lengths
from .checks import CHECKS, OF_DTYPE, Check, Given, Known, with_float32
from .data import SampleError, Samples, read
from .data.stream import batches
from .geo.folds import KFold
from .models import DeviceMap, Model, load
from .models.example import examples_of
from .models.location import of_places

_WIDTH = 100  # of a terminal
_FEW = 3  # samples that are examined
_MOST = 200  # samples in which R2 is told
_LEAST = 20


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
        wide = max((len(check.name) for check in self.checks), default=0)
        lines = [f"{self.model}: {'all is well' if self.ok else 'NOT to be trusted as it is'}"]
        for check in self.checks:
            lines += _told(f"  {check.outcome:5} {check.name:{wide}}  ", check.detail)
            if check.advice:
                lines += _told(f"  {'':5} {'':{wide}}  -> ", check.advice)
        return "\n".join(lines)


def _told(before: str, words: str) -> list[str]:
    return textwrap.wrap(
        words, _WIDTH, initial_indent=before, subsequent_indent=" " * len(before),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def doctor(
    model: str | Path | nn.Module | Model,
    examples: Sequence[Any] | None = None,
    *,
    data: str | Path | Samples | None = None,
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
        Three inputs or more (PIL images or strings) of different sizes; None takes the first of
        `data`, or else makes some.
    data
        What `data.read` takes, or `Samples`: at most 200 of them, evenly chosen, tell how far the
        dtype moves R2, and the R2 of a twin with random weights.
    only
        Names of checks; None makes all of them.
    device, dtype, device_map, adapter, merge, trust_remote_code
        What `load` takes.

    Returns
    -------
    Diagnosis
        `ok`, and a table by `str`. Checks: `repeats` (two passes agree), `batch` (a batch gives
        what single inputs give), `padding` (left and right against none), `hidden_states` (hooks
        against transformers' own; a look at the image and a call for the prompt against one call
        for both), `roles` (tokens against what they depend on, and against the processor's ids,
        grids and masks), `dtype` (noise against float32), `weights` (unlike a twin with random
        weights: most matrices of every tower, and all around the blocks). Differences are relative
        to how far the inputs are apart at the site; those of a dtype coarser than float32 may be
        twice what it does to single inputs, where memory has room for a copy in float32, and 2 %
        (float16) or 10 % (bfloat16) elsewhere.

    Raises
    ------
    ValueError
        For a check that there is not, or data of another kind or too few of them.
    FileNotFoundError, RuntimeError
        As `load` and `data.read`.
    """
    if unknown := [name for name in only or () if name not in CHECKS]:
        raise ValueError(f"there is no check {unknown[0]!r}; there are {', '.join(CHECKS)}")
    samples = read(data, location=of_places(model)) if isinstance(data, str | Path) else data
    loaded = load(
        model, device=device, dtype=dtype, device_map=device_map, adapter=adapter, merge=merge,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if samples is not None:
        samples = samples.as_locations() if loaded.kind == "location" else samples
        loaded.reading(samples.kind)
    checks: list[Check] = []
    for view in (loaded, loaded.other):
        if view is not None:
            view = view.asking(view.prompts[:1]) if view.prompts else view
            given = _given(view, examples if view.kind == loaded.kind else None, samples)
            if only is None or {*only} & OF_DTYPE:
                given = with_float32(view, given)
            prefix = f"{view.kind}: " if loaded.other else ""
            checks += [
                replace(check(view, given), name=prefix + name)
                for name, check in CHECKS.items()
                if only is None or name in only
            ]
    return Diagnosis(loaded.name, tuple(checks))


def quick(
    model: Model,
    prepared: Sequence[Any],
    sites: str | Sequence[str] | None = None,
    *,
    batched: bool = True,
) -> list[Check]:
    """Make the checks that a probe cannot do without, on inputs that are transformed already.

    A model in a dtype coarser than float32 is first held against what is usual of that dtype: a
    copy in float32 would take the time and the memory of loading it again. It is made where the
    model does not pass, which then fails by the noise that was measured, as with `doctor`.
    """
    given = Given(prepared, sites=sites)
    names = ("repeats", "batch") if batched else ("repeats",)
    model = replace(model, transform=None)
    checks = [replace(CHECKS[name](model, given), name=name) for name in names]
    if all(check.outcome == "pass" for check in checks):
        return checks
    measured = with_float32(model, given)
    if measured.float32 is None:
        return checks
    return [replace(CHECKS[name](model, measured), name=name) for name in names]


def examine(
    model: Model,
    inputs: Mapping[str, Samples],
    lengths: Mapping[str, Lengths],
    sites: str | Sequence[str] | None,
    *,
    batched: bool,
) -> tuple[list[Check], list[str]]:
    """Make the quick checks on a few samples of a probe, at the sites that it will read.

    Of texts these are the longest, the shortest and the first in all the prompts' words; of other
    samples the first three that can be read.

    Returns
    -------
    list of Check
        All passed.
    list of str
        A warning where they could not be made: what is wrong with a sample, the pass itself says.

    Raises
    ------
    ValueError
        When the model fails one.
    """
    few = _texts(model, inputs, lengths) if lengths else _first(model, inputs)
    try:
        checks = quick(model, few, sites, batched=batched and len(few) > 1)
    except (ValueError, RuntimeError, MemoryError, FloatingPointError) as error:
        return [], [f"the quick checks of the model could not be made: {error}"]
    for check in checks:
        if check.outcome == "fail":
            raise ValueError(
                f"{model.name} fails the check {check.name!r}: {check.detail}; {check.advice}. "
                "`geofast doctor` examines the whole model; check=False (--unchecked) goes on"
            )
    return checks, []


def _texts(
    model: Model, inputs: Mapping[str, Samples], lengths: Mapping[str, Lengths]
) -> list[Any]:
    texts = [text for samples in inputs.values() for text in samples.inputs]
    tokens = np.concatenate([lengths[label].expected for label in inputs])
    few = [texts[i] for i in (tokens.argmax(), tokens.argmin(), 0)]
    return [model.transform(text) for text in few] if model.transform else few


def _first(model: Model, inputs: Mapping[str, Samples]) -> list[Any]:
    samples = next(iter(inputs.values()))
    few: list[Any] = []
    stream = batches(samples, range(len(samples)), 1, transform=model.transform)
    for batch in stream:
        few += batch.inputs
        if len(few) == _FEW:
            break
    stream.close()
    return few


def _given(view: Model, examples: Sequence[Any] | None, samples: Samples | None) -> Given:
    if samples is None or samples.kind != view.kind:
        return Given(examples_of(view.kind) if examples is None else examples)
    chosen = np.unique(np.linspace(0, len(samples) - 1, _MOST).round().astype(int))
    first: list[Any] = []
    inputs, good = [], []
    for i in chosen.tolist():
        try:
            item = samples.load(i)
            ready = view.transform(item) if view.transform else item
            view.collate([ready])
        except (SampleError, ValueError):  # a probe counts it as skipped, and says why
            continue
        first += [item] if len(first) < _FEW else []
        inputs.append(ready)
        good.append(i)
    if len(inputs) < _LEAST:
        msg = f"{len(inputs)} samples of {samples.source} can be used; R² needs {_LEAST} or more"
        raise ValueError(msg)
    table = samples.table.iloc[good].reset_index(drop=True)
    places = torch.from_numpy(table[["latitude", "longitude"]].to_numpy(np.float64, copy=True))
    known = Known(inputs, places, torch.from_numpy(KFold().assign(table)))
    return Given(first if examples is None else examples, known)
