"""The solvers: every fold at once, from statistics or from rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch

from .. import _ops
from ..gram import Gram, Totals, totals
from .gcv import least_gcv, settle_ties
from .inner import inner_at, inner_folds, path
from .loo import select_loo
from .refine import refine
from .scores import score_held_out, score_rows, scores_on
from .solution import ALPHAS, Select, Solution, least, penalties
from .training import NotPositiveError, Training, TrainingRows, is_small, training_sets
from .wide import inner_products, solve_wide, wide_scores


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
    _check_select(select, ("gcv", "folds"))
    stats = totals(gram, folds)
    diagonal = stats.total.diagonal()
    if not bool(diagonal.isfinite().all()):
        column = int((~diagonal.isfinite()).nonzero()[0])
        raise ValueError(f"column {column} of the Gram is not finite: a row held NaN or Inf")
    whole = len(stats.held) == 1
    _check_count(stats.held[:, gram.dim, gram.dim])
    _check_inner(len(stats.held), select, inner and not whole)
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
    _check_select(select, get_args(Select))
    _check_rows(x, y)
    rows = TrainingRows(x, y.double(), fold, _count_folds(fold, len(x)))
    _check_inner(rows.folds, select, inner)
    if rows.are_wide:
        _check_finite(x, "feature")
        return solve_wide(rows, alphas, select, inner)
    return _solve_rows(rows, y.shape[1], alphas, select, inner, scored=True)


def fit(
    x: torch.Tensor, y: torch.Tensor, alphas: Sequence[float] = ALPHAS, *, select: Select = "loo"
) -> Solution:
    """Fit all rows, nothing held out: F = 1, no scores. Parameters as for `cross_validate`."""
    if select == "folds":
        raise ValueError("select='folds' needs folds: use cross_validate")
    _check_select(select, get_args(Select))
    _check_rows(x, y)
    rows = TrainingRows(x, y.double(), torch.full((len(x),), -1), 1)
    if rows.are_wide:
        _check_finite(x, "feature")
        return replace(solve_wide(rows, alphas, select, False), r2=None, mse=None, predictions=None)
    found = _solve_rows(rows, y.shape[1], alphas, select, False, scored=False)
    return replace(found, predictions=None)


def fold_errors(
    x: torch.Tensor, y: torch.Tensor, fold: torch.Tensor, alphas: Sequence[float] = ALPHAS
) -> torch.Tensor:
    """Held-out mean squared error of every fold and alpha, over targets: float64 [F, A].

    Parameters as for `cross_validate`; alphas in the order given.
    """
    _check_rows(x, y)
    grid, folds = torch.as_tensor(alphas, dtype=torch.float64), _count_folds(fold, len(x))
    rows = TrainingRows(x, y.double(), fold, folds)
    out = torch.empty(folds, len(grid), dtype=torch.float64)
    if rows.are_wide:
        kernel = inner_products(x.double())
        for f in range(folds):
            out[f] = wide_scores(kernel, rows.y, fold != f, [fold == f], grid)[0][1].mean(-1)
        return out
    stats = totals(Gram(x.shape[1], y.shape[1], folds).update(x, y, fold))
    for f in range(folds):
        one = training_sets(replace(stats, held=stats.held[f : f + 1]), y.shape[1])
        out[f] = scores_on(stats.held[f], one, path(one, grid))[1].mean(-1)
    return out


def _check_select(select: str, known: tuple[str, ...]) -> None:
    if select not in known:
        raise ValueError(f"select must be one of {known}; got {select!r}")


def _check_rows(x: torch.Tensor, y: torch.Tensor) -> None:
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or not len(x):
        raise ValueError(
            f"expected rows [n, d] and targets [n, k]; got {list(x.shape)} and {list(y.shape)}"
        )
    _check_finite(y, "target")


def _check_finite(table: torch.Tensor, what: str) -> None:
    bad = (~table.isfinite()).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        raise ValueError(
            f"{what} {column} of row {row} is {float(table[row, column])}; leave such rows out"
        )


def _count_folds(fold: torch.Tensor, n: int) -> int:
    if fold.dtype != torch.int64 or fold.shape != (n,) or int(fold.min()) < 0:
        raise ValueError(
            f"fold must be int64 [{n}] and not negative; got {fold.dtype} {list(fold.shape)}"
        )
    count = torch.bincount(fold)
    if len(count) == 1:
        raise ValueError("every row is in the same fold: nothing is left to train on")
    _check_count(count)
    return len(count)


def _check_count(count: torch.Tensor) -> None:
    if bool((count == 0).any()):
        raise ValueError(f"fold {int(count.argmin())} has no rows; number the folds from 0 on")


def _check_inner(folds: int, select: str, inner: bool) -> None:
    if folds < 3 and (inner or select == "folds"):
        raise ValueError(
            f"inner folds, as select='folds' takes them, need three folds or more; got {folds}"
        )


def _solve_rows(
    rows: TrainingRows, k: int, alphas: Sequence[float], select: str, inner: bool, *, scored: bool
) -> Solution:
    # The rows correct what float32 products do to the Gram; inner folds are scored on it alone.
    precise = inner or select == "folds"
    tries = [("float64" if precise else "float32", torch.float32), ("float64", torch.float64)]
    if is_small(rows.x.shape[1]):
        tries = tries[1:]
    for products, dtype in tries:
        p = rows.x.shape[1] + 1 + k
        out = _ops.kept.empty("gram", rows.folds, p, p, dtype=torch.float64)
        gram = Gram(rows.x.shape[1], k, rows.folds, products=products, out=out)
        gram.update(rows.x, rows.y, rows.fold.clamp_min(0))
        if not bool(gram.matrix.diagonal(dim1=1, dim2=2).isfinite().all()):
            _check_finite(rows.x, "feature")  # if all are, only the float32 products overflowed
        stats = totals(gram)
        if not scored:
            stats = replace(stats, held=torch.zeros_like(stats.held))
        try:
            return _solve_in(
                dtype, training_sets(stats, k), penalties(alphas), select, rows, inner, scored
            )
        except NotPositiveError:
            continue
    raise ValueError(_not_positive(alphas))


def _solve_statistics(
    stats: Totals, k: int, alphas: Sequence[float], select: str, inner: bool, *, scored: bool
) -> Solution:
    train = training_sets(stats, k)
    for dtype in (torch.float32, torch.float64)[is_small(train.dim) :]:
        try:
            return _solve_in(dtype, train, penalties(alphas), select, None, inner, scored)
        except NotPositiveError:
            continue
    raise ValueError(_not_positive(alphas))


def _not_positive(alphas: Sequence[float]) -> str:
    return (
        f"X'X + {min(alphas)} I is not positive definite in float64: the features are too badly "
        "scaled for so small a penalty; raise the smallest alpha"
    )


def _solve_in(
    dtype: torch.dtype,
    train: Training,
    alphas: torch.Tensor,
    select: str,
    rows: TrainingRows | None,
    inner: bool,
    scored: bool,
) -> Solution:
    if select == "folds":
        curve, table = inner_folds(train, alphas)
        chosen = least(curve)
        factor = train.factor(alphas[chosen], dtype)
        w, projected = refine(train, factor, alphas[chosen], rows)
    elif select == "gcv":
        chosen, factor = settle_ties(train, alphas, least_gcv(train, alphas, dtype))
        w, projected = refine(train, factor, alphas[chosen], rows)
    else:
        if rows is None:
            raise ValueError("select='loo' needs the rows; from statistics use 'gcv' or 'folds'")
        chosen, w, projected = select_loo(train, alphas, rows, least_gcv(train, alphas, dtype))
    alpha = alphas[chosen]
    inner_r2 = None
    if inner:
        inner_r2 = (
            table[torch.arange(len(chosen)), chosen]
            if select == "folds"
            else inner_at(train, alpha)
        )
    d = train.dim
    c, e = train.stats.shift[:d], train.stats.shift[d:]
    intercept = e + train.y_mean - torch.einsum("mkd,md->mk", w, c + train.mean)
    r2 = mse = predictions = None
    if scored and rows is not None and projected is not None:
        predictions, r2, mse = score_rows(train, rows, projected)
    elif scored:
        r2, mse = score_held_out(train, w)
    name = str(dtype).removeprefix("torch.")
    against = "rows" if rows is not None else "statistics"
    method = f"{select}; Cholesky in {name}, refined in float64 against the {against}"
    return Solution(alpha, w.mT, intercept, r2, mse, predictions, inner_r2, method)
