"""Solutions to float64 accuracy from factors of any: iterative refinement."""

from __future__ import annotations

import torch

from .. import _ops
from .factor import Factor
from .training import NotPositiveError, Training, TrainingRows

_REFINED = 1e-17  # the share of the solution's energy that may be left: a relative error squared
_ROUNDS = 20


def refine(
    train: Training,
    factor: Factor,
    alpha: torch.Tensor,
    rows: TrainingRows | None,
    sets: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Iterative refinement of (A + alpha I) w = b with float64 residuals.

    `alpha` [M] is on the CPU. With rows, those of the only layer, `train` may be the `sets` of it;
    without, it is all sets of all layers. Returns w [M, k, d] and, with rows, their projections
    (x - c) w' [n, M, k]. Raises NotPositiveError when the factor is too poor for the refinement to
    contract.
    """
    w = torch.zeros_like(train.b)
    projected, going = None, None
    residual, energies = train.b, []
    at, alpha = sets, _ops.send(alpha, train.device)[:, None, None]
    if at is not None:
        at = _ops.send(at, train.device)
    training = None if rows is None else rows.training if at is None else rows.training[:, at]
    layers = len(train.stats.total)
    for _ in range(_ROUNDS):
        step = factor.solve(residual)
        if going is not None:
            step = step * going
        w = w + step
        energies.append((step * residual).sum(-1).abs())
        if rows is not None:
            delta = _project(rows.x, train, step)
            projected = delta if projected is None else projected + delta
        if len(energies) > 1:
            settled = _settled(energies, layers)
            if bool(settled.all()):
                return w, projected
            if settled.any():  # each layer stops as it would alone
                going = _ops.send(~settled, train.device).repeat_interleave(len(w) // layers)
                going = going[:, None, None]
        if rows is not None and projected is not None and training is not None:
            error = training_errors(train, rows, projected, training)
            residual = _project_t(rows.x, train, error) - alpha * w
        else:
            residual = train.b - _apply_matrix(train, w) - alpha * w
    raise NotPositiveError(range(layers))


def _settled(energies: list[torch.Tensor], layers: int) -> torch.Tensor:
    """Whether the next correction would be negligible at the rate of the last, by layer: bool [L].

    Energies are [M, k]; what comes back is on the CPU.
    """
    first, before, last = energies[0], energies[-2], energies[-1]
    small = last <= _REFINED * first
    grows = ~small & (last > 0.25 * before)
    goes_on = ~(small | (last * (last / before) <= _REFINED * first))
    table = torch.stack([grows, goes_on]).view(2, layers, -1).any(2).cpu()
    if table[0].any():
        raise NotPositiveError(table[0].nonzero()[:, 0].tolist())
    return ~table[1]


def _project(x: torch.Tensor, train: Training, w: torch.Tensor) -> torch.Tensor:
    m, k, d = w.shape
    out = torch.empty(len(x), m * k, dtype=torch.float64, device=x.device)
    _ops.backend(x.device).project(x, train.stats.shift[0, :d], w.reshape(m * k, d), out)
    return out.view(len(x), m, k)


def _project_t(x: torch.Tensor, train: Training, error: torch.Tensor) -> torch.Tensor:
    n, m, k = error.shape
    d = train.dim
    out = torch.empty(m * k, d, dtype=torch.float64, device=x.device)
    _ops.backend(x.device).project_t(x, train.stats.shift[0, :d], error.reshape(n, m * k), out)
    return out.view(m, k, d)


def training_errors(
    train: Training, rows: TrainingRows, projected: torch.Tensor, training: torch.Tensor
) -> torch.Tensor:
    """Training errors y - prediction [n, M, k], zero where a row does not train."""
    error = predict(train, rows, projected, training).neg_().add_(rows.y[:, None])
    return error.mul_(training[..., None])


def predict(
    train: Training, rows: TrainingRows, projected: torch.Tensor, training: torch.Tensor
) -> torch.Tensor:
    # Centred by the rows' own training mean, so that it is exact whatever the statistics' error.
    count = training.sum(0).to(projected.dtype)
    weight = training.to(projected.dtype) / count
    center = torch.einsum("nm,nmk->mk", weight, projected) - weight.mT @ rows.y
    return projected - center


def _apply_matrix(train: Training, w: torch.Tensor) -> torch.Tensor:
    """A w for each training set of every layer, from the lower triangles: [M, k, d]."""
    d, stats = train.dim, train.stats
    everyone = w.view(len(stats.total), -1, d)
    full = _apply_lower(stats.total[:, :d, :d], everyone).view_as(w)
    full -= _apply_lower(stats.held.flatten(0, 1)[:, :d, :d], w)
    return full - train.n[:, None, None] * (w @ train.mean[..., None]) * train.mean[:, None]


def _apply_lower(lower: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Products of w [M, k, d] with symmetric matrices that have zeros above the diagonal."""
    return w @ lower + w @ lower.mT - w * lower.diagonal(dim1=1, dim2=2)[:, None]
