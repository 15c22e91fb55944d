"""The peers: other ways to the same table of R2, written as their users would."""

import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.linear_model import RidgeCV
from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

import geofast as gf


def study(x, y, fold):
    """Probe one layer as the study does: scikit-learn's RidgeCV inside every fold."""
    x, y, fold = x.numpy(), y.numpy(), fold.numpy()
    alphas, scores = [], []
    for f in range(fold.max() + 1):
        train, test = fold != f, fold == f
        model = RidgeCV(alphas=gf.ALPHAS).fit(x[train], y[train])
        guess = model.predict(x[test])
        mean_squared_error(y[test], guess)
        mean_absolute_error(y[test], guess)
        spearmanr(y[test], guess)
        alphas.append(model.alpha_)
        scores.append(r2_score(y[test], guess, multioutput="raw_values"))
    return np.array(alphas), np.array(scores)


def exact(x, y, fold, folds=None):
    """Probe one layer by leave-one-out and by GCV from eigenvectors, in plain torch float64.

    Returns alphas [folds] and R2 [folds, k] for "loo" and for "gcv", of the first `folds` folds.
    """
    found = {"loo": [], "gcv": []}
    for f in range(int(fold.max()) + 1 if folds is None else folds):
        train = fold != f
        for select, (alpha, w, mean, y_mean) in _least(x[train].double(), y[train]).items():
            guess = (x[~train].double() - mean) @ w + y_mean
            found[select].append((alpha, r2_score(y[~train], guess, multioutput="raw_values")))
    return {k: [np.array(v) for v in zip(*pairs, strict=True)] for k, pairs in found.items()}


def _least(x, y):
    """Alpha, coefficients and means at the least of each of the two curves."""
    alphas = torch.tensor(gf.ALPHAS, dtype=torch.float64)
    mean, y_mean, n = x.mean(0), y.mean(0), len(x)
    x, y = x - mean, y - y_mean
    values, vectors = torch.linalg.eigh(x.T @ x)
    values, turned = values.clamp_min(0), x @ vectors
    inverse = 1.0 / (values + alphas[:, None])  # [A, d]
    w = vectors @ (inverse[..., None] * (turned.T @ y))  # [A, d, k]
    error = y - x @ w
    leverage = 1 / n + inverse @ turned.square().T  # [A, n]
    curves = {
        "loo": (error / (1 - leverage)[..., None]).square().mean((1, 2)),
        "gcv": error.square().sum((1, 2)) / (n - 1 - (values * inverse).sum(1)).square(),
    }
    return {k: (float(alphas[c.argmin()]), w[c.argmin()], mean, y_mean) for k, c in curves.items()}


def himalaya(x, y, fold):
    """Probe one layer by himalaya's RidgeCV on its torch backend, inside every fold."""
    from himalaya.backend import set_backend
    from himalaya.ridge import RidgeCV as HimalayaRidgeCV

    set_backend("torch", on_error="raise")
    scores = []
    for f in range(int(fold.max()) + 1):
        train, test = fold != f, fold == f
        model = HimalayaRidgeCV(alphas=list(gf.ALPHAS), fit_intercept=True, cv=5)
        model.fit(x[train], y[train].float())
        guess = model.predict(x[test]).double()
        scores.append(r2_score(y[test], guess, multioutput="raw_values"))
    return np.array(scores)


def torch_cholesky(x, y, fold):
    """Probe one layer in plain torch float64: Grams by fold, a Cholesky for every fold and alpha.

    The alpha is the one of least held-out error over all folds, which costs nothing further; the
    choice by leave-one-out or GCV would cost it much more.
    """
    x, folds = x.double(), int(fold.max()) + 1
    alphas = torch.tensor(gf.ALPHAS, dtype=torch.float64)
    eye = torch.eye(x.shape[1], dtype=torch.float64)
    parts = [(x[fold == f], y[fold == f]) for f in range(folds)]
    grams = torch.stack([a.T @ a for a, _ in parts])
    cross = torch.stack([a.T @ b for a, b in parts])
    sums, y_sums = (
        torch.stack([a.sum(0) for a, _ in parts]),
        torch.stack([b.sum(0) for _, b in parts]),
    )
    r2 = torch.empty(folds, len(alphas), y.shape[1], dtype=torch.float64)
    for f, (xt, yt) in enumerate(parts):
        n = len(x) - len(xt)
        mean, y_mean = (sums.sum(0) - sums[f]) / n, (y_sums.sum(0) - y_sums[f]) / n
        a = grams.sum(0) - grams[f] - n * torch.outer(mean, mean)
        b = cross.sum(0) - cross[f] - n * torch.outer(mean, y_mean)
        for i, alpha in enumerate(alphas):
            w = torch.cholesky_solve(b, torch.linalg.cholesky(a + alpha * eye))
            error = yt - y_mean - (xt - mean) @ w
            r2[f, i] = 1 - error.square().sum(0) / (yt - yt.mean(0)).square().sum(0)
    return r2[:, r2.mean((0, 2)).argmax()].numpy()
