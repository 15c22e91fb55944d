"""The penalty of least exact leave-one-out error."""

from __future__ import annotations

import torch

from .. import _ops
from .refine import refine, training_errors
from .training import Training, TrainingRows, subset


def select_loo(
    train: Training,
    alphas: torch.Tensor,
    dtype: torch.dtype,
    rows: TrainingRows,
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
    train: Training,
    rows: TrainingRows,
    training: torch.Tensor,
    sets: torch.Tensor,
    factor: torch.Tensor,
    alpha: torch.Tensor,
) -> torch.Tensor:
    """Mean squared leave-one-out error of each training set, over rows and targets: [M]."""
    ops = _ops.backend(factor.device)
    part = subset(train, sets)
    _, projected = refine(part, factor, alpha.repeat(len(sets)), rows, sets)
    assert projected is not None
    error = training_errors(part, rows, projected, training[:, sets])
    out = torch.empty(len(sets), dtype=torch.float64)
    for j, i in enumerate(sets.tolist()):
        who = training[:, i].nonzero()[:, 0]
        leverage = torch.empty(len(who), dtype=torch.float64)
        center = train.stats.shift[: train.dim] + train.mean[i]
        ops.leverage(factor[j], rows.x, center, who, leverage)
        free = 1.0 - leverage - 1.0 / train.n[i]
        out[j] = (error[who, j] / free[:, None]).square().mean()
    return out
