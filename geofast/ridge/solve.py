"""The solvers: every fold at once, from statistics or from rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from numpy.typing import ArrayLike

from .. import _ops
from ..gram import Gram, totals, update
from .gcv import least_gcv, settle_ties
from .inner import inner_at, inner_folds, path
from .loo import select_loo
from .loo_of_all import select_loo_of_all
from .memory import bytes_of_rows, bytes_of_statistics, bytes_of_wide_rows, in_parts
from .refine import refine
from .scores import score_held_out, score_rows, scores_on
from .solution import ALPHAS, Select, Solution, least, penalties
from .training import (
    NotPositiveError,
    RefusedError,
    Statistics,
    Training,
    TrainingRows,
    is_small,
    training_sets,
)
from .wide import solve_wide, wide_fold_errors

_FLOAT64_CORES = {(8, 0), (9, 0), (10, 0)}  # compute capabilities of A100, H100 and H200, B200


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
    (found,) = solve_many([gram], alphas, folds=folds, select=select, inner=inner)
    if isinstance(found, ValueError):
        raise found
    return found


def solve_many(
    grams: Sequence[Gram],
    alphas: Sequence[float] = ALPHAS,
    *,
    folds: torch.Tensor | None = None,
    select: Literal["gcv", "folds"] = "gcv",
    inner: bool = False,
) -> list[Solution | ValueError]:
    """Solve statistics of many layers, of one shape and on one device, as `solve` does each.

    On a GPU as many at once as there is memory for; on the CPU, which one layer fills, one after
    the other. For a layer that cannot be solved its error is returned, and the others are solved.

    Parameters
    ----------
    grams, alphas, folds, select, inner
        As for `solve`.

    Raises
    ------
    ValueError
        For arguments that are wrong whatever the statistics, and Grams that differ in shape.
    """
    _check_select(select, ("gcv", "folds"))
    grid = penalties(alphas)
    shapes = {(g.dim, g.targets, g.cells, g.matrix.device) for g in grams}
    if len(shapes) > 1:
        raise ValueError(
            "Grams that are solved together must have one width, number of targets and cells, and "
            f"device; got {sorted(map(str, shapes))}"
        )
    if not grams:
        return []
    device, dim = grams[0].matrix.device, grams[0].dim
    parts = grams[0].cells if folds is None else int(folds.max()) + 1
    each = bytes_of_statistics(dim, grams[0].targets, parts, len(grid), select)
    return in_parts(
        grams,
        None if device.type == "cpu" or is_small(dim) else (device, each),
        lambda some: _solve_layers(some, grid, folds, select, inner),
    )


def _solve_layers(
    grams: Sequence[Gram],
    alphas: torch.Tensor,
    folds: torch.Tensor | None,
    select: str,
    inner: bool,
) -> list[Solution | ValueError]:
    if is_small(grams[0].dim):
        grams = [gram.cpu() for gram in grams]  # where so few features are quicker
    stats = Statistics.of([totals(gram, folds) for gram in grams])
    whole = stats.folds == 1
    _check_inner(stats.folds, select, inner and not whole)
    found = _refused(stats, grams[0].dim)
    return _solve_others(found, stats, None, grams[0].targets, alphas, select, inner and not whole)


def _solve_others(
    found: dict[int, Solution | ValueError],
    stats: Statistics,
    rows: TrainingRows | None,
    k: int,
    alphas: torch.Tensor,
    select: str,
    inner: bool,
) -> list[Solution | ValueError]:
    """Solve the layers that nothing is found of yet; of a single fold nothing is held out."""
    layers, dim, scored = len(stats.total), stats.total.shape[1] - 1 - k, stats.folds > 1
    if not scored:
        stats = replace(stats, held=torch.zeros_like(stats.held))
    for dtype in _precisions(dim, stats.total.device):
        left = [i for i in range(layers) if i not in found]
        while left:
            some, of = stats, rows
            if len(left) < layers:
                some = stats[torch.tensor(left)]
                of = None if rows is None else rows[torch.tensor(left)]
            try:
                train = training_sets(some, k)
                solved = _solve_in(dtype, train, alphas, select, of, inner, scored)
            except RefusedError as refused:
                found.update({left[i]: why for i, why in refused.why.items()})
                left = [i for i in left if i not in found]
            except NotPositiveError as failed:  # these in float64, the others once more
                left = [one for i, one in enumerate(left) if i not in failed.layers]
            else:
                found.update(zip(left, solved, strict=True))
                left = []
    hopeless = ValueError(_not_positive(alphas.tolist()))
    return [found.get(i, hopeless) for i in range(layers)]


def _refused(stats: Statistics, dim: int) -> dict[int, Solution | ValueError]:
    """The layers whose statistics cannot be right, and why."""
    finite = stats.total.diagonal(dim1=1, dim2=2).isfinite().cpu()
    why: dict[int, Solution | ValueError] = {}
    for i, row in enumerate(finite):
        if not row.all():
            column = int((~row).nonzero()[0])
            msg = f"column {column} of the Gram is not finite: a row held NaN or Inf"
            why[i] = ValueError(msg)
    for i, count in enumerate(stats.held[:, :, dim, dim].cpu()):
        try:
            _check_count(count)
        except ValueError as error:
            why.setdefault(i, error)
    return why


def cross_validate(
    x: ArrayLike,
    y: ArrayLike,
    fold: ArrayLike,
    alphas: Sequence[float] = ALPHAS,
    *,
    select: Select = "loo",
    inner: bool = False,
) -> Solution:
    """Solve all folds from rows, with held-out predictions.

    Parameters
    ----------
    x
        [n, d] rows, of torch or NumPy: float32, float16, bfloat16 or float64.
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
    x, y, fold = torch.as_tensor(x), torch.as_tensor(y), torch.as_tensor(fold)
    _check_rows(x, y)
    folds = _count_folds(fold, len(x))
    _check_inner(folds, select, inner)
    if _is_large_elsewhere(x):
        return _or_raise(_solve_tables([x], y, fold, folds, alphas, select, inner))
    rows = _rows(x, y, fold, folds)
    if rows.are_wide:
        return _or_raise(_solve_wide(rows, alphas, select, inner))
    return _solve_rows(rows, y.shape[1], alphas, select, inner, scored=True)


