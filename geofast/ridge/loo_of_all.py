"""The same search as `loo`, for all training sets of many layers at once: what a GPU wants.

Each round takes one penalty of every set that is still open, and the host waits a few times a
round, however many sets there are. Nothing is computed by parts of the rows: what that saves is
less than the waiting.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import _ops
from .factor import Factor
from .gcv import Minimum
from .lanczos import lanczos
from .loo import SLACK, STEPS
from .refine import predict, project, project_t, refine, training_errors
from .solution import EQUAL, least
from .training import Training, TrainingRows, subset


def select_loo_of_all(
    train: Training, alphas: torch.Tensor, rows: TrainingRows, start: Minimum
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find the minimum of the exact leave-one-out error over all alphas, as `loo.select_loo` does.

    Of all sets [M] of the layers of `rows`, whose x is [layers, n, d]. Returns the index of its
    alpha [M], on the CPU, and, refined there, w [M, k, d] and projections [n, M, k].
    """
    search = _Search.of(train, alphas, rows, start)
    m, count = len(train), len(alphas)
    values = torch.full((m, count), torch.inf, dtype=torch.float64)
    floor, known = search.least_errors().cpu(), torch.zeros(m, count, dtype=torch.bool)
    sets, wanted = torch.arange(m), start.pole
    rounds = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]()
    while len(sets):
        part = train if len(sets) == m else subset(train, sets)
        factor = start.factor
        if rounds:
            factor = part.factor(alphas[wanted], factor.dtype)
        w, projected = refine(part, factor, alphas[wanted], rows)
        assert projected is not None
        error = training_errors(part, rows, projected, rows.training_of(part.sets))
        values[sets, wanted] = search.add(part, factor, sets, wanted, error).cpu()
        rounds.append((sets, wanted, w, projected))
        known[sets, wanted] = True
        floor = torch.maximum(floor, search.bounds(known).cpu())
        sets, wanted = _open(values, known, floor, start.curve)
    best = least(values)
    w, projected = torch.empty_like(rounds[0][2]), torch.empty_like(rounds[0][3])
    for sets, tried, found, its in rounds:
        mine = (best[sets] == tried).nonzero()[:, 0]
        at, to = _ops.send(mine, train.device), _ops.send(sets[mine], train.device)
        w[to], projected[:, to] = found[at], its[:, at]
    return best, w, projected


