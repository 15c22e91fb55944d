"""What the compiled core must compute, in plain torch float64.

It is the expected value in the tests, and it serves the devices that have no kernel. The functions
take the arguments of their namesakes in `_core` and write in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def pool(
    x: torch.Tensor, roles: torch.Tensor, jobs: Sequence[tuple[str, int, torch.Tensor]]
) -> None:
    """Reduce the tokens of a role to one row a sample, for every job.

    Parameters
    ----------
    x
        [batch, tokens, dim], any floating-point dtype.
    roles
        [batch, tokens] uint8; bit k says whether a token has role k.
    jobs
        (op, bit, out): op is `first`, `last`, `mean`, `max` or `min`, and out is a tensor
        [batch, dim]. NaN passes through max and min; a sample with no token of the role gives NaN.
    """
    for op, bit, out in jobs:
        has = (roles >> bit & 1).bool()
        if op in ("first", "last"):
            out.copy_(_token(x, has, op))
        elif op == "mean":
            total = torch.where(has[..., None], x.double(), 0.0).sum(1)
            out.copy_(total / has.sum(1, keepdim=True))
        else:
            out.copy_(_extreme(x, has, op))


def _token(x: torch.Tensor, has: torch.Tensor, op: str) -> torch.Tensor:
    if x.shape[1] == 0:
        return x.new_full((x.shape[0], x.shape[2]), torch.nan)
    there = has.byte()
    at = there.argmax(1) if op == "first" else has.shape[1] - 1 - there.flip(1).argmax(1)
    taken = x[torch.arange(len(x), device=x.device), at]
    return torch.where(has.any(1, keepdim=True), taken, torch.nan)


def _extreme(x: torch.Tensor, has: torch.Tensor, op: str) -> torch.Tensor:
    if x.shape[1] == 0:
        return x.new_full((x.shape[0], x.shape[2]), torch.nan)
    least = -torch.inf if op == "max" else torch.inf
    kept = torch.where(has[..., None], x, least)
    extreme = kept.amax(1) if op == "max" else kept.amin(1)
    return torch.where(has.any(1, keepdim=True), extreme, torch.nan)


def project(
    x: torch.Tensor,
    shift: torch.Tensor,
    w: torch.Tensor,
    out: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
) -> None:
    """Compute out[i, j] = sum over c of (x[rows[i], c] - shift[c]) * w[j, c].

    Parameters
    ----------
    x
        [n, dim], any floating-point dtype.
    shift, w
        float64 [dim] and [m, dim].
    out
        float64 [len(rows), m].
    rows
        int64 row numbers of x in any order, repeats allowed; all rows when None.
    """
    taken = x if rows is None else x[rows]
    out.copy_((taken.double() - shift) @ w.T)


def project_t(
    x: torch.Tensor,
    shift: torch.Tensor,
    r: torch.Tensor,
    out: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
) -> None:
    """Compute out[j, c] = sum over i of r[i, j] * (x[rows[i], c] - shift[c]).

    Parameters
    ----------
    x
        [n, dim], any floating-point dtype.
    shift, r
        float64 [dim] and [len(rows), m].
    out
        float64 [m, dim].
    rows
        int64 row numbers of x in any order, repeats allowed; all rows when None.
    """
    taken = x if rows is None else x[rows]
    out.copy_(r.T @ (taken.double() - shift))


def gram(
    x: torch.Tensor,
    shift: torch.Tensor,
    z: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    out: torch.Tensor,
    *,
    products: str = "float64",
) -> None:
    """Add [x - shift, z]' [x - shift, z] over the rows of every cell to its lower triangle.

    Parameters
    ----------
    x
        [n, dim], any floating-point dtype.
    shift, z
        float64 [dim] and [n, q].
    order, offsets
        int64; cell c holds the rows order[offsets[c]:offsets[c + 1]], repeats allowed. `offsets`
        are on the CPU.
    out
        float64 [cells, dim + q, dim + q]; the upper triangle is left alone.
    products
        `float32` allows an implementation to round x - shift and the products of x with x to
        float32, in sums of at most 128 rows; the reference does not.
    """
    for c in range(len(out)):
        rows = order[offsets[c] : offsets[c + 1]]
        a = torch.cat([x[rows].double() - shift, z[rows]], 1)
        out[c] += (a.T @ a).tril()


def training_matrix(
    total: torch.Tensor,
    held: torch.Tensor,
    sets: torch.Tensor,
    alpha: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Write out[m] = A - s s' / n + alpha[m] I for the rows that held[sets[m]] leaves, lower part.

    A, s and n are the products of x, its sums and the count: the leading block, row `dim` and the
    corner at [dim, dim] of total - held[sets[m]], where z begins with a column of ones.

    Parameters
    ----------
    total, held
        float64 [p, p] and [folds, p, p], as `gram` writes them.
    sets
        int64 [m]: which part of `held` each matrix leaves out.
    alpha
        float64 [m].
    out
        [m, dim, dim], float32 or float64; the upper triangle is left alone.
    """
    d = out.shape[-1]
    part = total - held[sets]
    n, sums = part[:, d, d], part[:, d, :d]
    a = part[:, :d, :d] - sums[:, :, None] * (sums / n[:, None])[:, None]
    a += alpha[:, None, None] * torch.eye(d, dtype=a.dtype, device=a.device)
    out.copy_(a.tril().to(out.dtype) + out.triu(1))


