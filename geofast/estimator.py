"""RidgeCV as a scikit-learn estimator: a thin coat over `ridge.fit` and `ridge.solve`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.model_selection import check_cv
from sklearn.utils.validation import check_is_fitted, validate_data

from .ridge import ALPHAS, Solution, fit, fold_errors
from .ridge.solution import penalties


class RidgeCV(MultiOutputMixin, RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """Ridge regression with an intercept and a cross-validated penalty.

    As scikit-learn's RidgeCV, by the solvers of this package, but for `fit_intercept`, `scoring`
    and `sample_weight`, which it has not, and `best_score_`. NumPy, torch and CuPy arrays are
    taken; what comes out is of the kind that went in.

    Parameters
    ----------
    alphas : sequence of float
        Penalties to choose from, all positive.
    cv : None, "gcv", int or splitter
        None chooses by exact leave-one-out errors, "gcv" by generalised cross-validation, an int
        or a scikit-learn splitter by the mean squared error over its folds.
    alpha_per_target : bool
        Choose a penalty for every target instead of one for all.

    Attributes
    ----------
    alpha_ : float, or array [n_targets] with `alpha_per_target`
    coef_ : array [n_targets, n_features], or [n_features] for a 1-d target
    intercept_ : array [n_targets], or float for a 1-d target
    n_features_in_ : int

    References
    ----------
    The choice by leave-one-out follows Rifkin and Lippert, MIT-CSAIL-TR-2007-025.
    """

    def __init__(
        self, alphas: Sequence[float] = ALPHAS, *, cv: Any = None, alpha_per_target: bool = False
    ) -> None:
        self.alphas = alphas
        self.cv = cv
        self.alpha_per_target = alpha_per_target

    def fit(self, X: Any, y: Any) -> RidgeCV:
        """Fit to rows [n_samples, n_features] and targets [n_samples] or [n_samples, n_targets]."""
        like = X
        X, y = validate_data(
            self, _to_numpy(X), _to_numpy(y), multi_output=True, y_numeric=True,
            dtype=[np.float64, np.float32, np.float16], ensure_min_samples=2,
        )  # fmt: skip
        x = torch.from_numpy(np.require(X, requirements=["C", "W"]))
        targets = torch.from_numpy(np.array(y, dtype=np.float64).reshape(len(y), -1))
        penalties(self.alphas)  # refused before anything else
        columns = targets.split(1, dim=1) if self.alpha_per_target else [targets]
        # A constant target is no error to an estimator: its best ridge is its mean.
        found = [self._fit(x, column) for column in columns]
        alpha = torch.cat([s.alpha for s in found])
        coef = torch.cat([s.coef[0].mT for s in found])
        intercept = torch.cat([s.intercept[0] for s in found])
        flat = y.ndim == 1
        self.alpha_ = _like(alpha, like) if self.alpha_per_target else float(alpha[0])
        self.coef_ = _like(coef[0] if flat else coef, like)
        self.intercept_ = float(intercept[0]) if flat else _like(intercept, like)
        return self

    def predict(self, X: Any) -> Any:
        """Predict targets of rows [n_samples, n_features]."""
        check_is_fitted(self)
        rows = validate_data(
            self, _to_numpy(X), reset=False, dtype=[np.float64, np.float32, np.float16]
        )
        coef, intercept = _to_numpy(self.coef_), _to_numpy(self.intercept_)
        return _like(torch.from_numpy(rows.astype(np.float64) @ coef.T + intercept), X)

    def _fit(self, x: torch.Tensor, y: torch.Tensor) -> Solution:
        varies = (y != y[0]).any(0)
        if not bool(varies.any()):
            d, k = x.shape[1], y.shape[1]
            zero = torch.zeros(1, d, k, dtype=torch.float64)
            alpha = torch.tensor([max(self.alphas)], dtype=torch.float64)
            return Solution(alpha, zero, y[:1], None, None, None, None, "constant target")
        if not bool(varies.all()):
            found = self._fit(x, y[:, varies])
            coef = torch.zeros(1, x.shape[1], y.shape[1], dtype=torch.float64)
            intercept = y[:1].clone()
            coef[..., varies], intercept[:, varies] = found.coef, found.intercept
            return Solution(found.alpha, coef, intercept, None, None, None, None, found.method)
        if self.cv is None or self.cv == "gcv":
            return fit(x, y, self.alphas, select=self.cv or "loo")
        return self._fit_folds(x, y)

    def _fit_folds(self, x: torch.Tensor, y: torch.Tensor) -> Solution:
        fold = torch.full((len(x),), -1)
        for f, (_, test) in enumerate(check_cv(self.cv).split(x.numpy(), y.numpy())):
            if bool((fold[test] >= 0).any()):
                raise ValueError(
                    f"cv={self.cv!r} tests a sample twice; its folds must partition the samples"
                )
            fold[test] = f
        if bool((fold < 0).any()):
            raise ValueError(
                f"cv={self.cv!r} leaves samples untested; its folds must partition the samples"
            )
        errors = fold_errors(x, y, fold, self.alphas).mean(0)
        return fit(x, y, [self.alphas[int(errors.argmin())]], select="gcv")


def _to_numpy(a: Any) -> Any:
    if isinstance(a, torch.Tensor):
        a = a.detach()
        return (a.float() if a.dtype == torch.bfloat16 else a).cpu().numpy()
    return a.get() if type(a).__module__.partition(".")[0] == "cupy" else a


def _like(a: torch.Tensor, like: Any) -> Any:
    if isinstance(like, torch.Tensor):
        return a.to(like.device)
    if type(like).__module__.partition(".")[0] == "cupy":
        import cupy

        return cupy.asarray(a.numpy())
    return a.numpy()
