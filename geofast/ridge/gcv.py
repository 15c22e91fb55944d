"""The penalty of least generalised cross-validation error, from one factor a training set."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import _ops
from .factor import Factor
from .lanczos import Lanczos, lanczos
from .solution import EQUAL, least
from .training import Training, is_small, subset

_STEPS = 10  # Lanczos steps: a neighbouring alpha is exact to 1e-8, one three decades off to 10 %
_PROBES = 6  # random sign vectors for the trace
_SCOUT = (8, 2)  # steps and sign vectors where only the place of the minimum is asked for
_FEW_ROWS = 1.1  # times the features: below, whole spectra, or on a GPU a factor of every alpha
_TIE = 1e-3  # closer than this and the errors of the estimate: exact traces decide


@dataclass(frozen=True)
class Minimum:
    """Where the GCV curve of each training set is least, as far as the estimate goes.

    What decides is on the CPU, whatever device the factors are on.
    """

    pole: torch.Tensor  # [M]
    factor: Factor  # of M, at the pole
    curve: torch.Tensor  # [M, A]
    margin: torch.Tensor  # [M, A]: how far curve / curve at the pole may be off

    def factor_at(
        self, train: Training, alphas: torch.Tensor, a: int, sets: torch.Tensor
    ) -> Factor:
        """Return the factors of training `sets` at alpha number `a`, made if they must be."""
        if bool((self.pole[sets] == a).all()):
            return self.factor if len(sets) == len(self.factor) else self.factor[sets]
        return subset(train, sets).factor(alphas[a].repeat(len(sets)), self.factor.dtype)


def least_gcv(train: Training, alphas: torch.Tensor, dtype: torch.dtype) -> Minimum:
    """Find the minimum of each GCV curve; `alphas` are on the CPU."""
    # With hardly more rows than features, n - 1 - df is what rounding leaves of two near numbers.
    if is_small(train.dim) or bool((train.n < _FEW_ROWS * train.dim).any()):
        return _exact(train, alphas, dtype)
    pole = torch.full((len(train),), len(alphas) // 2)
    folds = train.stats.folds
    if folds > 1:
        # One training set shows where its layer's others have it: most then need one factor.
        first = torch.arange(0, len(train), folds)
        found = _walk(subset(train, first), alphas, dtype, pole[first], *_SCOUT).pole
        pole = found.repeat_interleave(folds)
    return _walk(train, alphas, dtype, pole, _STEPS, _PROBES)


def settle_ties(
    train: Training, alphas: torch.Tensor, start: Minimum
) -> tuple[torch.Tensor, Factor]:
    """Return the index of the alpha of least GCV [M], and the factors there.

    Wherever the estimate leaves another alpha a chance, exact traces decide. Factors of `start`
    that lose are overwritten.
    """
    pole, factor, every = start.pole.clone(), start.factor, torch.arange(len(start.pole))
    close = start.curve < start.curve[every, pole][:, None] * (1.0 + start.margin)
    close[every, pole] = False
    contest = close.any(1).nonzero()[:, 0]
    lowest = torch.full((len(pole),), torch.inf, dtype=torch.float64)
    if len(contest):
        part = subset(train, contest)
        lowest[contest] = _exact_at(part, alphas[pole[contest]], factor[contest])
    pairs = close.mT.nonzero()  # by alpha, and as many at once as there are factors already
    for some in pairs.split(len(pole)) if len(pairs) else ():
        part, alpha = subset(train, some[:, 1]), alphas[some[:, 0]]
        made, won = part.factor(alpha, factor.dtype), dict[int, int]()
        values = _exact_at(part, alpha, made).tolist()
        for i, ((a, one), value) in enumerate(zip(some.tolist(), values, strict=True)):
            if value < float(lowest[one]) * (1.0 - EQUAL):
                lowest[one], pole[one], won[one] = value, a, i
        if won:
            factor.put(torch.tensor([*won]), made[torch.tensor([*won.values()])])
    return pole, factor


def _exact(train: Training, alphas: torch.Tensor, dtype: torch.dtype) -> Minimum:
    curve = _spectral(train, alphas) if train.device.type == "cpu" else _factored(train, alphas)
    pole = least(curve)
    return Minimum(pole, train.factor(alphas[pole], dtype), curve, torch.zeros_like(curve))


def _factored(train: Training, alphas: torch.Tensor) -> torch.Tensor:
    """GCV at all alphas [M, A], by a factor for each: a GPU's eigenvectors take far longer.

    Infinite where there is no factor in float64, and so no solution.
    """
    curve = torch.empty(len(train), len(alphas), dtype=torch.float64)
    for a, alpha in enumerate(alphas.repeat(len(train), 1).unbind(1)):
        factor, info = Factor.of(train.matrix(alpha, torch.float64))
        curve[:, a] = _exact_at(train, alpha, factor).masked_fill(info.cpu() != 0, torch.inf)
    return curve


def _spectral(train: Training, alphas: torch.Tensor) -> torch.Tensor:
    """GCV at all alphas [M, A], by eigenvectors."""
    zero, grid = torch.zeros(len(train), dtype=torch.float64), _ops.send(alphas, train.device)
    values, vectors = torch.linalg.eigh(train.matrix(zero, torch.float64))
    values = values.clamp_min(0)[:, None]
    rotated = (train.b @ vectors).square()  # [M, k, d]
    inverse = 1.0 / (values + grid[:, None])  # [M, A, d]
    explained = torch.einsum("mkd,mad->mka", rotated, inverse * (1.0 + grid[:, None] * inverse))
    return _gcv_value(train, train.yy[..., None] - explained, (values * inverse).sum(-1)).cpu()


def _walk(
    train: Training,
    alphas: torch.Tensor,
    dtype: torch.dtype,
    pole: torch.Tensor,
    steps: int,
    probes: int,
) -> Minimum:
    """Move each pole to the minimum of its own curve, where the quadrature is exact."""
    m, pole = len(pole), pole.clone()
    signs = torch.randint(0, 2, (probes, train.dim), generator=torch.Generator().manual_seed(0))
    signs = _ops.send((2.0 * signs - 1.0).to(dtype), train.device)
    curve = torch.empty(m, len(alphas), dtype=torch.float64)
    margin = torch.empty_like(curve)
    visited = torch.zeros(m, len(alphas), dtype=torch.bool)
    todo, room, factor = torch.arange(m), None, Factor(torch.empty(0))
    if train.device.type == "cpu":
        room = _ops.kept.empty("factor", m, train.dim, train.dim, dtype=dtype)
    while len(todo):
        if len(todo) == m:  # then no copy of the largest tensors
            part = train
            made = factor = train.factor(alphas[pole], dtype, room)
            room = factor.lower
        else:
            part = subset(train, todo)
            made = part.factor(alphas[pole[todo]], dtype)
            factor.put(todo, made)
        start = torch.cat([part.b.to(dtype), signs.expand(len(todo), -1, -1)], 1)
        krylov = lanczos(made, start, steps, keep=False)
        curve[todo], margin[todo] = _estimate(part, alphas, pole[todo], krylov).cpu()
        visited[todo, pole[todo]] = True
        best = least(curve[todo])
        moves = ~visited[todo, best]
        todo = todo[moves]
        pole[todo] = best[moves]
    return Minimum(pole, factor, curve, margin)


def _estimate(
    part: Training, alphas: torch.Tensor, pole: torch.Tensor, krylov: Lanczos
) -> torch.Tensor:
    """GCV at all alphas [M, A], and how far its ratio to the value at the pole may be off.

    The margin is the tie's, six standard errors of the random trace, and four times what the last
    two Lanczos steps changed.
    """
    grid, at = _ops.send(alphas, part.device), _ops.send(pole, part.device)
    curve, noise = _quadrature(part, grid, at, krylov, krylov.steps)
    before, _ = _quadrature(part, grid, at, krylov, krylov.steps - 2)
    return torch.stack([curve, _TIE + 6.0 * noise + 4.0 * (curve / before - 1.0).abs()])


def _quadrature(
    part: Training, alphas: torch.Tensor, pole: torch.Tensor, krylov: Lanczos, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """GCV at all alphas, and the standard error of its ratio to the value at the pole."""
    nodes, weights = (q[:, :, None] for q in krylov.quadrature(steps))  # [M, r, 1, steps]
    nodes = nodes.clamp_min(0)
    away = (alphas - alphas[pole][:, None])[:, None, :, None]
    # 1 / (lambda + alpha), where 1 / node = lambda + pole
    inverse = nodes / (1.0 + away * nodes).clamp_min(1e-12)
    first, second = (weights * inverse).sum(-1), (weights * inverse.square()).sum(-1)
    k = part.yy.shape[1]
    rss = part.yy[..., None] - first[:, :k] - alphas * second[:, :k]
    df = part.dim - alphas * first[:, k:]  # [M, probes, A]
    free = (part.n[:, None, None] - 1.0 - df).clamp_min(1e-9).log()
    ratio = free - free.take_along_dim(pole[:, None, None], 2)
    return _gcv_value(part, rss, df.mean(1)), 2.0 * ratio.std(1) / df.shape[1] ** 0.5


def _exact_at(part: Training, alpha: torch.Tensor, factor: Factor) -> torch.Tensor:
    """GCV of each training set at its `alpha` [M], by the trace of the inverse: [M], on the CPU."""
    w, alpha = factor.solve(part.b), _ops.send(alpha, part.device)
    rss = part.yy - (w * part.b).sum(-1) - alpha[:, None] * (w * w).sum(-1)
    return _gcv_value(part, rss, part.dim - alpha * factor.inverse_trace()).cpu()


def _gcv_value(part: Training, rss: torch.Tensor, df: torch.Tensor) -> torch.Tensor:
    """Return n RSS / (n - 1 - df)^2, RSS summed over targets; `rss` [M, k, ...], `df` [M, ...]."""
    n = part.n.reshape(-1, *[1] * (df.ndim - 1))
    free = (n - 1.0 - df).clamp_min(1e-9 * n)
    return n * rss.sum(1).clamp_min(0) / free.square()
