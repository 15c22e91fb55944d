"""The penalty of least exact leave-one-out error: branch and bound over the grid.

The leverage of row i, h = sum_j c_j / (l_j + alpha) with c_j >= 0, is a Stieltjes function of
alpha, so 1/h is concave: beyond two alphas where it is known, the line through them bounds it from
above, and h from below. With the training errors e, which are cheap at any alpha, that bounds the
leave-one-out error, the mean of e^2 / (1 - h)^2, from below. Leverages, the dear part, are computed
at the minimum, at one neighbour, and wherever the bound leaves a chance.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch

from .. import _ops
from .factor import Factor
from .gcv import Minimum
from .lanczos import lanczos
from .refine import refine, training_errors
from .solution import EQUAL
from .training import Training, TrainingRows, subset

STEPS = 16  # Lanczos steps for the errors at other alphas; what they lack widens the bound
_BEYOND = 3  # alphas above the minimum for which training errors are computed at once
_CHUNKS = 8  # parts in which the rows of an alpha that may be out are taken
SLACK = 1e-4  # relative error allowed for a leverage from a float32 factor


def select_loo(
    train: Training, alphas: torch.Tensor, rows: TrainingRows, start: Minimum
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find the minimum of the exact leave-one-out error over all alphas.

    Of one layer, on the CPU; `select_loo_of_all` does it elsewhere. Returns the index of its alpha
    [M], on the CPU, and, refined there, w [M, k, d] and projections [n, M, k].
    """
    shifts = _ops.send(alphas - alphas[start.pole][:, None], train.device)
    krylov = lanczos(start.factor, train.b.to(start.factor.dtype), STEPS, keep=True)
    guesses = krylov.solve(shifts)
    curves = [
        _Curve(subset(train, slice(i, i + 1)), rows, i, alphas, guesses[i], start)
        for i in range(len(train))
    ]
    best = [int(p) for p in start.pole]
    solutions: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
    wanted = set(zip(best, range(len(best)), strict=True))
    while wanted:
        for a, sets in _by_alpha(wanted):
            alpha = alphas[a].repeat(len(sets))
            part = subset(train, sets)
            factor = start.factor_at(train, alphas, a, sets)
            w, projected = refine(part, factor, alpha, rows)
            assert projected is not None
            error = training_errors(part, rows, projected, rows.training_of(sets))
            for j, i in enumerate(sets.tolist()):
                curves[i].add(a, factor[j : j + 1], error[:, j])
                solutions[a, i] = w[j], projected[:, j]
        upcoming = [(curve.next(), i) for i, curve in enumerate(curves)]
        wanted = {(a, i) for a, i in upcoming if a is not None}
    best = [curve.best for curve in curves]
    found = [solutions[a, i] for i, a in enumerate(best)]
    return (
        torch.tensor(best),
        torch.stack([w for w, _ in found]),
        torch.stack([p for _, p in found], 1),
    )


def _by_alpha(wanted: Iterable[tuple[int, int]]) -> list[tuple[int, torch.Tensor]]:
    groups = itertools.groupby(sorted(wanted), key=lambda pair: pair[0])
    return [(a, torch.tensor([i for _, i in group])) for a, group in groups]


