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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Iterative refinement of (A + alpha I) w = b with float64 residuals.

    `alpha` [M] is on the CPU. With rows, `train` may be some of their layers' sets, each once;
    without, it is all sets of all layers. Returns w [M, k, d] and, with rows, their projections
    (x - c) w' [n, M, k]. Raises NotPositiveError when the factor is too poor for the refinement to
    contract.
    """
    w = torch.zeros_like(train.b)
    projected, going = None, None
    residual, energies = train.b, []
    alpha = _ops.send(alpha, train.device)[:, None, None]
    training = None if rows is None else rows.training_of(train.sets)
    layer = train.sets // train.stats.folds
    for _ in range(_ROUNDS):
        step = factor.solve(residual)
        if going is not None:
            step = step * going
        w = w + step
        energies.append((step * residual).sum(-1).abs())
        if rows is not None:
            delta = project(rows.x, train, step)
            projected = delta if projected is None else projected + delta
        if len(energies) > 1:
            settled = _settled(energies, layer)
            if bool(settled.all()):
                return w, projected
            if settled.any():  # each layer stops as it would alone
                going = _ops.send(~settled, train.device)[:, None, None]
        if rows is not None and projected is not None and training is not None:
            error = training_errors(train, rows, projected, training)
            residual = project_t(rows.x, train, error) - alpha * w
        else:
            residual = train.b - _apply_matrix(train, w) - alpha * w
    raise NotPositiveError(layer.tolist())


def _settled(energies: list[torch.Tensor], layer: torch.Tensor) -> torch.Tensor:
    """Whether the next corrections of a set's `layer` would be negligible at the rate of the last.

    Energies are [M, k]; the layers [M] and what comes back, bool [M], are on the CPU.
    """
    first, before, last = energies[0], energies[-2], energies[-1]
    small = last <= _REFINED * first
    grows = ~small & (last > 0.25 * before)
    goes_on = ~(small | (last * (last / before) <= _REFINED * first))
    table = torch.stack([grows, goes_on]).any(2).cpu()
    if table[0].any():
        raise NotPositiveError(layer[table[0]].tolist())
    return ~torch.isin(layer, layer[table[1]])


def project(x: torch.Tensor, train: Training, w: torch.Tensor) -> torch.Tensor:
    """(x - c) w' for w [M, k, d] of the training sets: [n, M, k]."""
    m, k, d = w.shape
    ops, shift = _ops.backend(x.device), train.stats.shift[:, :d]
    if x.ndim == 2:
        out = torch.empty(len(x), m * k, dtype=torch.float64, device=x.device)
        ops.project(x, shift[0], w.reshape(m * k, d), out)
        return out.view(len(x), m, k)
    layers, n = x.shape[:2]
    at, sets = _among_all(train)
    every = w if at is None else w.new_zeros(sets, k, d).index_copy_(0, at, w)
    out = torch.empty(layers, n, sets // layers * k, dtype=torch.float64, device=x.device)
    ops.project(x, shift, every.reshape(layers, -1, d), out)
    out = out.view(layers, n, -1, k).transpose(0, 1).flatten(1, 2)
    return out if at is None else out[:, at]


def project_t(x: torch.Tensor, train: Training, error: torch.Tensor) -> torch.Tensor:
    """Products error' (x - c) for errors [n, M, k] of the training sets: [M, k, d]."""
    n, m, k = error.shape
    ops, d = _ops.backend(x.device), train.dim
    shift = train.stats.shift[:, :d]
    if x.ndim == 2:
        out = torch.empty(m * k, d, dtype=torch.float64, device=x.device)
        ops.project_t(x, shift[0], error.reshape(n, m * k), out)
        return out.view(m, k, d)
    layers = len(x)
    at, sets = _among_all(train)
    every = error if at is None else error.new_zeros(n, sets, k).index_copy_(1, at, error)
    out = torch.empty(layers, sets // layers * k, d, dtype=torch.float64, device=x.device)
    ops.project_t(x, shift, every.reshape(n, layers, -1).transpose(0, 1), out)
    out = out.view(sets, k, d)
    return out if at is None else out[at]


def _among_all(train: Training) -> tuple[torch.Tensor | None, int]:
    """The place of training sets among all of all layers, None for all; and how many these are."""
    sets = len(train.stats.total) * train.stats.folds
    return None if len(train) == sets else _ops.send(train.sets, train.device), sets


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
