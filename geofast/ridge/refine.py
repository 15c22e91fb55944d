"""Solutions to float64 accuracy from factors of any: iterative refinement."""

from __future__ import annotations

import torch

from .. import _ops
from .training import NotPositiveError, Training, TrainingRows, apply_inverse

_REFINED = 1e-17  # the share of the solution's energy that may be left: a relative error squared
_ROUNDS = 20


def refine(
    train: Training,
    factor: torch.Tensor,
    alpha: torch.Tensor,
    rows: TrainingRows | None,
    sets: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Iterative refinement of (A + alpha I) w = b with float64 residuals.

    Returns w [M, k, d] and, with rows, their projections (x - c) w' [n, M, k]. Raises
    NotPositiveError when the factor is too poor for the refinement to contract.
    """
    w = torch.zeros_like(train.b)
    projected = None
    residual, energies = train.b, []
    training = None if rows is None else rows.training if sets is None else rows.training[:, sets]
    for _ in range(_ROUNDS):
        step = apply_inverse(factor, residual)
        w = w + step
        energies.append((step * residual).sum(-1).abs())
        if rows is not None:
            delta = _project(rows.x, train, step)
            projected = delta if projected is None else projected + delta
        if len(energies) > 1 and _settled(energies):
            return w, projected
        if rows is not None and projected is not None and training is not None:
            error = training_errors(train, rows, projected, training)
            residual = _project_t(rows.x, train, error) - alpha[:, None, None] * w
        else:
            residual = train.b - _apply_matrix(train, w) - alpha[:, None, None] * w
    raise NotPositiveError


def _settled(energies: list[torch.Tensor]) -> bool:
    """Whether the next correction would be negligible, at the rate of the last; all [M, k]."""
    first, before, last = energies[0], energies[-2], energies[-1]
    small = last <= _REFINED * first
    if bool((~small & (last > 0.25 * before)).any()):
        raise NotPositiveError
    return bool((small | (last * (last / before) <= _REFINED * first)).all())


def _project(x: torch.Tensor, train: Training, w: torch.Tensor) -> torch.Tensor:
    m, k, d = w.shape
    out = torch.empty(len(x), m * k, dtype=torch.float64)
    _ops.backend(x.device).project(x, train.stats.shift[:d], w.reshape(m * k, d), out)
    return out.view(len(x), m, k)


def _project_t(x: torch.Tensor, train: Training, error: torch.Tensor) -> torch.Tensor:
    n, m, k = error.shape
    d = train.dim
    out = torch.empty(m * k, d, dtype=torch.float64)
    _ops.backend(x.device).project_t(x, train.stats.shift[:d], error.reshape(n, m * k), out)
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
    """A w for each training set, from the lower triangles: [M, k, d]."""
    d = train.dim
    part = train.stats.total[:d, :d] - train.stats.held[train.sets, :d, :d]
    full = w @ part + w @ part.mT - w * part.diagonal(dim1=1, dim2=2)[:, None]
    return full - train.n[:, None, None] * (w @ train.mean[..., None]) * train.mean[:, None]
