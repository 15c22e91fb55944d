"""The penalty of least exact leave-one-out error."""

from __future__ import annotations

import itertools

import torch

from .. import _ops
from .gcv import Walk
from .refine import refine, training_errors
from .training import Training, TrainingRows, subset


def select_loo(
    train: Training, alphas: torch.Tensor, rows: TrainingRows, start: Walk
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Walk from the minimum of GCV to that of the exact leave-one-out error.

    Returns the index of its alpha [M] and, refined there, w [M, k, d] and projections [n, M, k].
    """
    best, last = start.pole, len(alphas) - 1
    curve = torch.full((len(best), len(alphas)), torch.inf, dtype=torch.float64)
    solutions: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
    while True:
        # The minimum and its neighbours must all be known.
        near = {(a, i) for i, b in enumerate(best.tolist()) for a in (b - 1, b, b + 1)}
        unknown = [(a, i) for a, i in near if 0 <= a <= last and torch.isinf(curve[i, a])]
        if not unknown:
            found = [solutions[a, i] for i, a in enumerate(best.tolist())]
            return best, torch.stack([w for w, _ in found]), torch.stack([p for _, p in found], 1)

        def factored(key: tuple[int, int]) -> tuple[int, bool]:
            return key[0], int(start.pole[key[1]]) == key[0]

        for (a, known), group in itertools.groupby(sorted(unknown, key=factored), factored):
            sets = torch.tensor(sorted(i for _, i in group))
            alpha = alphas[a].repeat(len(sets))
            part = subset(train, sets)
            if known:
                factor = start.factor if part is train else start.factor[sets]
            else:
                factor = part.factor(part.stats.held, alpha, start.factor.dtype)
            curve[sets, a], w, projected = _loo(part, rows, sets, factor, alpha)
            for j, i in enumerate(sets.tolist()):
                solutions[a, i] = w[j], projected[:, j]
        best = curve.argmin(1)


def _loo(
    part: Training,
    rows: TrainingRows,
    sets: torch.Tensor,
    factor: torch.Tensor,
    alpha: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean squared leave-one-out error over rows and targets [m], with w and projections.

    `part` holds the training `sets` [m] of all; `factor` [m, d, d] and `alpha` [m] are theirs.
    """
    ops = _ops.backend(factor.device)
    training = rows.training[:, sets]
    w, projected = refine(part, factor, alpha, rows, sets)
    assert projected is not None
    error = training_errors(part, rows, projected, training)
    out = torch.empty(len(sets), dtype=torch.float64)
    centers = part.stats.shift[: part.dim] + part.mean
    for j in range(len(sets)):
        who = training[:, j].nonzero()[:, 0]
        leverage = torch.empty(len(who), dtype=torch.float64)
        ops.leverage(factor[j], rows.x, centers[j], who, leverage)
        free = 1.0 - leverage - 1.0 / part.n[j]
        out[j] = (error[who, j] / free[:, None]).square().mean()
    return out, w, projected
