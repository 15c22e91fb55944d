"""Cholesky factors, and what is done with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .. import _ops
from .._device import inverse_diagonal

if TYPE_CHECKING:
    from .training import Training


@dataclass(frozen=True)
class Factor:
    """Cholesky factors L of M matrices of one dtype.

    A backend that has `factor` also inverts the diagonal blocks, which its solves then need.
    """

    lower: torch.Tensor  # [M, d, d]; what is above the diagonals is not theirs
    inverses: torch.Tensor | None = None

    @staticmethod
    def of(a: torch.Tensor) -> tuple[Factor, torch.Tensor]:
        """Factor matrices [M, d, d] in place; also int32 [M], 0 for each that is positive definite.

        That it is, must be looked at before a result is used.
        """
        info = torch.zeros(len(a), dtype=torch.int32, device=a.device)
        ops = _ops.backend(a.device)
        if hasattr(ops, "factor"):
            return Factor(a, ops.factor(a, info)), info
        ops.cholesky(a, info)
        return Factor(a), info

    def __len__(self) -> int:
        return len(self.lower)

    def __getitem__(self, sets: torch.Tensor | slice) -> Factor:
        at = sets if isinstance(sets, slice) else _ops.send(sets, self.lower.device)
        return Factor(self.lower[at], None if self.inverses is None else self.inverses[at])

    def put(self, sets: torch.Tensor, others: Factor) -> None:
        """Overwrite the factors with these numbers."""
        at = _ops.send(sets, self.lower.device)
        self.lower[at] = others.lower
        if self.inverses is not None and others.inverses is not None:
            self.inverses[at] = others.inverses

    @property
    def dtype(self) -> torch.dtype:
        return self.lower.dtype

    @property
    def _extra(self) -> dict[str, Any]:
        return {} if self.inverses is None else {"inverses": self.inverses}

    def solve_lower(self, b: torch.Tensor, transpose: bool) -> None:
        """Replace every row x of b[m], of the factor's dtype, by L^-1 x or L^-T x."""
        _ops.backend(b.device).solve_lower(self.lower, b, transpose, **self._extra)

    def solve(self, b: torch.Tensor) -> torch.Tensor:
        """(L L')^-1 b for `b` [M, k, d]: float64 [M, k, d]."""
        w = b.to(self.dtype, copy=True, memory_format=torch.contiguous_format)
        self.solve_lower(w, False)
        self.solve_lower(w, True)
        return w.double()

    def inverse_trace(self) -> torch.Tensor:
        """Trace of (L L')^-1: float64 [M]."""
        trace = torch.empty(len(self), dtype=torch.float64, device=self.lower.device)
        _ops.backend(trace.device).inverse_trace(self.lower, trace, **self._extra)
        return trace

    def inverse_diagonal(self) -> torch.Tensor:
        """Diagonal of (L L')^-1, where no backend of the CPU is needed: float64 [M, d]."""
        return inverse_diagonal(self.lower, **self._extra)

    def leverage(self, x: torch.Tensor, center: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """||L^-1 (x[rows] - center)||^2 of the only matrix: float64 [len(rows)]."""
        out = torch.empty(len(rows), dtype=torch.float64, device=x.device)
        extra = {name: tensor[0] for name, tensor in self._extra.items()}
        _ops.backend(x.device).leverage(self.lower[0], x, center, rows, out, **extra)
        return out

    def leverages(self, x: torch.Tensor, train: Training) -> torch.Tensor:
        """||L^-1 (x - center)||^2 of all rows [L, n, d], each set its layer's: float64 [M, n].

        The sets of `train`, whose matrices these are, are in order.
        """
        out = torch.empty(len(self), x.shape[1], dtype=torch.float64, device=x.device)
        everyone, d, done = torch.arange(x.shape[1], device=x.device), train.dim, 0
        many = torch.bincount(train.sets // train.stats.folds, minlength=len(x))
        for i, count in enumerate(many.tolist()):
            at = slice(done, done + count)
            if count:
                center = train.stats.shift[i, :d] + train.mean[at]
                extra = {name: tensor[at] for name, tensor in self._extra.items()}
                ops = _ops.backend(x.device)
                ops.leverage(self.lower[at], x[i], center, everyone, out[at], **extra)
            done += count
        return out
