"""Ridge regression of every fold and alpha at once, from sufficient statistics and rows.

Notation, for one training set: A = X'X and b = X'Y about the training mean, n rows, d features.
The penalty alpha is chosen among `alphas`, one for all targets together, by

- `gcv`: Golub's generalised cross-validation, n RSS / (n - 1 - df)^2 (Golub, Heath and Wahba,
  Technometrics 1979), from the statistics alone;
- `loo`: exact leave-one-out errors, what scikit-learn's RidgeCV minimises; needs the rows;
- `folds`: inner folds, from the statistics alone; the right one for grouped and spatial folds.

One Cholesky factor of A + pI in float32 gives the whole GCV curve of a training set: Lanczos steps
on (A + pI)^-1 are Gauss quadrature for b'(A + aI)^-1 b, for its derivative and, started from random
signs, for the trace in df (Golub and Meurant, Matrices, Moments and Quadrature, 2010). The pole p
moves to the minimum of its own curve, where the quadrature is exact, so the factor that is left
over is the one that the solution needs. Solutions are refined against the float64 residual of the
rows themselves (or of the float64 statistics), so their error does not depend on the factor's
precision; where float32 fails, float64 is used and the result says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from . import _ops
from .gram import Gram, Totals, totals

ALPHAS = tuple(float(a) for a in torch.logspace(-1, 4, 12, dtype=torch.float64))
"""The study's penalties: 12, from 0.1 to 10,000, evenly in logarithm."""

Select = Literal["gcv", "loo", "folds"]

_STEPS = 10  # Lanczos steps: a neighbouring alpha is exact to 1e-8, one three decades off to 10 %
_PROBES = 6  # random sign vectors for the trace
_TIE = (
    1e-3  # curves closer than this (relative, plus 4 standard errors) are decided by exact traces
)
_REFINED = (
    1e-17  # refine until what is left has this share of the solution's energy (error squared)
)
_ROUNDS = 20
_WIDE_ROWS = 1000  # up to here X X' takes a moment whatever the width


@dataclass(frozen=True)
class Solution:
    """Ridge solutions of F training sets; tensors are float64.

    Held-out scores are there when there was something to hold out.
    """

    alpha: torch.Tensor
    """[F]: the penalty chosen for each training set."""
    coef: torch.Tensor
    """[F, d, k]."""
    intercept: torch.Tensor
    """[F, k]."""
    r2: torch.Tensor | None
    """[F, k]: R2 on the held-out part, about its own mean; NaN where a target is constant."""
    mse: torch.Tensor | None
    """[F, k]: mean squared error on the held-out part."""
    predictions: torch.Tensor | None
    """[n, k]: held-out predictions in the order of the rows; only when rows were given."""
    inner_r2: torch.Tensor | None
    """[F, k]: mean R2 on the inner folds of each training set, at its alpha; when asked for."""
    method: str
    """What ran, in words: selection and precision."""


def solve(
    gram: Gram,
    alphas: Sequence[float] = ALPHAS,
    *,
    folds: torch.Tensor | None = None,
    select: Literal["gcv", "folds"] = "gcv",
    inner: bool = False,
) -> Solution:
    """Solve all folds from statistics; no rows are needed.

    Parameters
    ----------
    gram
        Statistics by cell, accumulated with `products="float64"` for exact results.
    alphas
        Penalties to choose from, all positive.
    folds
        int64 [cells]: the fold of each cell; None makes every cell a fold. A Gram of one cell is
        fitted whole, and nothing is held out.
    select
        How alpha is chosen; `folds` needs at least three folds.
    inner
        Also score each training set on its inner folds (`Solution.inner_r2`).

    Raises
    ------
    ValueError
        For an empty Gram, a fold without rows, alphas that are not positive, or a target that is
        constant over a whole training set.
    """
    stats = totals(gram, folds)
    whole = len(stats.held) == 1
    if whole:
        stats = Totals(stats.total, torch.zeros_like(stats.held), stats.shift)
    return _solve_statistics(
        stats, gram.targets, alphas, select, inner and not whole, scored=not whole
    )


