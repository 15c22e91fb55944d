"""What a check is given, and how rows are compared."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from ..capture import capture
from ..models import Model
from ..models.checkpoint import pinned
from ..models.hub import said
from ..ridge import cross_validate
from ..rows import Rows

Outcome = Literal["pass", "note", "fail", "skip"]

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
SAME = TOLERANCE[torch.float32]
_NOISY = 2.0  # times the noise of a coarser dtype: two passes that should agree may be so far apart
_BATCH = 8


@dataclass(frozen=True)
class Check:
    """One check: what came out, and what to do about it."""

    name: str
    outcome: Outcome
    detail: str
    advice: str = ""


@dataclass(frozen=True)
class Known:
    """Samples with places, to tell differences in R2."""

    inputs: list[Any]
    """Transformed already."""
    places: torch.Tensor
    """float64 [n, 2]."""
    fold: torch.Tensor
    """int64 [n]."""


@dataclass(frozen=True)
class Float32:
    """What a copy of the model in float32 tells of a coarser dtype. Differences are by key."""

    noise: dict[str, float]
    """How far single inputs are from it, in the model's own dtype."""
    batch: dict[str, float]
    """How far a batch is from single inputs, in float32."""
    r2: dict[str, tuple[float, float]] | None
    """As `r2_of`; None without data."""


@dataclass(frozen=True)
class Given:
    """What a model is examined with."""

    examples: Sequence[Any]
    known: Known | None = None
    sites: str | Sequence[str] | None = None
    """Where two passes and batches are compared; None for every layer."""
    float32: Float32 | None = None
    without: str = "nothing was computed in float32"
    """Why there is no `float32`."""

    @property
    def noise(self) -> dict[str, float] | None:
        """What the dtype alone does, by key; None where nobody has measured it."""
        return None if self.float32 is None else self.float32.noise


def pools_of(model: Model) -> dict[str, list[str]]:
    """The default pools, and the mean over all tokens, which no mistake escapes."""
    return {t.name: [t.default_pool, "mean"] for t in model.towers}


def exact_rows() -> Rows:
    """Rows in float64: pooled in float32, they would add a noise of their own."""
    return Rows(dtype=torch.float64)


def read_rows(
    model: Model, inputs: Sequence[Any], sites: str | Sequence[str] | None = None
) -> dict[str, torch.Tensor]:
    with capture(model, sites, pools_of(model), rows=exact_rows()) as rows:
        model.forward(model.prepare(inputs), lambda i: setattr(rows, "label", str(i)))
    return dict(rows)


def read_one_by_one(
    model: Model, inputs: Sequence[Any], sites: str | Sequence[str] | None = None
) -> dict[str, torch.Tensor]:
    alone = [read_rows(model, [one], sites) for one in inputs]
    return {key: torch.cat([rows[key] for rows in alone]) for key in alone[0]}


def differences(
    rows: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """Return the largest difference at every key, relative to the spread of the inputs."""
    found = {}
    for key, x in expected.items():
        spread = (x - x.mean(0)).norm(dim=1).mean()
        least = 0.1 * x.norm(dim=1).mean()  # inputs may be much the same
        off = (rows[key] - x).norm(dim=1).max()
        found[key] = float(off / torch.maximum(spread, least)) if off else 0.0
    return found


def judge(
    model: Model, off: Mapping[str, float], advice: str, noise: Mapping[str, float] | None = None
) -> Check:
    """Judge differences, by the noise of the model's dtype where that is known."""
    limit = dict.fromkeys(off, TOLERANCE.get(model.dtype, SAME))
    if noise is not None:
        limit = {key: max(SAME, _NOISY * noise[key]) for key in off}
    where = max(off, key=lambda key: off[key] / limit[key])
    detail = "no difference"
    if any(off.values()):
        detail = f"off by {off[where]:.1e} of the inputs' spread at most, at {where}"
        if noise is not None:
            narrow = str(model.dtype).removeprefix("torch.")
            detail += f", where {narrow} alone makes {noise[where]:.1e}"
    fine = off[where] <= limit[where]
    return Check("", "pass" if fine else "fail", detail, "" if fine else advice)


def with_float32(model: Model, given: Given) -> Given:
    """Add what a copy of `model` in float32 tells of its dtype, or why there is none."""
    if model.dtype == torch.float32:
        return replace(given, without="float32 is what it runs in")
    if why := pinned(model.module):
        return replace(given, without=why)
    try:
        exact = copy.deepcopy(model)
        exact.module.float()
        alone = read_one_by_one(exact, given.examples, given.sites)
        noise = differences(read_one_by_one(model, given.examples, given.sites), alone)
        batch = differences(read_rows(exact, given.examples, given.sites), alone)
        r2 = None if given.known is None else r2_of(exact, given.known)
    except RuntimeError as error:  # no memory for it, or no kernel
        return replace(given, without=f"a copy in float32 cannot be run: {said(error)}")
    return replace(given, float32=Float32(noise, batch, r2))


def r2_of(model: Model, known: Known) -> dict[str, tuple[float, float]]:
    """Held-out R2 of every site, and its standard error over folds; below 0 is as good as 0."""
    model = replace(model, transform=None)
    with capture(model) as rows:
        for start in range(0, len(known.inputs), _BATCH):
            model.forward(model.prepare(known.inputs[start : start + _BATCH]))
    found = {}
    for key, x in rows.items():
        r2 = cross_validate(x, known.places, known.fold).r2
        assert r2 is not None
        by_fold = r2.mean(1).clamp_min(0)
        found[key] = float(by_fold.mean()), float(by_fold.std() / len(by_fold) ** 0.5)
    return found
