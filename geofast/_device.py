"""The operations in torch on any device, many matrices at once; they serve all but the CPU.

Signatures and meaning are those of `_reference`, at the precision of the dtypes that are handed in.
What lies above the diagonal of a matrix that is written is not specified afterwards. `sets` of
`training_matrix` are on the CPU, all else is on the device, and nothing waits for it.

Almost everything is a product of matrices, in few launches whatever the number of matrices. With
few right-hand sides a triangular solve of cuBLAS waits for itself row after row, so `factor` also
inverts the diagonal blocks of a factor, and a solve is two products for each of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ._reference import gram, pool

__all__ = [
    "cholesky",
    "factor",
    "gram",
    "inverse_diagonal",
    "inverse_trace",
    "invert_blocks",
    "leverage",
    "pool",
    "project",
    "project_t",
    "solve_lower",
    "training_matrix",
]

_PANEL = 128  # columns that are factored at once: the width of the products that follow
BLOCK = 1024  # rows of a diagonal block that is inverted: up to there a solve is one product
_FEW = 64  # rows of a right-hand side, up to which reading a factor takes the time
_STRIP = 512  # rows of a training matrix that are made at once
_BYTES = 1 << 28  # of float64 copies of rows, or of whole inverses, at once


def project(
    x: torch.Tensor,
    shift: torch.Tensor,
    w: torch.Tensor,
    out: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
) -> None:
    """See `_reference.project`; all but `rows` may have a first dimension, of layers."""
    for part, taken in _shifted(x, shift, rows):
        out[..., part, :] = taken @ w.mT


def project_t(
    x: torch.Tensor,
    shift: torch.Tensor,
    r: torch.Tensor,
    out: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
) -> None:
    """See `_reference.project_t`; all but `rows` may have a first dimension, of layers."""
    out.zero_()
    for part, taken in _shifted(x, shift, rows):
        out += r[..., part, :].mT @ taken


def _shifted(
    x: torch.Tensor, shift: torch.Tensor, rows: torch.Tensor | None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows minus shift in float64, some at a time, and which."""
    n = x.shape[-2] if rows is None else len(rows)
    step = max(1, _BYTES // (8 * max(1, x[..., :1, :].numel())))
    for i in range(0, n, step):
        part = slice(i, min(i + step, n))
        yield part, x[..., part if rows is None else rows[part], :] - shift[..., None, :]


def training_matrix(
    total: torch.Tensor,
    held: torch.Tensor,
    sets: torch.Tensor,
    alpha: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """See `_reference.training_matrix`; `total` may also be [layers, p, p].

    Every layer then has the same number of parts in `held`, one layer's after another's.
    """
    d, total = out.shape[-1], total.view(-1, *held.shape[1:])
    folds = len(held) // len(total)
    everything = torch.equal(sets, torch.arange(len(held)))
    at, layers = (s.to(held.device, non_blocking=True) for s in (sets, sets // folds))

    def part(i: int, j: int) -> torch.Tensor:
        if not everything:
            return total[layers, i:j, :j].sub_(held[at, i:j, :j])
        grid = held[:, i:j, :j].view(-1, folds, j - i, j)  # views and no copies
        return torch.sub(total[:, None, i:j, :j], grid).flatten(0, 1)

    last = part(d, d + 1)[:, 0]
    sums, mean = last[:, :d], last[:, :d] / last[:, d:]
    diagonal = alpha[:, None] - sums * mean
    for i in range(0, d, _STRIP):
        j = min(i + _STRIP, d)
        strip = part(i, j)
        diagonal[:, i:j] += strip[:, :, i:].diagonal(dim1=1, dim2=2)
        here = out[:, i:j, :j]
        torch.addcmul(strip, sums[:, i:j, None], mean[:, None, :j], value=-1, out=here)
    out.diagonal(dim1=1, dim2=2).copy_(diagonal)


def cholesky(a: torch.Tensor, info: torch.Tensor) -> None:
    """See `_reference.cholesky`."""
    factor(a, info)


def factor(a: torch.Tensor, info: torch.Tensor) -> torch.Tensor:
    """Do what `cholesky` does, and return what `invert_blocks` would."""
    d, eye = a.shape[1], _eye(a)
    inverses, found = _no_blocks(a), []
    for j in range(0, d, _PANEL):
        panel = a[:, j:, j : j + _PANEL]
        w = panel.shape[2]
        if j:
            panel.baddbmm_(a[:, j:, :j], a[:, j : j + w, :j].mT, alpha=-1)
        root, bad = torch.linalg.cholesky_ex(panel[:, :w])
        panel[:, :w] = root
        inverse = _invert(root, eye)
        panel[:, w:] = panel[:, w:] @ inverse.mT
        _put_inverse(inverses, a, inverse, j)
        found.append(bad)
    # Not every library flags infinity and NaN, but they stay on the diagonal.
    pivots = a.diagonal(dim1=1, dim2=2)
    fine = (pivots > 0) & (pivots < torch.inf)
    count = torch.arange(1, d + 1, dtype=info.dtype, device=a.device)
    flagged = torch.stack(found, 1)
    named = (flagged + count[None, ::_PANEL] - 1).masked_fill_(flagged == 0, d + 1)
    first = torch.cat([named, count.expand_as(fine).masked_fill(fine, d + 1)], 1).amin(1)
    info.copy_(first.masked_fill_(first > d, 0))
    return inverses


def invert_blocks(l: torch.Tensor) -> torch.Tensor:  # noqa: E741
    """Return the inverse of every diagonal block of `BLOCK` rows, below one another.

    For `l` [m, dim, dim] that is [m, dim, min(dim, BLOCK)], with zeros above the diagonals.
    """
    inverses, eye = _no_blocks(l), _eye(l)
    for j in range(0, l.shape[1], _PANEL):
        here = slice(j, j + _PANEL)
        _put_inverse(inverses, l, _invert(l[:, here, here], eye), j)
    return inverses


def _no_blocks(l: torch.Tensor) -> torch.Tensor:  # noqa: E741
    return l.new_zeros(len(l), l.shape[1], min(l.shape[1], BLOCK))


def _eye(l: torch.Tensor) -> torch.Tensor:  # noqa: E741
    return torch.eye(min(l.shape[1], _PANEL), dtype=l.dtype, device=l.device)


def _invert(l: torch.Tensor, eye: torch.Tensor) -> torch.Tensor:  # noqa: E741
    n = l.shape[1]
    one = eye[:n, :n].expand(l.shape)
    inverse: torch.Tensor = torch.linalg.solve_triangular(l, one, upper=False)
    return inverse


def _put_inverse(
    inverses: torch.Tensor,
    l: torch.Tensor,  # noqa: E741
    inverse: torch.Tensor,
    j: int,
) -> None:
    """Add the rows from j on, whose own block has this inverse, to the inverse that they end."""
    s = j // BLOCK * BLOCK
    rows = inverses[:, j : j + inverse.shape[1]]
    rows[:, :, j - s : j - s + inverse.shape[1]] = inverse
    if j > s:
        before = l[:, j : j + inverse.shape[1], s:j] @ inverses[:, s:j, : j - s]
        torch.baddbmm(before, inverse, before, beta=0, alpha=-1, out=rows[:, :, : j - s])


def solve_lower(
    l: torch.Tensor,  # noqa: E741
    b: torch.Tensor,
    transpose: bool,
    *,
    inverses: torch.Tensor | None = None,
) -> None:
    """See `_reference.solve_lower`; `inverses` are those of `invert_blocks`, if they are there."""
    inverses = invert_blocks(l) if inverses is None else inverses
    d = l.shape[1]
    starts = range(0, d, BLOCK)
    for i in reversed(starts) if transpose else starts:
        j = min(i + BLOCK, d)
        part, inverse = b[:, :, i:j], inverses[:, i:j, : j - i]
        if transpose and j < d:
            part.baddbmm_(b[:, :, j:], l[:, j:, i:j], alpha=-1)
        elif i and not transpose:
            part.baddbmm_(b[:, :, :i], l[:, i:j, :i].mT, alpha=-1)
        _times(part, inverse, transpose)


def _times(b: torch.Tensor, inverse: torch.Tensor, transpose: bool) -> None:
    """Replace rows b by L^-1 b or L^-T b, of triangles whose inverses these are.

    Of many rows the products take the time, half of them with zeros: these are left out. Of few
    rows it is the reading, which one product does best.
    """
    d = inverse.shape[1]
    step = _PANEL if b.shape[1] > _FEW else d
    starts = range(0, d, step)
    for i in starts if transpose else reversed(starts):
        j = min(i + step, d)
        if transpose:
            b[:, :, i:j] = b[:, :, i:] @ inverse[:, i:, i:j]
        else:
            b[:, :, i:j] = b[:, :, :j] @ inverse[:, i:j, :j].mT


def inverse_trace(
    l: torch.Tensor,  # noqa: E741
    out: torch.Tensor,
    *,
    inverses: torch.Tensor | None = None,
) -> None:
    """See `_reference.inverse_trace`; `inverses` as for `solve_lower`."""
    out.copy_(inverse_diagonal(l, inverses=inverses).sum(1))


def inverse_diagonal(
    l: torch.Tensor,  # noqa: E741
    *,
    inverses: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the diagonal of (L L')^-1 for `l` [m, dim, dim]: float64 [m, dim]."""
    inverses = invert_blocks(l) if inverses is None else inverses
    out = torch.empty(l.shape[:2], dtype=torch.float64, device=l.device)
    step = max(1, _BYTES // (l.itemsize * l.shape[1] ** 2))
    for i in range(0, len(l), step):
        whole = _whole_inverse(l[i : i + step], inverses[i : i + step])
        out[i : i + step] = torch.linalg.vector_norm(whole, dim=1, dtype=out.dtype).square()
    return out


def _whole_inverse(l: torch.Tensor, inverses: torch.Tensor) -> torch.Tensor:  # noqa: E741
    d = l.shape[1]
    if d <= BLOCK:
        return inverses
    whole = torch.zeros_like(l)
    for i in range(0, d, BLOCK):
        j = min(i + BLOCK, d)
        inverse = inverses[:, i:j, : j - i]
        whole[:, i:j, i:j] = inverse
        if i:
            before = l[:, i:j, :i] @ whole[:, :i, :i]
            torch.baddbmm(before, inverse, before, beta=0, alpha=-1, out=whole[:, i:j, :i])
    return whole


def leverage(
    l: torch.Tensor,  # noqa: E741
    x: torch.Tensor,
    center: torch.Tensor,
    rows: torch.Tensor,
    out: torch.Tensor,
    *,
    inverses: torch.Tensor | None = None,
) -> None:
    """See `_reference.leverage`; `inverses` as for `solve_lower`.

    `l`, `center`, `out` and `inverses` may have a first dimension, of matrices that meet the same
    rows.
    """
    if l.ndim == 2:
        l, center, out = l[None], center[None], out[None]  # noqa: E741
        inverses = None if inverses is None else inverses[None]
    inverses = invert_blocks(l) if inverses is None else inverses
    n, step = len(rows), max(1, _BYTES // (8 * max(1, center.numel())))
    for i in range(0, n, step):
        b = (x[rows[i : i + step]] - center[:, None]).to(l.dtype)
        solve_lower(l, b, False, inverses=inverses)
        out[:, i : i + step] = torch.linalg.vector_norm(b, dim=2, dtype=out.dtype).square()
