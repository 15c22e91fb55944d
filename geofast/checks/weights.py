"""The noise of a coarser dtype, and weights against those that nobody trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..models import Model
from ..models.hub import said
from ..models.reach import reaching
from ..models.twin import random_twin
from .compare import Check, Given, judge, r2_of

_NOISE = 0.01  # of R2: what a coarser dtype may move it by
_TRAINED = 0.2  # of a tower's matrices, unlike those that nobody trained
_NAMED = 4  # of what nobody has trained
_SEED = 1736251  # of the twin; none that people draw their own weights with


def check_dtype(model: Model, given: Given) -> Check:
    if given.float32 is None:
        return Check("", "skip", given.without)
    fine, advice = given.float32.r2, "too coarse: load the model with dtype=torch.float32 (--dtype)"
    if given.known is None or fine is None:
        advice += ", or give data (--data) to see what that does to R²"
        return judge(model, given.float32.noise, advice)
    coarse = r2_of(model, given.known)
    moved = {key: abs(coarse[key][0] - fine[key][0]) for key in fine}
    # What is less than the folds differ by is nothing that a probe would tell.
    matters = any(moved[key] > max(_NOISE, se) for key, (_, se) in fine.items())
    most = max(moved, key=lambda key: moved[key])
    detail = (
        f"{judge(model, given.float32.noise, '').detail}; R² of {len(given.known.inputs)} samples "
        f"moves by at most {moved[most]:.4f}, at {most}, where its standard error is "
        f"{fine[most][1]:.4f}"
    )
    return Check("", "fail" if matters else "pass", detail, advice if matters else "")


def check_weights(model: Model, given: Given) -> Check:
    try:
        found = _matrices(model)
        twin = random_twin(model) if given.known is not None else None
    except (ValueError, torch.OutOfMemoryError) as error:
        return Check("", "skip", said(error))
    counts, untrained = [], []
    inside: set[int] = set()
    for tower in model.towers:
        of_blocks = {id(p) for block in tower.blocks for p in block.parameters()}
        matrices = [m.trained for m in found.values() if id(m.parameter) in of_blocks]
        inside |= of_blocks
        if matrices:
            counts.append(f"{sum(matrices)} of {len(matrices)} in {tower.name}")
        if sum(matrices) < _TRAINED * len(matrices):
            untrained.append(tower.name)
    # Of embeddings, projectors and joint heads each one counts: what comes after it is noise.
    around = {
        name: m.parameter
        for name, m in found.items()
        if m.drawn and not m.trained and id(m.parameter) not in inside
    }
    untrained += reaching(model, given.examples[:1], around)
    detail = f"matrices unlike those of a random twin: {', '.join(counts)}"
    if given.known is not None and twin is not None:
        mine, random = r2_of(model, given.known), r2_of(twin, given.known)
        best = max(mine, key=lambda key: mine[key])
        detail += f"; R² at {best} {mine[best][0]:.3f}, of the twin {random[best][0]:.3f}"
    if not untrained:
        return Check("", "pass", detail)
    named = untrained[:_NAMED] + [f"{n} more" for n in [len(untrained) - _NAMED] if n > 0]
    return Check("", "fail", detail, f"nobody has trained {' and '.join(named)}: load weights")


@dataclass(frozen=True)
class _Matrix:
    parameter: torch.Tensor
    trained: bool
    """Whether it is unlike that of a random twin."""
    drawn: bool
    """Whether the twin's is another: positions of sines and cosines are the same in both."""


def _matrices(model: Model) -> dict[str, _Matrix]:
    twins = dict(random_twin(model, _SEED).module.named_parameters())
    return {
        name: _Matrix(p, _unlike_random(p, twins[name]), not torch.equal(p, twins[name]))
        for name, p in model.module.named_parameters()
        if p.squeeze().ndim > 1
    }


def _unlike_random(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether numbers are spread otherwise, have other tails, or rows of other lengths.

    Of GeoCLIP's finest capsule, training left the spread within 3 %, and the fourth moment, 1.8 of
    the uniform numbers that it began with, is 2.0 to 2.2. By chance, that moment of n normal
    numbers differs by sqrt(24 / n), and the spread of m lengths by 1 / sqrt(m).
    """
    (spread, tails, lengths), (its_spread, its_tails, its_lengths) = map(_moments, (a, b))
    return (
        abs(spread - its_spread) > 0.05 * its_spread
        or abs(tails - its_tails) > max(0.1, 6 * (24 / a.numel()) ** 0.5)
        or abs(lengths - its_lengths) > 6 * its_lengths / len(a.squeeze()) ** 0.5
    )


def _moments(x: torch.Tensor) -> tuple[float, float, float]:
    """Return the spread, the fourth moment relative to it, and the spread of the rows' lengths."""
    x = x.detach().float().squeeze()
    spread = x.std()
    lengths = x.flatten(1).norm(dim=1).std()
    return float(spread), float(((x - x.mean()) / spread).pow(4).mean()), float(lengths)