def cross_validate(
    x: torch.Tensor,
    y: torch.Tensor,
    fold: torch.Tensor,
    alphas: Sequence[float] = ALPHAS,
    *,
    select: Select = "loo",
    inner: bool = False,
) -> Solution:
    """Solve all folds from rows, with held-out predictions.

    Parameters
    ----------
    x
        [n, d] rows: float32, float16, bfloat16 or float64.
    y
        [n, k] targets.
    fold
        int64 [n]: the fold that holds each row out.
    alphas, select, inner
        As for `solve`; `loo` is exact leave-one-out inside each training part.

    Raises
    ------
    ValueError
        As `solve`.
    """
    n_folds = int(fold.max()) + 1
    if int(torch.bincount(fold, minlength=n_folds).max()) == len(x):
        raise ValueError("every row is in the same fold: nothing is left to train on")
    rows = _Rows(x, y.double(), fold, n_folds)
    if rows.are_wide:
        return _solve_wide(rows, alphas, select, inner)
    return _solve_rows(rows, y.shape[1], alphas, select, inner, scored=True)


def fit(
    x: torch.Tensor, y: torch.Tensor, alphas: Sequence[float] = ALPHAS, *, select: Select = "loo"
) -> Solution:
    """Fit all rows, nothing held out: F = 1, no scores. Parameters as for `cross_validate`."""
    if select == "folds":
        raise ValueError("select='folds' needs folds: use cross_validate")
    rows = _Rows(x, y.double(), torch.full((len(x),), -1), 1)
    if rows.are_wide:
        return replace(
            _solve_wide(rows, alphas, select, False), r2=None, mse=None, predictions=None
        )
    found = _solve_rows(rows, y.shape[1], alphas, select, False, scored=False)
    return replace(found, predictions=None)


def fold_errors(
    x: torch.Tensor, y: torch.Tensor, fold: torch.Tensor, alphas: Sequence[float] = ALPHAS
) -> torch.Tensor:
    """Held-out mean squared error of every fold and alpha, over targets: float64 [F, A].

    Parameters as for `cross_validate`; alphas in the order given.
    """
    grid, folds = torch.as_tensor(alphas, dtype=torch.float64), int(fold.max()) + 1
    rows = _Rows(x, y.double(), fold, folds)
    out = torch.empty(folds, len(grid), dtype=torch.float64)
    if rows.are_wide:
        for f in range(folds):
            out[f] = _wide_scores(x.double(), rows, fold != f, fold == f, grid)[1].mean(-1)
        return out
    stats = totals(Gram(x.shape[1], y.shape[1], folds).update(x, y, fold))
    for f in range(folds):
        one = _training(replace(stats, held=stats.held[f : f + 1]), y.shape[1])
        out[f] = _scores_on(stats.held[f], one, _path(one, grid))[1].mean(-1)
    return out


# ------ one training set after another: the statistics about its mean