def cross_validate_many(
    tables: Sequence[torch.Tensor],
    y: torch.Tensor,
    fold: torch.Tensor,
    alphas: Sequence[float] = ALPHAS,
    *,
    select: Select = "loo",
    inner: bool = False,
) -> list[Solution | ValueError]:
    """Solve rows of many layers, of one shape, dtype and device, as `cross_validate` does each.

    On a GPU as many at once as there is memory for; on the CPU, which one layer fills, one after
    the other. For a layer that cannot be solved its error is returned, and the others are solved.

    Parameters
    ----------
    tables
        [n, d] rows of each layer.
    y, fold, alphas, select, inner
        As for `cross_validate`. A row with a negative fold is left out.

    Raises
    ------
    ValueError
        For arguments that are wrong whatever the rows, and tables that differ in shape.
    """
    _check_select(select, get_args(Select))
    in_some = (fold >= 0).nonzero()[:, 0]
    kept = None if len(in_some) == len(fold) else in_some
    if kept is not None:
        y, fold = (one[_ops.send(kept, one.device)] for one in (y, fold))
    folds = _count_folds(fold, len(fold))
    _check_inner(folds, select, inner)
    return _of_tables(tables, kept, y, fold, folds, alphas, select, inner)


def _of_tables(
    tables: Sequence[torch.Tensor],
    kept: torch.Tensor | None,
    y: torch.Tensor,
    fold: torch.Tensor,
    folds: int,
    alphas: Sequence[float],
    select: Select,
    inner: bool,
) -> list[Solution | ValueError]:
    """Solve some rows of each table, all if `kept` is None; one fold holds nothing out."""
    if len({(x.shape, x.dtype, x.device) for x in tables}) > 1:
        kinds = sorted({f"{x.dtype} {list(x.shape)} on {x.device}" for x in tables})
        raise ValueError(f"rows that are solved together must be alike; got {', '.join(kinds)}")
    if not tables:
        return []
    x = tables[0]
    n, d, k = len(fold), x.shape[1], y.shape[1]

    def solved(some: Sequence[torch.Tensor]) -> list[Solution | ValueError]:
        if kept is not None:
            some = [x[_ops.send(kept, x.device)] for x in some]
        if _is_large_elsewhere(x):
            return _solve_tables(some, y, fold, folds, alphas, select, inner)
        found = list[Solution | ValueError]()
        for one in some:
            try:
                if folds > 1:
                    found.append(cross_validate(one, y, fold, alphas, select=select, inner=inner))
                else:
                    found.append(fit(one, y, alphas, select=select))
            except ValueError as error:
                found.append(error)
        return found

    memory = None
    if _is_large_elsewhere(x):
        shape = n, d, x.itemsize, k, folds, len(alphas)
        wide = _rows(x, y, fold, folds).are_wide
        each = bytes_of_wide_rows(*shape) if wide else bytes_of_rows(*shape, select)
        memory = x.device, each
    return in_parts(tables, memory, solved)


def _is_large_elsewhere(x: torch.Tensor) -> bool:
    """Whether rows are solved on a GPU, many layers at once."""
    return not x.is_cpu and not is_small(x.shape[1])