class _Curve:
    """The leave-one-out errors of one training set: exact at some alphas, bounded at the others."""

    def __init__(
        self,
        part: Training,
        rows: TrainingRows,
        index: int,
        alphas: torch.Tensor,
        guesses: torch.Tensor,
        start: Minimum,
    ) -> None:
        self.part, self.rows, self.gcv = part, rows, start.curve[index]
        self.alphas = _ops.send(alphas, part.device)
        self.who = rows.training[:, index].nonzero()[:, 0]
        self.values: dict[int, float] = {}
        self.leverages: dict[int, torch.Tensor] = {}
        self.factor, self.guesses = start.factor[index : index + 1], guesses.contiguous()
        self.pole = alphas[start.pole[index]]
        self.errors = guesses.new_empty(len(self.who), 0, guesses.shape[1])
        self.radius = guesses.new_empty(0, guesses.shape[1])
        self.floor = torch.zeros(len(alphas), dtype=torch.float64)  # on the CPU, where it decides
        # A few alphas beyond the minimum, training errors alone tend to rule out the others.
        self._reach(int(start.pole[index]) + _BEYOND)

    @property
    def best(self) -> int:
        lowest = min(self.values.values())
        return min(a for a, value in self.values.items() if value <= lowest * (1.0 + EQUAL))

    def add(self, a: int, factor: Factor, error: torch.Tensor) -> None:
        """Find the exact value at alpha number `a`, or that it is not the least.

        `error` [n, k] are the training errors. Rows that are likely to add most come first, so that
        an alpha which is out shows it soon; the first two are finished, because bounds need them.
        """
        error = error[self.who]
        least = self._least_leverage(a)
        losses = self._losses(error, least)
        order = (losses * least / (1.0 - least).clamp_min(1e-12)).argsort(descending=True)
        center = self.part.stats.shift[0, : self.part.dim] + self.part.mean[0]
        for rows in order.chunk(_CHUNKS if len(self.leverages) > 1 else 1):
            self.floor[a] = losses.mean()
            if self.values and self.floor[a] > self.values[self.best] * (1.0 + EQUAL):
                return
            leverage = factor.leverage(self.rows.x, center, self.who[rows])
            least[rows] = leverage
            losses[rows] = self._losses(error[rows], leverage)
        self.values[a] = float(losses.mean())
        self.leverages[a] = least

    def _losses(self, error: torch.Tensor, leverage: torch.Tensor) -> torch.Tensor:
        """Squared leave-one-out errors of rows, mean over targets."""
        free = (1.0 - leverage - 1.0 / self.part.n).clamp_min(1e-12)
        return (error / free[:, None]).square().mean(1)

    def next(self) -> int | None:
        """Return the nearest alpha that could still be the minimum, or None."""
        still = self._open()
        if still:
            bounds = torch.stack([self._bound(a) for a in still]).cpu()
            self.floor[still] = torch.maximum(self.floor[still], bounds)
        best = self.best
        return min(self._open(), key=lambda a: (abs(a - best), float(self.gcv[a])), default=None)

    def _open(self) -> list[int]:
        best = self.best
        lowest = self.values[best]
        # A smaller alpha wins ties.
        limits = [lowest * (1.0 + (EQUAL if a < best else -EQUAL)) for a in range(len(self.alphas))]
        return [a for a, m in enumerate(limits) if a not in self.values and self.floor[a] <= m]

    def _reach(self, a: int) -> None:
        """Have the errors up to alpha number `a`."""
        known = self.errors.shape[1]
        if a < known:
            return
        error, radius = self._errors(self.alphas[known : a + 1], self.guesses[known : a + 1])
        self.errors, self.radius = (
            torch.cat([self.errors, error], 1),
            torch.cat([self.radius, radius]),
        )
        # Training errors, which grow with alpha, are the least that leave-one-out errors can be.
        size = (error.norm(dim=0) - radius).clamp_min(0)
        least = (size.square().mean(-1) / len(self.who)).cummax(0).values.cpu()
        self.floor[known : known + len(least)] = least
        self.floor[known + len(least) :] = least[-1]

    def _errors(
        self, alphas: torch.Tensor, guesses: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Errors [n', A, k] of near-solutions [A, k, d], and how far the solutions' are at most.

        With r the residual of the normal equations and L the factor at the pole, the fits differ
        by a square of at most r' (A + alpha I)^-1 r <= max(1, pole / alpha) |L^-1 r|^2.
        """
        count, k, d = guesses.shape
        ops, shift = _ops.backend(self.rows.x.device), self.part.stats.shift[0, :d]
        fit = guesses.new_empty(len(self.who), count * k)
        ops.project(self.rows.x, shift, guesses.reshape(-1, d), fit, rows=self.who)
        y = self.rows.y[self.who]
        error = ((y - y.mean(0))[:, None] - (fit - fit.mean(0)).view(-1, count, k)).contiguous()
        residual = guesses.new_empty(count * k, d)
        ops.project_t(self.rows.x, shift, error.view(-1, count * k), residual, rows=self.who)
        residual = residual.view_as(guesses) - alphas[:, None, None] * guesses
        half = residual.view(1, -1, d).to(self.factor.dtype)
        self.factor.solve_lower(half, False)
        stretch = (self.pole / alphas).clamp_min(1.0).sqrt()
        return error, half.double().norm(dim=-1).view(count, k) * stretch[:, None]

    def _bound(self, a: int) -> torch.Tensor:
        """Return a lower bound of the leave-one-out error at alpha number `a`."""
        self._reach(a)
        weight = 1.0 / (1.0 - self._least_leverage(a) - 1.0 / self.part.n).clamp_min(1e-12)
        size = (weight[:, None] * self.errors[:, a]).norm(dim=0) - weight.max() * self.radius[a]
        bound: torch.Tensor = size.clamp_min(0).square().mean() / len(self.who)
        return bound

    def _least_leverage(self, a: int) -> torch.Tensor:
        alpha, known = self.alphas[a], sorted(self.leverages)
        below, above = [b for b in known if b < a], [b for b in known if b > a]
        least = torch.zeros(len(self.who), dtype=torch.float64, device=self.who.device)
        if above:  # leverages fall with alpha
            least = self.leverages[above[0]] * (1.0 - SLACK)
        for pair in (below[-2:], above[:2]):
            if len(pair) == 2:
                one, two = (1.0 / self.leverages[b].clamp_min(1e-30) for b in pair)
                t = (alpha - self.alphas[pair[0]]) / (self.alphas[pair[1]] - self.alphas[pair[0]])
                line = one + t * (two - one) + SLACK * (1.0 + t.abs()) * (one + two)
                least = torch.maximum(least, 1.0 / line)
        return least