def cholesky(a: torch.Tensor, info: torch.Tensor) -> None:
    """Replace the lower triangle of every matrix by its Cholesky factor.

    Parameters
    ----------
    a
        [m, dim, dim], float32 or float64; the upper triangle is neither read nor written.
    info
        int32 [m]: 0, or the number (from 1) of the first pivot that is not a positive finite
        number; the lower triangle of that matrix is then unspecified.
    """
    factor, found = torch.linalg.cholesky_ex(a.double())
    a.copy_(factor.tril().to(a.dtype) + a.triu(1))
    info.copy_(found)


def solve_lower(l: torch.Tensor, b: torch.Tensor, transpose: bool) -> None:  # noqa: E741
    """Replace every row x of b[m] by L^-1 x, or by L^-T x with `transpose`.

    Parameters
    ----------
    l
        [m, dim, dim], float32 or float64; only the lower triangle is read.
    b
        [m, sides, dim], the same dtype.
    """
    factor = l.double().tril()
    factor = factor.mT if transpose else factor
    x = torch.linalg.solve_triangular(factor, b.double().mT, upper=transpose)
    b.copy_(x.mT)


def inverse_trace(l: torch.Tensor, out: torch.Tensor) -> None:  # noqa: E741
    """Write trace((L L')^-1) = ||L^-1||_F^2 of every matrix.

    Parameters
    ----------
    l
        [m, dim, dim], float32 or float64; only the lower triangle is read.
    out
        float64 [m].
    """
    eye = torch.eye(l.shape[-1], dtype=torch.float64, device=l.device).expand(l.shape)
    inverse = torch.linalg.solve_triangular(l.double().tril(), eye, upper=False)
    out.copy_(inverse.square().sum((1, 2)))


def leverage(
    l: torch.Tensor,  # noqa: E741
    x: torch.Tensor,
    center: torch.Tensor,
    rows: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Write out[i] = ||L^-1 (x[rows[i]] - center)||^2.

    Parameters
    ----------
    l
        [dim, dim], float32 or float64; only the lower triangle is read.
    x
        [n, dim], any floating-point dtype.
    center
        float64 [dim].
    rows
        int64 row numbers of x in any order, repeats allowed.
    out
        float64 [len(rows)].
    """
    b = (x[rows].double() - center).T
    out.copy_(torch.linalg.solve_triangular(l.double().tril(), b, upper=False).square().sum(0))
