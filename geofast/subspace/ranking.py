"""Orders of the dimensions, best first, each from the statistics of a training set alone.

With A = X'X and b = X'y about the training mean, and the ridge objective
|y - X w|^2 + alpha |w|^2, let J(S) be its minimum over the dimensions S.

- `coef`: by |coef| of the solution on all dimensions;
- `coef_std`: by |coef| times the standard deviation of the feature, which no scale changes;
- `forward`: greedy: the dimension that lowers J most comes next (orthogonal least squares; Chen,
  Billings and Luo, International Journal of Control 1989), by a Cholesky factorisation of
  A + alpha I that chooses its pivots;
- `backward`: the dimension whose loss raises J least leaves next (Couvreur and Bresler, SIAM
  Journal on Matrix Analysis and Applications 2000), by the same factorisation of (A + alpha I)^-1.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ..ridge.factor import Factor
from ..ridge.training import NotPositiveError, Training
from .nested import Room

Array = NDArray[np.float64]

RANKINGS = ("coef", "coef_std", "forward", "backward")
_BLOCK = 64  # pivots between two products of matrices
_TINY = float(np.finfo(np.float64).tiny)


def orders(
    ranking: str,
    train: Training,
    matrices: torch.Tensor,
    alpha: torch.Tensor,
    coef: torch.Tensor,
    room: Room,
) -> torch.Tensor:
    """Rank the dimensions of every training set for every target: int64 [m, k, d], best first.

    Parameters
    ----------
    ranking
        One of `RANKINGS`.
    matrices
        float64 [m, d, d]: A + alpha I, symmetric.
    alpha
        float64 [m].
    coef
        float64 [m, k, d]: the solutions on all dimensions.
    room
        Memory to work in.

    Raises
    ------
    NotPositiveError
        When A + alpha I is not positive definite in float64.
    """
    if ranking == "coef":
        return _descending(coef.abs())
    if ranking == "coef_std":
        variance = matrices.diagonal(dim1=1, dim2=2) - alpha[:, None]
        return _descending(coef.abs() * variance.clamp_min(0).sqrt()[:, None])
    if ranking == "forward":
        return pivots(matrices, train.b, room, least=False)
    factor, info = Factor.of(room.copy(matrices))
    if info.any():
        raise NotPositiveError(info.nonzero()[:, 0].tolist())
    return pivots(torch.cholesky_inverse(factor.lower), coef, room, least=True).flip(2)


def random_orders(d: int, draws: int, seed: int) -> list[torch.Tensor]:
    """Draw orders of d dimensions: int64 [d] each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(d, generator=generator) for _ in range(draws)]


def _descending(score: torch.Tensor) -> torch.Tensor:
    return score.argsort(dim=-1, descending=True, stable=True)


def pivots(s: torch.Tensor, r: torch.Tensor, room: Room, *, least: bool) -> torch.Tensor:
    """Eliminate dimension after dimension, by the most (or least) r_i^2 / S_ii: int64 [m, k, d].

    Parameters
    ----------
    s
        float64 [m, d, d], symmetric positive definite. After each step it stands for its Schur
        complement, and r for r - S_i r_i / S_ii. Of A + alpha I and b, r_i^2 / S_ii is what adding
        i takes off J; of (A + alpha I)^-1 and the solution, what leaving i out adds to it.
    r
        float64 [m, k, d].
    room
        Memory to work in.
    least
        Take the least instead of the most.
    """
    m, k, d = r.shape
    sums = r.flatten(0, 1).numpy().copy()
    diagonal = s.diagonal(dim1=1, dim2=2).repeat_interleave(k, 0).numpy()
    found = np.empty((m * k, d), np.int64)
    left = np.tile(np.arange(d), (m * k, 1))
    for start in range(0, d, _BLOCK):
        columns = torch.empty(m * k, min(_BLOCK, d - start), d - start, dtype=torch.float64)
        here = _eliminate(s, sums, diagonal, columns, least=least)
        found[:, start : start + here.shape[1]] = np.take_along_axis(left, here, 1)
        # The blocked update is one product of matrices, of what is left alone.
        stays = np.ones(left.shape, bool)
        np.put_along_axis(stays, here, False, 1)
        stay = stays.nonzero()[1].reshape(m * k, -1)
        left, sums, diagonal = (np.take_along_axis(t, stay, 1) for t in (left, sums, diagonal))
        at = torch.from_numpy(stay)
        columns = columns.gather(2, at[:, None].expand(-1, columns.shape[1], -1))
        s = room.taken(s, at).baddbmm_(columns.mT, columns, alpha=-1)
    return torch.from_numpy(found).view(m, k, d)


def _eliminate(
    s: torch.Tensor, r: Array, diagonal: Array, columns: torch.Tensor, *, least: bool
) -> NDArray[np.int64]:
    """Choose a pivot for every one of the columns [g, w, d], and fill those: int64 [g, w].

    Each matrix of `s` [m, d, d] serves g / m of the sums `r` [g, d]. `r` and `diagonal` are brought
    up to date, `s` is not. NumPy does the small steps: it begins one in a fifth of torch's time.
    """
    (g, width, d), lines = columns.shape, columns.numpy()
    here, score, scratch = np.empty((g, width), np.int64), np.empty((g, d)), np.empty((g, d))
    every, matrix, rows = np.arange(g), np.arange(g) * len(s) // g, s.numpy()
    # No pivot may be taken twice: the worst score there is.
    worst = np.inf if least else -np.inf
    for j in range(width):
        np.maximum(diagonal, _TINY, out=scratch)
        np.divide(np.square(r, out=score), scratch, out=score)
        score[every[:, None], here[:, :j]] = worst
        here[:, j] = i = score.argmin(1) if least else score.argmax(1)
        line = lines[:, j]
        line[:] = rows[matrix, i]
        if j:
            weight = torch.from_numpy(lines[every, :j, i])
            column = columns[:, j : j + 1]
            column.baddbmm_(weight[:, None], columns[:, :j], alpha=-1)
        pivot = 1 / np.sqrt(np.maximum(line[every, i], _TINY))
        line *= pivot[:, None]
        r -= np.multiply(line, (r[every, i] * pivot)[:, None], out=scratch)
        diagonal -= np.square(line, out=scratch)
    return here