def _open(
    values: torch.Tensor, known: torch.Tensor, floor: torch.Tensor, gcv: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sets whose minimum may lie elsewhere, and the nearest place where it may; on the CPU."""
    number, best = torch.arange(values.shape[1]), least(values)[:, None]
    # A smaller alpha wins ties.
    limit = values.gather(1, best) * (1.0 + torch.where(number < best, EQUAL, -EQUAL))
    still = ~known & (floor <= limit)
    sets = still.any(1).nonzero()[:, 0]
    # Of two that are as near, that of less GCV.
    away = (number - best).abs() + 0.5 * gcv / gcv.amax(1, keepdim=True).clamp_min(1e-300)
    return sets, away.masked_fill(~still, torch.inf)[sets].argmin(1)


@dataclass(frozen=True)
class _Search:
    """What is known of the leave-one-out errors of M training sets at A penalties."""

    train: Training
    rows: TrainingRows
    alphas: torch.Tensor
    errors: torch.Tensor  # [n, M, A, k]: those of near-solutions, 0 where a row does not train
    radius: torch.Tensor  # [M, A, k]: how far the solutions' own errors are from these, at most
    leverages: torch.Tensor  # [A, M, n], where they are known; 0 where a row does not train

    @classmethod
    def of(
        cls, train: Training, alphas: torch.Tensor, rows: TrainingRows, start: Minimum
    ) -> _Search:
        m, k, d = train.b.shape
        n, count, grid = len(rows.y), len(alphas), _ops.send(alphas, train.device)
        pole = _ops.send(alphas[start.pole], train.device)[:, None]
        krylov = lanczos(start.factor, train.b.to(start.factor.dtype), STEPS, keep=True)
        guesses = krylov.solve(grid - pole).contiguous()
        training = rows.training_of(train.sets)
        at_each = project(rows.x, train, guesses.view(m, count * k, d)).reshape(n, m * count, k)
        everywhere = training[..., None].expand(-1, -1, count).flatten(1)
        fit = predict(train, rows, at_each, everywhere).view(n, m, count, k)
        errors = fit.neg_().add_(rows.y[:, None, None]).mul_(training[:, :, None, None])
        residual = project_t(rows.x, train, errors.view(n, m, -1)).view_as(guesses)
        # As in `loo`: |L^-1 r| bounds what is left of the residual r.
        half = (residual - grid[:, None, None] * guesses).view(m, -1, d).to(start.factor.dtype)
        start.factor.solve_lower(half, False)
        stretch = (pole / grid).clamp_min(1.0).sqrt()[..., None]
        radius = half.double().norm(dim=-1).view(m, count, k) * stretch
        return cls(train, rows, grid, errors, radius, errors.new_zeros(count, m, n))

    def least_errors(self) -> torch.Tensor:
        """Return training errors, which grow with alpha: leave-one-out errors are no less."""
        size = (self.errors.norm(dim=0) - self.radius).clamp_min(0)
        found: torch.Tensor = (size.square().mean(-1) / self.train.n[:, None]).cummax(1).values
        return found

    def add(
        self,
        part: Training,
        factor: Factor,
        sets: torch.Tensor,
        wanted: torch.Tensor,
        error: torch.Tensor,
    ) -> torch.Tensor:
        """Return the exact value of `sets` at the `wanted` alphas, from training errors [n, M, k].

        Their leverages are kept.
        """
        training = self.rows.training_of(part.sets)
        leverage = factor.leverages(self.rows.x, part).mul_(training.mT)
        at, to = (_ops.send(one, part.device) for one in (wanted, sets))
        self.leverages[at, to] = leverage
        loss = (error / self._free(leverage, part.n).mT[..., None]).square()
        value: torch.Tensor = loss.mean(-1).sum(0) / part.n
        return value

    def bounds(self, known: torch.Tensor) -> torch.Tensor:
        """Lower bounds of the leave-one-out errors [M, A]; `known` is on the CPU."""
        m, count = known.shape
        out = self.errors.new_zeros(m, count)
        number = torch.arange(count)
        for a in range(count):
            if bool(known[:, a].all()):
                continue
            # The two nearest on both sides, the nearer first; `count` and -1 where there is none.
            below = torch.where(known[:, :a], number[:a], -1)
            below = torch.cat([below, below.new_full((m, 2), -1)], 1).topk(2).values
            above = torch.where(known[:, a + 1 :], number[a + 1 :], count)
            above = torch.cat([above, above.new_full((m, 2), count)], 1)
            out[:, a] = self._bound(a, below.flip(1), above.topk(2, largest=False).values)
        return out

    def _bound(self, a: int, below: torch.Tensor, above: torch.Tensor) -> torch.Tensor:
        count, train = len(self.alphas), self.train
        every = torch.arange(len(train), device=train.device)
        tables = torch.stack([below, above]).permute(0, 2, 1)  # [side, one and two, M]
        there = _ops.send((tables >= 0) & (tables < count), train.device)[..., None]
        tables = _ops.send(tables.clamp(0, count - 1), train.device)
        # Leverages fall with alpha, and the line through two of 1 / h is above it beyond them.
        lowest = self.leverages[tables[1, 0], every] * (1.0 - SLACK) * there[1, 0]
        for side in (0, 1):
            one, two = (1.0 / self.leverages[t, every].clamp_min(1e-30) for t in tables[side])
            first, second = (self.alphas[t, None] for t in tables[side])
            both = there[side].all(0)
            step = torch.where(both, second - first, 1.0)
            t = (self.alphas[a] - first) / step
            line = one + t * (two - one) + SLACK * (1.0 + t.abs()) * (one + two)
            lowest = torch.maximum(lowest, torch.where(both, 1.0 / line, 0.0))
        weight = 1.0 / self._free(lowest, train.n)
        size = (weight.mT[..., None] * self.errors[:, :, a]).norm(dim=0)
        size -= weight.amax(1)[:, None] * self.radius[:, a]
        bound: torch.Tensor = size.clamp_min(0).square().mean(-1) / train.n
        return bound

    @staticmethod
    def _free(leverage: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        return (1.0 - leverage - 1.0 / n[:, None]).clamp_min(1e-12)
