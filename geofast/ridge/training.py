"""Training sets: statistics about their own means, their factors, and their rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from .. import _ops
from ..gram import Totals
from .factor import Factor

_SMALL = 256  # up to so many features, float64 and whole spectra cost no more than the quick way


@dataclass(frozen=True)
class Statistics:
    """`Totals` of L cross-validations of one shape, called layers here: float64, on one device."""

    total: torch.Tensor  # [L, p, p]
    held: torch.Tensor  # [L, F, p, p]
    shift: torch.Tensor  # [L, d + k]

    @staticmethod
    def of(totals: Sequence[Totals]) -> Statistics:
        if len(totals) == 1:  # no copies of the largest tensors
            return Statistics(totals[0].total[None], totals[0].held[None], totals[0].shift[None])
        parts = [[getattr(t, name) for t in totals] for name in ("total", "held", "shift")]
        return Statistics(*(torch.stack(part) for part in parts))

    def __getitem__(self, layers: torch.Tensor) -> Statistics:
        at = _ops.send(layers, self.total.device)
        return Statistics(self.total[at], self.held[at], self.shift[at])

    @property
    def folds(self) -> int:
        return self.held.shape[1]


@dataclass(frozen=True)
class Training:
    """Statistics of M training sets about their own means, all float64, layer after layer."""

    stats: Statistics
    sets: torch.Tensor  # int64 [M], on the CPU: which part of all stats.held each leaves out
    n: torch.Tensor  # [M]
    mean: torch.Tensor  # [M, d]
    y_mean: torch.Tensor  # [M, k]
    b: torch.Tensor  # [M, k, d]
    yy: torch.Tensor  # [M, k]

    def __len__(self) -> int:
        return len(self.sets)

    @property
    def dim(self) -> int:
        return self.mean.shape[1]

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def factor(
        self, alpha: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None = None
    ) -> Factor:
        """Cholesky factors of A + alpha I for `alpha` [M], on the CPU; raises NotPositiveError."""
        factor, info = Factor.of(self.matrix(alpha, dtype, out))
        bad = info.cpu() != 0
        if bad.any():
            raise NotPositiveError((self.sets[bad] // self.stats.folds).tolist())
        return factor

    def matrix(
        self, alpha: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """A + alpha I, lower triangles, [M, d, d]."""
        total, held, d = self.stats.total, self.stats.held.flatten(0, 1), self.dim
        total = total[0] if len(total) == 1 else total
        a = _ops.empty(len(alpha), d, d, dtype=dtype, device=self.device) if out is None else out
        alpha = _ops.send(alpha, self.device)
        _ops.backend(self.device).training_matrix(total, held, self.sets, alpha, a)
        return a


class NotPositiveError(Exception):
    """A + alpha I of these layers is not positive definite in the precision at hand."""

    def __init__(self, layers: Iterable[int]) -> None:
        super().__init__()
        self.layers = sorted(set(layers))


class RefusedError(Exception):
    """These layers cannot be solved, for these reasons."""

    def __init__(self, why: Mapping[int, ValueError]) -> None:
        super().__init__()
        self.why = dict(why)


def is_small(dim: int) -> bool:
    """Whether so few features are best solved in float64 and by eigenvectors."""
    return dim <= _SMALL


def training_sets(stats: Statistics, k: int) -> Training:
    """Make every training set of every layer; raises RefusedError."""
    layers, folds, p = stats.held.shape[:3]
    d = p - 1 - k
    # The row of the ones and the rows of the targets are whole in the lower triangle.
    part = (stats.total[:, None, d:] - stats.held[:, :, d:]).flatten(0, 1)
    n, sums = part[:, 0, d], part[:, 0, :d]
    y_sums = part[:, 1:, d]
    mean, y_mean = sums / n[:, None], y_sums / n[:, None]
    b = part[:, 1:, :d] - y_sums[..., None] * mean[:, None]
    squares = part[:, 1:, d + 1 :].diagonal(dim1=1, dim2=2)
    yy = squares - y_sums * y_mean
    shift = stats.shift[:, None, d:].expand(-1, folds, -1).flatten(0, 1)
    constant = yy <= 1e-14 * (squares + n[:, None] * shift**2)
    wrong = torch.cat([n[:, None] < 2, constant], 1).view(layers, folds, -1).any(1).cpu()
    why = {i: _refusal(row) for i, row in enumerate(wrong) if row.any()}
    if why:
        raise RefusedError(why)
    return Training(stats, torch.arange(len(n)), n, mean, y_mean, b, yy)


def _refusal(wrong: torch.Tensor) -> ValueError:
    """Say what is wrong with a layer: too few rows, or which targets [1 + k] are constant."""
    if wrong[0]:
        few = "a training part has fewer than two rows; use fewer folds or more samples"
        return ValueError(few)
    return ValueError(
        f"target {int(wrong[1:].nonzero()[0])} is constant over a training part: there is "
        "nothing to regress; leave it out"
    )


def refuse_constant(constant: torch.Tensor) -> None:
    wrong = constant.cpu()
    if wrong.any():
        raise _refusal(torch.cat([wrong.new_zeros(1), wrong]))


def subset(train: Training, sets: torch.Tensor | slice) -> Training:
    """Return these training sets, of which `sets` (on the CPU) may repeat some."""
    at = sets if isinstance(sets, slice) else _ops.send(sets, train.device)
    fields = {f: getattr(train, f)[at] for f in ("n", "mean", "y_mean", "b", "yy")}
    return replace(train, sets=train.sets[sets], **fields)


@dataclass(frozen=True)
class TrainingRows:
    """The rows themselves: float64 residuals, leave-one-out and held-out predictions."""

    x: torch.Tensor  # [n, d], or of several layers [L, n, d], which have the rest in common
    y: torch.Tensor
    fold: torch.Tensor
    folds: int

    def __getitem__(self, layers: torch.Tensor) -> TrainingRows:
        return replace(self, x=self.x[_ops.send(layers, self.x.device)])

    @property
    def training(self) -> torch.Tensor:
        """Bool [n, F]: who trains for which fold."""
        return self.training_of(torch.arange(self.folds))

    def training_of(self, sets: torch.Tensor) -> torch.Tensor:
        """Bool [n, M]: who trains for which of these training sets of any layer."""
        return self.fold[:, None] != _ops.send(sets % self.folds, self.fold.device)

    @property
    def are_wide(self) -> bool:
        """Whether X X' is the cheaper way: every training part has fewer rows than features."""
        return int(self.training.sum(0).max()) < self.x.shape[-1]
