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

import math

import numpy as np
import torch
from numpy.typing import NDArray

from ..ridge.factor import Factor
from ..ridge.training import NotPositiveError
from .nested import Room

Array = NDArray[np.float64]

RANKINGS = ("coef", "coef_std", "forward", "backward")
_BLOCK = 64  # pivots between two products of matrices
_TINY = float(np.finfo(np.float64).tiny)


def orders(
    ranking: str,
    matrix: torch.Tensor,
    b: torch.Tensor,
    alpha: torch.Tensor,
    coef: torch.Tensor,
    room: Room,
) -> torch.Tensor:
    """Rank the dimensions of a training set for every target: int64 [k, d], best first.

    Parameters
    ----------
    ranking
        One of `RANKINGS`.
    matrix
        float64 [d, d]: A + alpha I, symmetric.
    b
        float64 [k, d].
    alpha
        float64, a single number.
    coef
        float64 [k, d]: the solutions on all dimensions.
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
        variance = matrix.diagonal() - alpha
        return _descending(coef.abs() * variance.clamp_min(0).sqrt())
    if ranking == "forward":
        return torch.stack([pivots(matrix, one, room, least=False) for one in b])
    factor, info = Factor.of(room.copy(matrix)[None])
    if info.any():
        raise NotPositiveError([0])
    inverse = torch.cholesky_inverse(factor.lower[0])
    return torch.stack([pivots(inverse, one, room, least=True) for one in coef]).flip(1)


def random_orders(d: int, draws: int, seed: int) -> list[torch.Tensor]:
    """Draw orders of d dimensions: int64 [d] each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(d, generator=generator) for _ in range(draws)]


def _descending(score: torch.Tensor) -> torch.Tensor:
    return score.argsort(dim=-1, descending=True, stable=True)


def pivots(s: torch.Tensor, r: torch.Tensor, room: Room, *, least: bool) -> torch.Tensor:
    """Eliminate dimension after dimension, by the most (or least) r_i^2 / S_ii: int64 [d].

    Parameters
    ----------
    s
        float64 [d, d], symmetric positive definite. After each step it stands for its Schur
        complement, and r for r - S_i r_i / S_ii. Of A + alpha I and b, r_i^2 / S_ii is what adding
        i takes off J; of (A + alpha I)^-1 and the solution, what leaving i out adds to it.
    r
        float64 [d].
    room
        Memory to work in.
    least
        Take the least instead of the most.
    """
    d = len(r)
    found, left = np.empty(d, np.int64), np.arange(d)
    values, diagonal = r.numpy().copy(), s.diagonal().numpy().copy()
    for start in range(0, d, _BLOCK):
        columns = torch.empty(min(_BLOCK, d - start), len(left), dtype=torch.float64)
        here = _eliminate(s, values, diagonal, columns, least=least)
        found[start : start + len(here)] = left[here]
        # The blocked update is one product of matrices, of what is left alone.
        stay = np.delete(np.arange(len(left)), here)
        left, values, diagonal = left[stay], values[stay], diagonal[stay]
        at = torch.from_numpy(stay)
        columns = columns[:, at]
        s = room.taken(s, at[None])[0].addmm_(columns.mT, columns, alpha=-1)
    return torch.from_numpy(found)


def _eliminate(
    s: torch.Tensor, r: Array, diagonal: Array, columns: torch.Tensor, *, least: bool
) -> NDArray[np.int64]:
    """Choose a pivot for every one of the columns [w, d], and fill those: int64 [w].

    `r` and `diagonal` are brought up to date, `s` is not.
    """
    width, d = columns.shape
    here, score, scratch = np.empty(width, np.int64), np.empty(d), np.empty(d)
    lines = columns.numpy()
    # No pivot may be taken twice: the worst score there is.
    worst = np.inf if least else -np.inf
    for j in range(width):
        np.maximum(diagonal, _TINY, out=scratch)
        np.divide(np.square(r, out=score), scratch, out=score)
        score[here[:j]] = worst
        here[j] = i = int(score.argmin() if least else score.argmax())
        before, line = columns[:j], lines[j]
        torch.addmv(s[i], before.mT, before[:, i], alpha=-1, out=columns[j])
        pivot = 1 / math.sqrt(max(line[i], _TINY))
        line *= pivot
        r -= np.multiply(line, r[i] * pivot, out=scratch)
        diagonal -= np.square(line, out=scratch)
    return here