@dataclass(frozen=True)
class _Training:
    """Statistics of M training sets about their own means, all float64."""

    stats: Totals
    n: torch.Tensor  # [M]
    mean: torch.Tensor  # [M, d]
    y_mean: torch.Tensor  # [M, k]
    b: torch.Tensor  # [M, k, d]
    yy: torch.Tensor  # [M, k]

    @property
    def dim(self) -> int:
        return self.mean.shape[1]

    def factor(self, held: torch.Tensor, alpha: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Cholesky factors of A + alpha I, lower, [M, d, d]; raises _NotPositiveError."""
        ops = _ops.backend(held.device)
        a = torch.empty(len(held), self.dim, self.dim, dtype=dtype)
        ops.training_matrix(self.stats.total, held, alpha, a)
        info = torch.zeros(len(held), dtype=torch.int32)
        ops.cholesky(a, info)
        if info.any():
            raise _NotPositiveError
        return a


class _NotPositiveError(Exception):
    """A + alpha I is not positive definite in the precision at hand."""


def _training(stats: Totals, k: int) -> _Training:
    d = stats.total.shape[0] - 1 - k
    # The row of the ones and the rows of the targets are whole in the lower triangle.
    part = stats.total[d:] - stats.held[:, d:]
    n, sums = part[:, 0, d], part[:, 0, :d]
    y_sums = part[:, 1:, d]
    mean, y_mean = sums / n[:, None], y_sums / n[:, None]
    b = part[:, 1:, :d] - y_sums[..., None] * mean[:, None]
    yy = part[:, 1:, d + 1 :].diagonal(dim1=1, dim2=2) - y_sums * y_mean
    if bool((n < 2).any()):
        raise ValueError("a training part has fewer than two rows; use fewer folds or more samples")
    constant = yy <= 1e-14 * (
        part[:, 1:, d + 1 :].diagonal(dim1=1, dim2=2) + n[:, None] * stats.shift[d:] ** 2
    )
    _refuse_constant(constant.any(0))
    return _Training(stats, n, mean, y_mean, b, yy)


def _refuse_constant(constant: torch.Tensor) -> None:
    if bool(constant.any()):
        msg = (
            f"target {int(constant.nonzero()[0])} is constant over a training part: there is "
            "nothing to regress; leave it out"
        )
        raise ValueError(msg)


@dataclass(frozen=True)
class _Rows:
    """The rows themselves: float64 residuals, leave-one-out and held-out predictions."""

    x: torch.Tensor
    y: torch.Tensor
    fold: torch.Tensor
    folds: int

    @property
    def training(self) -> torch.Tensor:
        """Bool [n, F]: who trains for which fold."""
        return self.fold[:, None] != torch.arange(self.folds)

    @property
    def are_wide(self) -> bool:
        """Whether X X' is the cheaper way: its eigenvectors cost as much as 40 factors of X'X."""
        n, d = int(self.training.sum(0).min()), self.x.shape[1]
        return n < d and (n <= _WIDE_ROWS or 3 * n < d)


def _solve_rows(
    rows: _Rows, k: int, alphas: Sequence[float], select: str, inner: bool, *, scored: bool
) -> Solution:
    # The rows correct what float32 products do to the Gram; inner folds are scored on it alone.
    precise = inner or select == "folds"
    tries = (("float64" if precise else "float32", torch.float32), ("float64", torch.float64))
    for products, dtype in tries:
        gram = Gram(rows.x.shape[1], k, rows.folds, products=products)
        gram.update(rows.x, rows.y, rows.fold.clamp_min(0))
        stats = totals(gram)
        if not scored:
            stats = replace(stats, held=torch.zeros_like(stats.held))
        try:
            return _solve_in(dtype, _training(stats, k), _grid(alphas), select, rows, inner, scored)
        except _NotPositiveError:
            continue
    raise ValueError(_not_positive(alphas))


def _solve_statistics(
    stats: Totals, k: int, alphas: Sequence[float], select: str, inner: bool, *, scored: bool
) -> Solution:
    train = _training(stats, k)
    for dtype in (torch.float32, torch.float64):
        try:
            return _solve_in(dtype, train, _grid(alphas), select, None, inner, scored)
        except _NotPositiveError:
            continue
    raise ValueError(_not_positive(alphas))


def _grid(alphas: Sequence[float]) -> torch.Tensor:
    grid = torch.as_tensor(alphas, dtype=torch.float64).sort().values
    if not len(grid) or bool((grid <= 0).any()):
        raise ValueError(f"alphas must be positive; got {list(alphas)}")
    return grid


def _not_positive(alphas: Sequence[float]) -> str:
    return (
        f"X'X + {min(alphas)} I is not positive definite in float64: the features are too badly "
        "scaled for so small a penalty; raise the smallest alpha"
    )


def _solve_in(
    dtype: torch.dtype,
    train: _Training,
    alphas: torch.Tensor,
    select: str,
    rows: _Rows | None,
    inner: bool,
    scored: bool,
) -> Solution:
    if select == "folds":
        curve, table = _inner_folds(train, alphas)
        chosen = curve.argmin(1)
        factor = train.factor(train.stats.held, alphas[chosen], dtype)
    else:
        chosen, factor = _select_gcv(train, alphas, dtype)
        if select == "loo":
            if rows is None:
                raise ValueError(
                    "select='loo' needs the rows; from statistics use 'gcv' or 'folds'"
                )
            chosen, factor = _select_loo(train, alphas, dtype, rows, chosen, factor)
    alpha = alphas[chosen]
    w, projected = _refine(train, factor, alpha, rows)
    inner_r2 = None
    if inner:
        inner_r2 = (
            table[torch.arange(len(chosen)), chosen]
            if select == "folds"
            else _inner_at(train, alpha)
        )
    d = train.dim
    c, e = train.stats.shift[:d], train.stats.shift[d:]
    intercept = e + train.y_mean - torch.einsum("mkd,md->mk", w, c + train.mean)
    r2 = mse = predictions = None
    if scored and rows is not None and projected is not None:
        predictions, r2, mse = _score_rows(train, rows, projected)
    elif scored:
        r2, mse = _held_out(train, w)
    name = str(dtype).removeprefix("torch.")
    against = "rows" if rows is not None else "statistics"
    method = f"{select}; Cholesky in {name}, refined in float64 against the {against}"
    return Solution(alpha, w.mT, intercept, r2, mse, predictions, inner_r2, method)


# ------ choosing alpha


def _select_gcv(
    train: _Training, alphas: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the index of the alpha of least GCV [M], and the factors there [M, d, d]."""
    pole = torch.full((len(train.n),), len(alphas) // 2)
    if len(pole) > 1:
        # One training set shows where the others' minimum will be: most then need one factor.
        first = slice(1)
        pole[:] = _walk_gcv(_subset(train, first), alphas, dtype, pole[first]).pole
    return _settle_ties(train, alphas, _walk_gcv(train, alphas, dtype, pole))


@dataclass(frozen=True)
class _Walk:
    """Where moving each pole to the minimum of its own curve came to rest."""

    pole: torch.Tensor  # [M]
    factor: torch.Tensor  # [M, d, d], at the pole
    curve: torch.Tensor  # [M, A]
    noise: torch.Tensor  # [M, A]: standard error of curve / curve at the pole


def _walk_gcv(
    train: _Training, alphas: torch.Tensor, dtype: torch.dtype, pole: torch.Tensor
) -> _Walk:
    m, held, pole = len(pole), train.stats.held, pole.clone()
    signs = torch.randint(0, 2, (_PROBES, train.dim), generator=torch.Generator().manual_seed(0))
    signs = (2.0 * signs - 1.0).to(dtype)
    curve = torch.empty(m, len(alphas), dtype=torch.float64)
    noise = torch.empty_like(curve)
    visited = torch.zeros(m, len(alphas), dtype=torch.bool)
    todo = torch.arange(m)
    factor = torch.empty(0)
    while len(todo):
        if len(todo) == m:  # no copy of the largest tensors
            factor = part = train.factor(held, alphas[pole], dtype)
        else:
            factor[todo] = part = train.factor(held[todo], alphas[pole[todo]], dtype)
        start = torch.cat([train.b[todo].to(dtype), signs.expand(len(todo), -1, -1)], 1)
        curve[todo], noise[todo] = _gcv(
            train, todo, alphas, alphas[pole[todo]], _lanczos(part, start)
        )
        visited[todo, pole[todo]] = True
        best = curve[todo].argmin(1)
        moves = ~visited[todo, best]
        todo = todo[moves]
        pole[todo] = best[moves]
    return _Walk(pole, factor, curve, noise)


def _settle_ties(
    train: _Training,
    alphas: torch.Tensor,
    walk: _Walk,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a second alpha is too close for the estimated trace, compare exact ones."""
    pole, factor = walk.pole, walk.factor
    sets = torch.arange(len(pole))
    gap = walk.curve / walk.curve[sets, pole][:, None] - 1.0
    gap[sets, pole] = torch.inf
    rival = gap.argmin(1)
    close = (gap[sets, rival] < _TIE + 4.0 * walk.noise[sets, rival]).nonzero()[:, 0]
    if not len(close):
        return pole, factor
    ops = _ops.backend(factor.device)
    other = train.factor(train.stats.held[close], alphas[rival[close]], factor.dtype)
    exact = []
    for index, at in ((pole[close], factor[close]), (rival[close], other)):
        trace = torch.empty(len(close), dtype=torch.float64)
        ops.inverse_trace(at, trace)
        w = _apply_inverse(at, train.b[close])
        alpha = alphas[index]
        rss = train.yy[close] - (w * train.b[close]).sum(-1) - alpha[:, None] * (w * w).sum(-1)
        exact.append(_gcv_value(train, close, rss, train.dim - alpha * trace))
    better = exact[1] < exact[0]
    pole[close[better]] = rival[close[better]]
    factor[close[better]] = other[better]
    return pole, factor


def _lanczos(factor: torch.Tensor, start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gauss quadrature of (L L')^-1 for each start vector.

    `factor` [M, d, d], `start` [M, r, d]; returns nodes and weights, float64 [M, r, steps]; the
    weights add up to |start|^2. No reorthogonalisation: a repeated node shares its weight.
    """
    ops = _ops.backend(factor.device)
    norm = start.norm(dim=-1, keepdim=True)
    v = start / norm.clamp_min(torch.finfo(start.dtype).tiny)
    before, beta = torch.zeros_like(v), torch.zeros_like(norm)
    t = torch.zeros(*start.shape[:2], _STEPS, _STEPS, dtype=torch.float64)
    for j in range(_STEPS):
        u = v.clone()
        ops.solve_lower(factor, u, False)
        diagonal = u.square().sum(-1, keepdim=True)
        ops.solve_lower(factor, u, True)
        u -= diagonal * v + beta * before
        beta = u.norm(dim=-1, keepdim=True)
        # An invariant subspace ends the recurrence: the rest decouples with no weight.
        beta = torch.where(beta > 1e-6 * diagonal, beta, 0.0)
        before, v = v, torch.where(beta > 0, u / beta.clamp_min(torch.finfo(u.dtype).tiny), 0.0)
        t[..., j, j] = diagonal[..., 0]
        if j + 1 < _STEPS:
            t[..., j + 1, j] = beta[..., 0]
    nodes, vectors = torch.linalg.eigh(t)
    return nodes, vectors[..., 0, :].square() * norm.double().square()


def _gcv(
    train: _Training,
    sets: torch.Tensor,
    alphas: torch.Tensor,
    pole: torch.Tensor,
    quadrature: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """GCV of training `sets` at all alphas, and the standard error of its ratio to the pole's."""
    nodes, weights = (q[:, :, None] for q in quadrature)  # [M, r, 1, steps]
    nodes = nodes.clamp_min(0)
    away = (alphas - pole[:, None])[:, None, :, None]
    inverse = nodes / (1.0 + away * nodes).clamp_min(
        1e-12
    )  # of lambda + alpha, where 1/node = lambda + pole
    first, second = (weights * inverse).sum(-1), (weights * inverse.square()).sum(-1)
    k = train.yy.shape[1]
    rss = train.yy[sets][..., None] - first[:, :k] - alphas * second[:, :k]
    df = train.dim - alphas * first[:, k:]  # [M, probes, A]
    curve = _gcv_value(train, sets, rss, df.mean(1))
    free = torch.log(train.n[sets][:, None, None] - 1.0 - df)
    at = (pole[:, None] - alphas).abs().argmin(1)
    ratio = free - free.take_along_dim(at[:, None, None], 2)
    return curve, 2.0 * ratio.std(1) / _PROBES**0.5


def _gcv_value(
    train: _Training, sets: torch.Tensor, rss: torch.Tensor, df: torch.Tensor
) -> torch.Tensor:
    """Return n RSS / (n - 1 - df)^2, RSS summed over targets; `rss` [M, k, ...], `df` [M, ...]."""
    n = train.n[sets].reshape(-1, *[1] * (df.ndim - 1))
    free = (n - 1.0 - df).clamp_min(1e-9 * n)
    return n * rss.sum(1).clamp_min(0) / free.square()


def _select_loo(
    train: _Training,
    alphas: torch.Tensor,
    dtype: torch.dtype,
    rows: _Rows,
    chosen: torch.Tensor,
    factor: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Walk from GCV's alpha to the minimum of the exact leave-one-out error."""
    m, last = len(chosen), len(alphas) - 1
    curve = torch.full((m, len(alphas)), torch.inf, dtype=torch.float64)
    factors = {(i, int(a)): factor[i] for i, a in enumerate(chosen)}
    training = rows.training
    best = chosen
    while True:
        # The minimum and its neighbours must all be known.
        want = {
            (i, j) for i, a in enumerate(best.tolist()) for j in (a - 1, a, a + 1) if 0 <= j <= last
        }
        unknown = sorted(key for key in want if torch.isinf(curve[key]))
        if not unknown:
            break
        for step in sorted({j for _, j in unknown}):
            sets = torch.tensor([i for i, j in unknown if j == step])
            new = [i for i in sets.tolist() if (i, step) not in factors]
            if new:
                made = train.factor(train.stats.held[new], alphas[step].repeat(len(new)), dtype)
                factors.update({(i, step): made[j] for j, i in enumerate(new)})
            at = torch.stack([factors[i, step] for i in sets.tolist()])
            curve[sets, step] = _loo(train, rows, training, sets, at, alphas[step])
        best = curve.argmin(1)
        keep = {(i, a) for i, a in enumerate(best.tolist())}
        factors = {key: f for key, f in factors.items() if key in keep}
    return best, torch.stack([factors[i, a] for i, a in enumerate(best.tolist())])


def _loo(
    train: _Training,
    rows: _Rows,
    training: torch.Tensor,
    sets: torch.Tensor,
    factor: torch.Tensor,
    alpha: torch.Tensor,
) -> torch.Tensor:
    """Mean squared leave-one-out error of each training set, over rows and targets: [M]."""
    ops = _ops.backend(factor.device)
    part = _subset(train, sets)
    _, projected = _refine(part, factor, alpha.repeat(len(sets)), rows, sets)
    assert projected is not None
    error = _errors(part, rows, projected, training[:, sets])
    out = torch.empty(len(sets), dtype=torch.float64)
    for j, i in enumerate(sets.tolist()):
        who = training[:, i].nonzero()[:, 0]
        leverage = torch.empty(len(who), dtype=torch.float64)
        center = train.stats.shift[: train.dim] + train.mean[i]
        ops.leverage(factor[j], rows.x, center, who, leverage)
        free = 1.0 - leverage - 1.0 / train.n[i]
        out[j] = (error[who, j] / free[:, None]).square().mean()
    return out


def _inner_folds(train: _Training, alphas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Score every alpha on the inner folds of every training set.

    Returns the mean squared error, summed over targets, [F, A], and the mean R2 [F, A, k]. The
    training set without folds i and j serves twice: fold j inside i, and fold i inside j.
    """
    held = train.stats.held
    folds, k = len(held), train.yy.shape[1]
    if folds < 3:
        raise ValueError("select='folds' needs three folds or more")
    mse = torch.zeros(folds, len(alphas), dtype=torch.float64)
    r2 = torch.zeros(folds, len(alphas), k, dtype=torch.float64)
    for i in range(folds):
        for j in range(i):
            pair = _training(replace(train.stats, held=(held[i] + held[j])[None]), k)
            w = _path(pair, alphas)
            for outer, part in ((i, j), (j, i)):
                score, error = _scores_on(held[part], pair, w)
                mse[outer] += error.sum(-1) / (folds - 1)
                r2[outer] += score / (folds - 1)
    return mse, r2


def _inner_at(train: _Training, alpha: torch.Tensor) -> torch.Tensor:
    """Mean R2 of each training set on its inner folds at its own alpha: [F, k]."""
    held = train.stats.held
    folds, k = len(held), train.yy.shape[1]
    r2 = torch.zeros(folds, k, dtype=torch.float64)
    for i in range(folds):
        for j in range(i):
            pair = _training(replace(train.stats, held=(held[i] + held[j])[None]), k)
            both = alpha[[i, j]].unique()
            w = _path(pair, both)
            for outer, part in ((i, j), (j, i)):
                at = int((both == alpha[outer]).nonzero()[0])
                r2[outer] += _scores_on(held[part], pair, w)[0][at] / (folds - 1)
    return r2


def _path(train: _Training, alphas: torch.Tensor) -> torch.Tensor:
    """Solutions of one training set at every alpha, by one float64 factor each: [A, k, d]."""
    many = train.stats.held.expand(len(alphas), -1, -1).contiguous()
    factor = train.factor(many, alphas, torch.float64)
    return _apply_inverse(factor, train.b.expand(len(alphas), -1, -1))


# ------ solving at the chosen alpha


def _apply_inverse(factor: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(L L')^-1 b for `factor` [M, d, d] and `b` [M, k, d]: float64 [M, k, d]."""
    ops = _ops.backend(factor.device)
    w = b.to(factor.dtype, copy=True, memory_format=torch.contiguous_format)
    ops.solve_lower(factor, w, False)
    ops.solve_lower(factor, w, True)
    return w.double()


def _refine(
    train: _Training,
    factor: torch.Tensor,
    alpha: torch.Tensor,
    rows: _Rows | None,
    sets: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Iterative refinement of (A + alpha I) w = b with float64 residuals.

    Returns w [M, k, d] and, with rows, their projections (x - c) w' [n, M, k]. Raises
    _NotPositiveError when the factor is too poor for the refinement to contract.
    """
    w = torch.zeros_like(train.b)
    projected = None
    residual, energies = train.b, []
    training = None if rows is None else rows.training if sets is None else rows.training[:, sets]
    for _ in range(_ROUNDS):
        step = _apply_inverse(factor, residual)
        w = w + step
        energies.append((step * residual).sum(-1).abs())
        if rows is not None:
            delta = _project(rows.x, train, step)
            projected = delta if projected is None else projected + delta
        if len(energies) > 1 and _settled(energies):
            return w, projected
        if rows is not None and projected is not None and training is not None:
            error = _errors(train, rows, projected, training)
            residual = _project_t(rows.x, train, error) - alpha[:, None, None] * w
        else:
            residual = train.b - _apply_matrix(train, w) - alpha[:, None, None] * w
    raise _NotPositiveError


def _settled(energies: list[torch.Tensor]) -> bool:
    """Whether the next correction would be negligible, at the rate of the last; all [M, k]."""
    first, before, last = energies[0], energies[-2], energies[-1]
    small = last <= _REFINED * first
    if bool((~small & (last > 0.25 * before)).any()):
        raise _NotPositiveError
    return bool((small | (last * (last / before) <= _REFINED * first)).all())


def _project(x: torch.Tensor, train: _Training, w: torch.Tensor) -> torch.Tensor:
    m, k, d = w.shape
    out = torch.empty(len(x), m * k, dtype=torch.float64)
    _ops.backend(x.device).project(x, train.stats.shift[:d], w.reshape(m * k, d), out)
    return out.view(len(x), m, k)


def _project_t(x: torch.Tensor, train: _Training, error: torch.Tensor) -> torch.Tensor:
    n, m, k = error.shape
    d = train.dim
    out = torch.empty(m * k, d, dtype=torch.float64)
    _ops.backend(x.device).project_t(x, train.stats.shift[:d], error.reshape(n, m * k), out)
    return out.view(m, k, d)


def _errors(
    train: _Training, rows: _Rows, projected: torch.Tensor, training: torch.Tensor
) -> torch.Tensor:
    """Training errors y - prediction [n, M, k], zero where a row does not train."""
    error = _predict(train, rows, projected, training).neg_().add_(rows.y[:, None])
    return error.mul_(training[..., None])


def _predict(
    train: _Training, rows: _Rows, projected: torch.Tensor, training: torch.Tensor
) -> torch.Tensor:
    # Centred by the rows' own training mean, so that it is exact whatever the statistics' error.
    count = training.sum(0).to(projected.dtype)
    weight = training.to(projected.dtype) / count
    center = torch.einsum("nm,nmk->mk", weight, projected) - weight.mT @ rows.y
    return projected - center


def _score_rows(
    train: _Training, rows: _Rows, projected: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Held-out predictions [n, k], R2 and MSE [F, k]."""
    everyone = _predict(train, rows, projected, rows.training)
    held = everyone[torch.arange(len(rows.x)), rows.fold]
    r2, mse = fold_r2(held, rows.y, rows.fold, rows.folds)
    return held, r2, mse


def fold_r2(
    predicted: torch.Tensor, y: torch.Tensor, fold: torch.Tensor, folds: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """R2 and mean squared error of held-out predictions: [F, k] each, from [n, k]."""
    member = torch.nn.functional.one_hot(fold, folds).to(torch.float64)
    n = member.sum(0)[:, None]
    mean = member.mT @ y / n
    sse = member.mT @ (y - predicted).square()
    sst = member.mT @ (y - mean[fold]).square()
    return torch.where(sst > 0, 1.0 - sse / sst, torch.nan), sse / n


def _apply_matrix(train: _Training, w: torch.Tensor) -> torch.Tensor:
    """A w for each training set, from the lower triangles: [M, k, d]."""
    d = train.dim
    part = train.stats.total[:d, :d] - train.stats.held[:, :d, :d]
    full = w @ part + w @ part.mT - w * part.diagonal(dim1=1, dim2=2)[:, None]
    return full - train.n[:, None, None] * (w @ train.mean[..., None]) * train.mean[:, None]


def _held_out(train: _Training, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """R2 and MSE of each training set on its own held-out part: [F, k] each."""
    scores = [
        _scores_on(h, _subset(train, slice(i, i + 1)), w[i : i + 1])
        for i, h in enumerate(train.stats.held)
    ]
    return torch.cat([s[0] for s in scores]), torch.cat([s[1] for s in scores])


def _scores_on(
    held: torch.Tensor, train: _Training, w: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """R2 and MSE [A, k] of solutions w [A, k, d] of one training set, on statistics `held` [p, p].

    The error of target t is v'[x, 1, y] with v = (-w, w m - y_mean, 1 at t): its sum of squares is
    the quadratic form v' H v of the held-out Gram.
    """
    a, k, d = w.shape
    v = torch.zeros(a, k, d + 1 + k, dtype=torch.float64)
    v[..., :d] = -w
    v[..., d] = w @ train.mean[0] - train.y_mean[0]
    v[:, range(k), range(d + 1, d + 1 + k)] = 1.0
    sse = 2.0 * ((v @ held) * v).sum(-1) - (v.square() @ held.diagonal())
    n = held[d, d]
    sst = held.diagonal()[d + 1 :] - held[d + 1 :, d].square() / n
    return torch.where(sst > 0, 1.0 - sse / sst, torch.nan), sse / n


def _subset(train: _Training, sets: torch.Tensor | slice) -> _Training:
    fields = {f: getattr(train, f)[sets] for f in ("n", "mean", "y_mean", "b", "yy")}
    return replace(train, stats=replace(train.stats, held=train.stats.held[sets]), **fields)


# ------ fewer rows than features


def _solve_wide(rows: _Rows, alphas: Sequence[float], select: str, inner: bool) -> Solution:
    """Solve through X X' of each training part, in float64, for n < d."""
    grid = _grid(alphas)
    x = rows.x.double()
    alpha, coef, intercept, inner_r2 = [], [], [], []
    for f in range(rows.folds):
        who = rows.training[:, f]
        if select == "folds" or inner:
            curve, table = _wide_inner(x, rows, f, grid)
        path = _WidePath(x[who], rows.y[who])
        best = int((curve if select == "folds" else path.criterion(grid, select)).argmin())
        w = path.coef(grid[best : best + 1])[0]
        alpha.append(grid[best])
        coef.append(w)
        intercept.append(path.y_mean - path.mean @ w)
        if inner:
            inner_r2.append(table[best])
    found = torch.stack(coef)
    r2 = mse = held = None
    if int(rows.fold.min()) >= 0:
        everyone = torch.stack([x @ w + c for w, c in zip(coef, intercept, strict=True)], 1)
        held = everyone[torch.arange(len(x)), rows.fold]
        r2, mse = fold_r2(held, rows.y, rows.fold, rows.folds)
    method = f"{select}; eigenvectors of X X' in float64 (fewer rows than features)"
    stacked = torch.stack(inner_r2) if inner else None
    return Solution(
        torch.stack(alpha), found, torch.stack(intercept), r2, mse, held, stacked, method
    )


class _WidePath:
    """All alphas of one training part from the eigenvectors of its centred X X'."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.mean, self.y_mean = x.mean(0), y.mean(0)
        _refuse_constant((y == y[0]).all(0))
        self.x, self.n = x - self.mean, len(x)
        values, self.vectors = torch.linalg.eigh(self.x @ self.x.mT)
        self.values = values.clamp_min(0)
        self.rotated = self.vectors.mT @ (y - self.y_mean)

    def _dual(self, alphas: torch.Tensor) -> torch.Tensor:
        dual: torch.Tensor = self.vectors @ (
            self.rotated / (self.values + alphas[:, None])[..., None]
        )
        return dual

    def coef(self, alphas: torch.Tensor) -> torch.Tensor:
        """Coefficients at every alpha: [A, d, k]."""
        return self.x.mT @ self._dual(alphas)

    def criterion(self, alphas: torch.Tensor, select: str) -> torch.Tensor:
        """GCV or mean squared leave-one-out error of every alpha: [A]."""
        error = alphas[:, None, None] * self._dual(alphas)
        shrink = alphas[:, None] / (self.values + alphas[:, None])
        if select == "gcv":
            free = (shrink.sum(1) - 1.0).clamp_min(1e-9 * self.n)
            gcv: torch.Tensor = self.n * error.square().sum((1, 2)) / free.square()
            return gcv
        free = shrink @ self.vectors.square().mT - 1.0 / self.n
        loo: torch.Tensor = (error / free.clamp_min(1e-12)[..., None]).square().mean((1, 2))
        return loo


def _wide_inner(
    x: torch.Tensor, rows: _Rows, f: int, alphas: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_inner_folds`, for one training part: [A] and [A, k]."""
    scores = [
        _wide_scores(x, rows, (rows.fold != f) & (rows.fold != j), rows.fold == j, alphas)
        for j in range(rows.folds)
        if j != f
    ]
    r2, mse = (torch.stack(s).mean(0) for s in zip(*scores, strict=True))
    return mse.sum(-1), r2


def _wide_scores(
    x: torch.Tensor, rows: _Rows, train: torch.Tensor, test: torch.Tensor, alphas: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """R2 and MSE [A, k] on rows `test` of fits to rows `train`."""
    path = _WidePath(x[train], rows.y[train])
    predicted = (x[test] - path.mean) @ path.coef(alphas) + path.y_mean
    y = rows.y[test]
    mse = (y - predicted).square().mean(1)
    variance = y.var(0, correction=0)
    return torch.where(variance > 0, 1.0 - mse / variance, torch.nan), mse