def _or_raise(found: Sequence[Solution | ValueError]) -> Solution:
    (one,) = found
    if isinstance(one, ValueError):
        raise one
    return one


def _solve_tables(
    tables: Sequence[torch.Tensor],
    y: torch.Tensor,
    fold: torch.Tensor,
    folds: int,
    alphas: Sequence[float],
    select: Select,
    inner: bool,
) -> list[Solution | ValueError]:
    """Solve rows of one shape that are on a GPU, all at once."""
    _check_rows(tables[0], y)
    device, k = tables[0].device, y.shape[1]
    rows = _rows(tables[0], y, fold, folds)
    rows = replace(rows, x=tables[0][None] if len(tables) == 1 else torch.stack([*tables]))
    if rows.are_wide:
        return _solve_wide(rows, alphas, select, inner)
    p = rows.x.shape[2] + 1 + k
    matrix = torch.empty(len(tables), folds, p, p, dtype=torch.float64, device=device)
    grams = [Gram(p - 1 - k, k, folds, out=out, device=device) for out in matrix]
    update(grams, [*rows.x], y.cpu(), fold.clamp_min(0).cpu())
    shift = torch.stack([gram.shift for gram in grams if gram.shift is not None])
    stats = Statistics(matrix.sum(1), matrix, shift)
    found = _refused(stats, p - 1 - k)
    for i in found:  # by the row, where it can be told
        try:
            _check_finite(tables[i], "feature")
        except ValueError as error:
            found[i] = error
    return _solve_others(found, stats, rows, k, penalties(alphas), select, inner)


def _solve_wide(
    rows: TrainingRows, alphas: Sequence[float], select: str, inner: bool
) -> list[Solution | ValueError]:
    """Solve every layer of rows [L, n, d], or the only one of rows [n, d], that have n < d."""
    rows = replace(rows, x=rows.x if rows.x.ndim == 3 else rows.x[None])
    found = dict[int, Solution | ValueError]()
    for i in (~rows.x.isfinite().all(2).all(1)).nonzero()[:, 0].tolist():
        try:
            _check_finite(rows.x[i], "feature")
        except ValueError as error:
            found[i] = error
    left = [i for i in range(len(rows.x)) if i not in found]
    if left:
        some = rows[torch.tensor(left)] if found else rows
        try:
            found |= zip(left, solve_wide(some, alphas, select, inner), strict=True)
        except ValueError as error:  # of the targets, which all layers have in common
            found |= dict.fromkeys(left, error)
    return [found[i] for i in range(len(rows.x))]


def fit_many(
    tables: Sequence[torch.Tensor],
    y: torch.Tensor,
    alphas: Sequence[float] = ALPHAS,
    *,
    select: Select = "loo",
) -> list[Solution | ValueError]:
    """As `fit`, of many layers: `cross_validate_many` with nothing held out."""
    if select == "folds":
        raise ValueError("select='folds' needs folds: use cross_validate")
    _check_select(select, get_args(Select))
    return _of_tables(tables, None, y, torch.full((len(y),), -1), 1, alphas, select, False)


def fit(
    x: torch.Tensor, y: torch.Tensor, alphas: Sequence[float] = ALPHAS, *, select: Select = "loo"
) -> Solution:
    """Fit all rows, nothing held out: F = 1, no scores. Parameters as for `cross_validate`."""
    if select == "folds":
        raise ValueError("select='folds' needs folds: use cross_validate")
    _check_select(select, get_args(Select))
    _check_rows(x, y)
    nowhere = torch.full((len(x),), -1)
    if _is_large_elsewhere(x):
        return _or_raise(_solve_tables([x], y, nowhere, 1, alphas, select, False))
    rows = _rows(x, y, nowhere, 1)
    if rows.are_wide:
        return _or_raise(_solve_wide(rows, alphas, select, False))
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
    rows = _rows(x, y, fold, folds)
    if rows.are_wide:
        return wide_fold_errors(replace(rows, x=rows.x[None]), grid)[0].cpu()
    out = torch.empty(folds, len(grid), dtype=torch.float64)
    stats = Statistics.of([totals(_gram(rows, "float64"))])
    for f in range(folds):
        one = _sets(replace(stats, held=stats.held[:, f : f + 1]), y.shape[1])
        out[f] = scores_on(stats.held[:, f], one, path(one, grid)[None])[1][0].mean(-1)
    return out


def _rows(x: torch.Tensor, y: torch.Tensor, fold: torch.Tensor, folds: int) -> TrainingRows:
    if is_small(x.shape[1]):
        x = x.cpu()  # where so few features are quicker
    return TrainingRows(x, y.to(x.device, torch.float64), fold.to(x.device), folds)


