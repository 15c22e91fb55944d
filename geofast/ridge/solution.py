"""What every solver returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

ALPHAS = tuple(float(a) for a in torch.logspace(-1, 4, 12, dtype=torch.float64))
"""Those of Locatelli et al. (ICML 2026, arXiv 2606.07172): 12 from 0.1 to 10,000, log-spaced."""

EQUAL = 1e-12  # relative; scores closer than this are a tie, which the smaller penalty wins

Select = Literal["gcv", "loo", "folds"]


@dataclass(frozen=True)
class Solution:
    """Ridge solutions of F training sets; tensors are float64.

    Held-out scores are there when there was something to hold out.
    """

    alpha: torch.Tensor
    """[F]: the penalty chosen for each training set."""
    coef: torch.Tensor
    """[F, d, k]."""
    intercept: torch.Tensor
    """[F, k]."""
    r2: torch.Tensor | None
    """[F, k]: R2 on the held-out part, about its own mean; NaN where a target is constant."""
    mse: torch.Tensor | None
    """[F, k]: mean squared error on the held-out part."""
    predictions: torch.Tensor | None
    """[n, k]: held-out predictions in the order of the rows; only when rows were given."""
    inner_r2: torch.Tensor | None
    """[F, k]: mean R2 on the inner folds of each training set, at its alpha; when asked for."""
    method: str
    """What ran, in words: selection and precision."""

    def cpu(self) -> Solution:
        """Return it with all tensors on the CPU."""
        tensors: dict[str, Any] = {
            n: t.cpu() for n, t in vars(self).items() if isinstance(t, torch.Tensor)
        }
        return replace(self, **tensors)


def penalties(alphas: Sequence[float]) -> torch.Tensor:
    """Return the penalties in ascending order: float64 [A]; refuses one that is not positive."""
    grid = torch.as_tensor(alphas, dtype=torch.float64).reshape(-1).sort().values
    if not len(grid) or not bool(((grid > 0) & grid.isfinite()).all()):
        raise ValueError(f"alphas must be positive and finite; got {alphas}")
    return grid


def least(curve: torch.Tensor) -> torch.Tensor:
    """Index of the least value along the last dimension; of equal ones the first.

    Equal up to rounding: where features do not vary, every penalty does as well.
    """
    return (curve <= curve.amin(-1, keepdim=True) * (1.0 + EQUAL)).to(torch.uint8).argmax(-1)
