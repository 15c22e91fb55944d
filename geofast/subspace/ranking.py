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

import torch

from ..ridge.training import NotPositiveError, Training
from .nested import taken

RANKINGS = ("coef", "coef_std", "forward", "backward")
_BLOCK = 64  # pivots between two products of matrices


def orders(
    ranking: str, train: Training, matrix: torch.Tensor, alpha: torch.Tensor, coef: torch.Tensor
) -> torch.Tensor:
    """Rank the dimensions of every training set for every target: int64 [M, k, d], best first.

    Parameters
    ----------
    ranking
        One of `RANKINGS`.
    matrix
        float64 [M, d, d]: A + alpha I, symmetric.
    alpha
        float64 [M].
    coef
        float64 [M, k, d]: the solutions on all dimensions.

    Raises
    ------
    NotPositiveError
        When A + alpha I is not positive definite in float64.
    """
    if ranking == "coef":
        return _descending(coef.abs())
    if ranking == "coef_std":
        variance = matrix.diagonal(dim1=1, dim2=2) - alpha[:, None]
        return _descending(coef.abs() * variance.clamp_min(0).sqrt()[:, None])
    (m, k, d), b = coef.shape, train.b
    if ranking == "backward":
        factor, info = torch.linalg.cholesky_ex(matrix)
        if info.any():
            raise NotPositiveError(info.nonzero()[:, 0].tolist())
        matrix = torch.cholesky_inverse(factor)
        b = coef
    found = pivots(matrix.repeat_interleave(k, 0), b.reshape(m * k, d), least=ranking == "backward")
    return (found.flip(1) if ranking == "backward" else found).view(m, k, d)


def random_orders(d: int, draws: int, seed: int) -> list[torch.Tensor]:
    """Draw orders of d dimensions: int64 [d] each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(d, generator=generator) for _ in range(draws)]


def _descending(score: torch.Tensor) -> torch.Tensor:
    return score.argsort(dim=-1, descending=True, stable=True)


def pivots(s: torch.Tensor, r: torch.Tensor, *, least: bool) -> torch.Tensor:
    """Eliminate dimension after dimension, by the most (or least) r_i^2 / S_ii: int64 [M, d].

    Parameters
    ----------
    s
        float64 [M, d, d], symmetric positive definite. After each step it stands for its Schur
        complement, and r for r - S_i r_i / S_ii. Of A + alpha I and b, r_i^2 / S_ii is what adding
        i takes off J; of (A + alpha I)^-1 and the solution, what leaving i out adds to it.
    r
        float64 [M, d].
    least
        Take the least instead of the most.
    """
    m, d = r.shape
    every, found = torch.arange(m), torch.empty(m, d, dtype=torch.int64)
    left, r, diagonal = torch.arange(d).repeat(m, 1), r.clone(), s.diagonal(dim1=1, dim2=2).clone()
    # No pivot may be taken twice: the worst score there is.
    worst = torch.inf if least else -torch.inf
    tiny = torch.finfo(torch.float64).tiny
    for start in range(0, d, _BLOCK):
        width = min(_BLOCK, d - start)
        columns = s.new_zeros(m, width, d - start)
        done = torch.zeros(m, d - start, dtype=torch.bool)
        for j in range(width):
            score = r.square() / diagonal.clamp_min(tiny)
            score.masked_fill_(done, worst)
            i = score.argmin(1) if least else score.argmax(1)
            column = s[every, i]
            if j:
                before = columns[:, :j]
                column = column - (before[every, :, i][:, None] @ before)[:, 0]
            pivot = column[every, i].clamp_min(tiny).rsqrt()[:, None]
            column = column * pivot
            columns[:, j] = column
            r -= column * (r[every, i][:, None] * pivot)
            diagonal -= column.square()
            done[every, i] = True
            found[:, start + j] = left[every, i]
        # The blocked update is one product of matrices, of what is left alone.
        stay = (~done).nonzero()[:, 1].view(m, -1)
        left, r, diagonal = (t.gather(1, stay) for t in (left, r, diagonal))
        columns = columns.gather(2, stay[:, None].expand(-1, width, -1))
        s = taken(s, stay[:, None]).baddbmm_(columns.mT, columns, alpha=-1)
    return found
