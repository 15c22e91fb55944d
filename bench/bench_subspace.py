"""The dimension search: held-out R2 against the share of dimensions kept, refit.

10 fractions, 5 folds, 12 alphas, two targets, one layer. What comes first is the curve by |coef|
from statistics, which choose alpha in every training part too; then what it takes to make those of
rows, the other rankings, and all four with five random orders. `first solve` is what the probe took
for the layer before: its folds with their inner ones, and the final probe.
So a ratio above 1 says how many curves by |coef| it is worth. scikit-learn refits from rows, as the
study does: RidgeCV over the alphas on each share. One fold and one target of it are timed, a tenth
of a layer, since the layer takes minutes. What is timed is checked first, on a smaller layer,
against scikit-learn's refits in float64.
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
SIZES = {"d384": (5000, 384), "d768": (5000, 768)}


def gram_of(x, y, fold):
    return gf.Gram(x.shape[1], 2, 5).update(x, y, fold)


@pytest.fixture(scope="module", params=SIZES)
def job(request):
    n, d = SIZES[request.param]
    x, y, fold = layer(n, d, 0), targets(n)[0], study_folds(n)
    return x, y, fold, gram_of(x, y, fold)


def group(x):
    return f"dimension search N={len(x)} d={x.shape[1]}"


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


LAYERS = 3


def curves(gram, **options):
    """Of several layers: a run's tables are made once."""
    grams = {f"vision.layers.{i}/cls": gram for i in range(LAYERS)}
    return of_grams(grams, TARGETS, **options)


def timed(benchmark, job, work, note, rounds=3, layers=LAYERS):
    benchmark.group = group(job[0])
    benchmark.extra_info |= {"of": note, "layers": layers}
    benchmark.pedantic(work, rounds=rounds, warmup_rounds=1)


@pytest.mark.usefixtures("checked")
def test_by_coef(benchmark, job):
    timed(benchmark, job, lambda: curves(job[3], rankings=["coef"], random=0), "statistics")


def test_statistics_from_rows(benchmark, job):
    """What a run that keeps rows takes before."""
    x, y, fold, _ = job
    timed(benchmark, job, lambda: gram_of(x, y, fold), "rows", layers=1)


@pytest.mark.parametrize("ranking", ["coef_std", "forward", "backward"])
def test_by_another_ranking(benchmark, job, ranking):
    timed(benchmark, job, lambda: curves(job[3], rankings=[ranking], random=0), ranking)


def test_everything(benchmark, job):
    timed(benchmark, job, lambda: curves(job[3]), "four rankings, five random orders", rounds=2)


@pytest.mark.parametrize("select", ["loo", "gcv"])
def test_first_solve_of_rows(benchmark, job, select):
    x, y, fold, _ = job

    def stage():
        gf.cross_validate(x, y, fold, select=select, inner=True)
        gf.fit(x, y, select=select)

    timed(benchmark, job, stage, "rows", layers=1)


def test_first_solve_of_statistics(benchmark, job):
    def stage():
        gf.solve(job[3], inner=True)
        gf.solve(job[3], folds=torch.zeros(5, dtype=torch.int64))

    timed(benchmark, job, stage, "statistics", layers=1)


@pytest.mark.usefixtures("checked")
def test_scikit_learn(benchmark, job):
    x, y, fold, _ = job
    points, train, value = x.numpy(), (fold != 0).numpy(), y[:, 0].numpy()
    order = np.argsort(-np.abs(Ridge(100.0).fit(points[train], value[train]).coef_))

    def refits():
        for share in FRACTIONS:
            some = points[:, order[: round(x.shape[1] * share)]]
            model = RidgeCV(alphas=gf.ALPHAS).fit(some[train], value[train])
            r2_score(value[~train], model.predict(some[~train]))

    benchmark.group = group(x)
    benchmark.extra_info["layers"] = 0.1  # one of five folds, and of two targets
    benchmark.pedantic(refits, rounds=1)
