"""The study's own procedure: the ablation of Locatelli et al. (ICML 2026), faults included.

One order of the dimensions serves all targets and folds: by |coef| of latitude in the fold with the
best held-out R2. Both of its faults are kept: the order has seen the held-out parts, since their R2
chose the fold and the other folds hold out rows it was trained on; and longitude gets latitude's.
Each share is refit for each target on its own, with scikit-learn's RidgeCV (dimension_ablation.py
of the study's code), which takes the alpha of least leave-one-out error. Leaving one out needs the
rows; from statistics alone generalised cross-validation stands in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..ridge.scores import fold_r2, scores_on
from ..ridge.solution import Solution, least
from ..ridge.solve import cross_validate
from ..ridge.training import Training, subset
from .nested import Room, refits_by_gcv


def by_leave_one_out(
    x: torch.Tensor,
    y: torch.Tensor,
    fold: torch.Tensor,
    alphas: Sequence[float],
    sizes: torch.Tensor,
    latitude: int,
) -> torch.Tensor:
    """Held-out R2 of the refits, every alpha by exact leave-one-out: float64 [F, P, k].

    Parameters
    ----------
    x, y, fold
        Rows [n, d], float64 targets [n, k] and the fold, int64 [n], that holds each row out.
    alphas
        Penalties to choose from.
    sizes
        int64 [P]: how many dimensions to keep.
    latitude
        Number of the target that orders the dimensions.
    """
    order, r2 = _order(cross_validate(x, y, fold, alphas), latitude), list[torch.Tensor]()
    grid, folds = torch.tensor(alphas, dtype=torch.float64)[:, None], int(fold.max()) + 1
    for size in sizes.tolist():
        some, held = x[:, order[:size]].double(), torch.empty_like(y)
        for f in range(folds):
            train = fold != f
            held[~train] = _predict(some[train], y[train], grid, some[~train])
        r2.append(fold_r2(held, y, fold, folds)[0])
    return torch.stack(r2, 1)


def _predict(
    x: torch.Tensor, y: torch.Tensor, alphas: torch.Tensor, others: torch.Tensor
) -> torch.Tensor:
    """Fit each target at its alpha, one of `alphas` [A, 1], and predict it for others: [m, k].

    From the eigenvectors of X'X, or of X X' with fewer rows than features, for all targets at once:
    the search of `ridge.loo` would come again for each of them.
    """
    n, mean, y_mean = len(x), x.mean(0), y.mean(0)
    x, y = x - mean, y - y_mean
    wide = n <= x.shape[1]
    values, vectors = torch.linalg.eigh(x @ x.mT if wide else x.mT @ x)
    inverse = 1 / (values.clamp_min(0) + alphas)  # [A, values]
    rotated = vectors if wide else x @ vectors
    sums = rotated.mT @ y
    # The errors of X X' are alpha times its solution, without a difference of near numbers.
    error = torch.einsum("nv,avk->ank", rotated, inverse[..., None] * sums)
    free = inverse @ rotated.square().mT
    if wide:
        error, free = alphas[..., None] * error, alphas * free - 1 / n
    else:
        error, free = y - error, 1 - 1 / n - free
    best = least((error / free.clamp_min(1e-12)[..., None]).square().mean(1).mT)  # [k]
    w = vectors @ (inverse[best].mT * sums)
    predicted: torch.Tensor = (others - mean) @ (x.mT @ w if wide else w) + y_mean
    return predicted


def by_gcv(
    train: Training,
    held: torch.Tensor,
    solved: Solution,
    alphas: Sequence[float],
    sizes: torch.Tensor,
    latitude: int,
    room: Room,
) -> torch.Tensor:
    """As `by_leave_one_out`, by generalised cross-validation from statistics.

    `train` are the training sets of one layer, `held` [F, p, p] what each leaves out, and `solved`
    its solution on all dimensions.
    """
    order, r2 = _order(solved, latitude)[None], list[torch.Tensor]()
    grid = torch.tensor(alphas, dtype=torch.float64)
    for f in range(len(train)):
        one = subset(train, slice(f, f + 1))
        w = refits_by_gcv(one, grid, order, sizes, room)
        r2.append(scores_on(held[f : f + 1], one, w[None])[0][0])
    return torch.stack(r2)


def _order(solved: Solution, latitude: int) -> torch.Tensor:
    """Order [d] by |coef| of latitude in the fold with the best held-out R2, mean of targets."""
    assert solved.r2 is not None
    best = int(solved.r2.mean(1).nan_to_num(-math.inf).argmax())
    return solved.coef[best, :, latitude].abs().argsort(descending=True, stable=True)
