"""The dimension search: held-out R2 against the share of dimensions kept, refit.

10 fractions, 5 folds, 12 alphas, two targets, one layer. geofast has the statistics, as a run keeps
them, and chooses alpha in every training part; its time is that of one ranking, and of all. The
solve stage is what a probe took before, from rows or from statistics. scikit-learn refits from
rows, as the study does: RidgeCV over the alphas on each share. One fold and one target of it are
timed, a tenth of a layer, since the layer takes minutes. What is timed is checked first, on a
smaller layer, against scikit-learn's refits in float64.
"""

import numpy as np
import pytest
import torch
from inputs import layer, study_folds, targets
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.metrics import r2_score

import geofast as gf
from geofast.subspace.measure import FRACTIONS, of_grams

TARGETS = ("latitude", "longitude")
N, D = 5000, 768
GROUP = f"dimension search N={N} d={D}"


def gram_of(x, y, fold):
    return gf.Gram(x.shape[1], 2, 5).update(x, y, fold)


@pytest.fixture(scope="module")
def job():
    x, y, fold = layer(N, D, 0), targets(N)[0], study_folds(N)
    return x, y, fold, gram_of(x, y, fold)


@pytest.fixture(scope="module")
def checked():
    """One curve on a smaller layer, equal to refits of the rows."""
    n, d = 1000, 96
    x, y, fold = layer(n, d, 1), targets(n)[0], study_folds(n)
    gram = gram_of(x, y, fold)
    found = of_grams({"a/cls": gram}, TARGETS, rankings=["coef"], random=0).curves
    alphas, points = gf.solve(gram).alpha.tolist(), x.double().numpy()
    for t, target in enumerate(TARGETS):
        scores = np.empty((5, len(FRACTIONS)))
        for f, alpha in enumerate(alphas):
            train, value = (fold != f).numpy(), y[:, t].numpy()
            fit = Ridge(alpha, solver="cholesky").fit
            order = np.argsort(-np.abs(fit(points[train], value[train]).coef_))
            for i, share in enumerate(FRACTIONS):
                some = points[:, order[: round(d * share)]]
                guess = fit(some[train], value[train]).predict(some[~train])
                scores[f, i] = r2_score(value[~train], guess)
        ours = found[found["target"] == target]["r2"]
        np.testing.assert_allclose(ours, scores.mean(0), atol=1e-8)


def curves(gram, **options):
    return of_grams({"vision.layers.0/cls": gram}, TARGETS, **options)


@pytest.mark.parametrize("ranking", ["coef", "coef_std", "forward", "backward"])
@pytest.mark.usefixtures("checked")
def test_geofast(benchmark, job, ranking):
    benchmark.group = GROUP
    options = {"rankings": [ranking], "random": 0}
    benchmark.pedantic(curves, (job[3],), options, rounds=3, warmup_rounds=1)


@pytest.mark.usefixtures("checked")
def test_geofast_everything(benchmark, job):
    """All rankings, and five random orders."""
    benchmark.group = GROUP
    benchmark.pedantic(curves, (job[3],), rounds=2)


@pytest.mark.parametrize("kept", ["rows", "statistics"])
def test_solve_stage(benchmark, job, kept):
    """What the probe took to solve the layer: its folds, with inner ones, and the final probe."""
    x, y, fold, gram = job

    def rows():
        gf.cross_validate(x, y, fold, inner=True)
        gf.fit(x, y)

    def statistics():
        gf.solve(gram, inner=True)
        gf.solve(gram, folds=torch.zeros(5, dtype=torch.int64))

    benchmark.group = GROUP
    benchmark.pedantic(rows if kept == "rows" else statistics, rounds=3, warmup_rounds=1)


@pytest.mark.usefixtures("checked")
def test_scikit_learn(benchmark, job):
    x, y, fold, _ = job
    points, train, value = x.numpy(), (fold != 0).numpy(), y[:, 0].numpy()
    order = np.argsort(-np.abs(Ridge(100.0).fit(points[train], value[train]).coef_))

    def refits():
        for share in FRACTIONS:
            some = points[:, order[: round(D * share)]]
            model = RidgeCV(alphas=gf.ALPHAS).fit(some[train], value[train])
            r2_score(value[~train], model.predict(some[~train]))

    benchmark.group = GROUP
    benchmark.extra_info["layers"] = 0.1  # one of five folds, and of two targets
    benchmark.pedantic(refits, rounds=1)
