"""The penalty of least generalised cross-validation error, from one factor a training set."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import _ops
from .training import Training, apply_inverse, subset

_STEPS = 10  # Lanczos steps: a neighbouring alpha is exact to 1e-8, one three decades off to 10 %
_PROBES = 6  # random sign vectors for the trace
_TIE = 1e-3  # closer than this, plus 4 standard errors of the ratio: exact traces decide


@dataclass(frozen=True)
class Walk:
    """Where moving each pole to the minimum of its own curve came to rest."""

    pole: torch.Tensor  # [M]
    factor: torch.Tensor  # [M, d, d], at the pole
    curve: torch.Tensor  # [M, A]
    noise: torch.Tensor  # [M, A]: standard error of curve / curve at the pole


def walk_gcv(train: Training, alphas: torch.Tensor, dtype: torch.dtype) -> Walk:
    """Move each pole to the minimum of its own GCV curve."""
    pole = torch.full((len(train.n),), len(alphas) // 2)
    if len(pole) > 1:
        # One training set shows where the others' minimum will be: most then need one factor.
        first = slice(1)
        pole[:] = _walk(subset(train, first), alphas, dtype, pole[first]).pole
    return _walk(train, alphas, dtype, pole)


def _walk(train: Training, alphas: torch.Tensor, dtype: torch.dtype, pole: torch.Tensor) -> Walk:
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
    return Walk(pole, factor, curve, noise)


def settle_ties(
    train: Training, alphas: torch.Tensor, walk: Walk
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the index of the alpha of least GCV [M], and the factors there [M, d, d].

    Where a second alpha is too close for the estimated trace, compare exact ones.
    """
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
        w = apply_inverse(at, train.b[close])
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
    train: Training,
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
    train: Training, sets: torch.Tensor, rss: torch.Tensor, df: torch.Tensor
) -> torch.Tensor:
    """Return n RSS / (n - 1 - df)^2, RSS summed over targets; `rss` [M, k, ...], `df` [M, ...]."""
    n = train.n[sets].reshape(-1, *[1] * (df.ndim - 1))
    free = (n - 1.0 - df).clamp_min(1e-9 * n)
    return n * rss.sum(1).clamp_min(0) / free.square()