def _gram(rows: TrainingRows, products: str) -> Gram:
    """Statistics of the rows, every fold a cell."""
    d, k = rows.x.shape[1], rows.y.shape[1]
    out = None
    if rows.x.is_cpu:
        out = _ops.kept.empty("gram", rows.folds, d + 1 + k, d + 1 + k, dtype=torch.float64)
    gram = Gram(d, k, rows.folds, products=products, out=out, device=rows.x.device)
    return gram.update(rows.x, rows.y.cpu(), rows.fold.clamp_min(0).cpu())


def _sets(stats: Statistics, k: int) -> Training:
    """As `training_sets`, of a single layer."""
    try:
        return training_sets(stats, k)
    except RefusedError as refused:
        raise refused.why[0] from None


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
    for dtype in _precisions(rows.x.shape[1], rows.x.device):
        gram = _gram(rows, "float64" if precise or dtype == torch.float64 else "float32")
        if not bool(gram.matrix.diagonal(dim1=1, dim2=2).isfinite().all()):
            _check_finite(rows.x, "feature")  # if all are, only the float32 products overflowed
        stats = Statistics.of([totals(gram)])
        if not scored:
            stats = replace(stats, held=torch.zeros_like(stats.held))
        try:
            (found,) = _solve_in(
                dtype, _sets(stats, k), penalties(alphas), select, rows, inner, scored
            )
        except NotPositiveError:
            continue
        except RefusedError as refused:
            raise refused.why[0] from None
        return found
    raise ValueError(_not_positive(alphas))


def _not_positive(alphas: Sequence[float]) -> str:
    return (
        f"X'X + {min(alphas)} I is not positive definite in float64: the features are too badly "
        "scaled for so small a penalty; raise the smallest alpha"
    )


def _precisions(dim: int, device: torch.device) -> list[torch.dtype]:
    """Return the precisions of factors to try, one after the other.

    Of many features float32 takes half the time or, on most GPUs, a fraction of it. Where tensor
    cores multiply in float64, they do it as fast as the other cores do in float32.
    """
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) in _FLOAT64_CORES
    return [torch.float64] if fast or is_small(dim) else [torch.float32, torch.float64]


def _solve_in(
    dtype: torch.dtype,
    train: Training,
    alphas: torch.Tensor,
    select: str,
    rows: TrainingRows | None,
    inner: bool,
    scored: bool,
) -> list[Solution]:
    """Solve every layer of `train`; rows are theirs. Solutions are on the CPU."""
    if select == "folds":
        curve, table = (t.cpu() for t in inner_folds(train, alphas))
        chosen = least(curve)
        factor = train.factor(alphas[chosen], dtype)
        w, projected = refine(train, factor, alphas[chosen], rows)
    elif select == "gcv":
        chosen, factor = settle_ties(train, alphas, least_gcv(train, alphas, dtype))
        w, projected = refine(train, factor, alphas[chosen], rows)
    else:
        if rows is None:
            raise ValueError("select='loo' needs the rows; from statistics use 'gcv' or 'folds'")
        search = select_loo if rows.x.ndim == 2 else select_loo_of_all
        chosen, w, projected = search(train, alphas, rows, least_gcv(train, alphas, dtype))
    alpha = alphas[chosen]
    inner_r2 = None
    if inner:
        inner_r2 = (
            table[torch.arange(len(chosen)), chosen]
            if select == "folds"
            else inner_at(train, alpha)
        )
    d, folds = train.dim, train.stats.folds
    shift = train.stats.shift.repeat_interleave(folds, 0)
    c, e = shift[:, :d], shift[:, d:]
    intercept = e + train.y_mean - torch.einsum("mkd,md->mk", w, c + train.mean)
    r2 = mse = held = None
    if scored and rows is not None and projected is not None:
        held, r2, mse = score_rows(train, rows, projected)
        held = held.cpu()
    elif scored:
        r2, mse = score_held_out(train, w)
    name = str(dtype).removeprefix("torch.")
    against = "rows" if rows is not None else "statistics"
    method = f"{select}; Cholesky in {name}, refined in float64 against the {against}"
    found = Solution(alpha, w.mT, intercept, r2, mse, None, inner_r2, method).cpu()
    layers = range(len(train) // folds)
    parts = [_part(found, slice(folds * i, folds * (i + 1))) for i in layers]
    if held is None:
        return parts
    return [replace(part, predictions=held[:, i]) for i, part in enumerate(parts)]


def _part(found: Solution, at: slice) -> Solution:
    """Solutions of some training sets."""
    tensors: dict[str, Any] = {
        n: t[at] for n, t in vars(found).items() if isinstance(t, torch.Tensor)
    }
    return replace(found, **tensors)
