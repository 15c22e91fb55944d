"""The probe stage: pooled rows in, a table of R2 for every layer out.

5 folds, 12 alphas, two targets, intercept; the same rows and process for everybody. The slow
peers run on fewer layers, since every layer costs them the same; the table compares a layer.
What is timed is checked first: geofast against the study's code and against eigenvectors in
float64, on as much as that leaves time for, the other peers on a small layer.
"""

import numpy as np
import peers
import pytest
import torch
from inputs import layer, study_folds, targets

import geofast as gf
from geofast.geo import fold_scores

N = 5000
SHAPES = {"d768": (12, 768), "d2048": (4, 2048), "d4096": (2, 4096)}


@pytest.fixture(scope="module", params=SHAPES)
def job(request):
    layers, d = SHAPES[request.param]
    xs = [layer(N, d, seed) for seed in range(layers)]
    return xs, targets(N)[0], study_folds(N), f"probe stage N={N} d={d}"


@pytest.fixture(scope="module")
def answer(job):
    """Alphas and R2 by selection of the first layers: of all folds, or of the first where slow."""
    xs, y, fold, _ = job
    d = xs[0].shape[1]
    layers, folds = (2, None) if d < 1000 else (1, 1)
    found = [peers.exact(x, y, fold, folds) for x in xs[:layers]]
    answer = {select: [layer[select] for layer in found] for select in ("gcv", "loo")}
    if d < 4096:  # the study's code takes too long there
        study = [peers.study(x, y, fold) for x in xs[:layers]]
        for (alphas, r2), theirs in zip(answer["loo"], study, strict=True):
            np.testing.assert_allclose(theirs[0][: len(alphas)], alphas, rtol=1e-9)
            np.testing.assert_allclose(theirs[1][: len(r2)], r2, atol=1e-6)
        answer["loo"] = study
    return answer


@pytest.fixture(scope="module")
def small():
    """A small layer, its targets and folds, and the study's mean R2 of it."""
    x, y, fold = layer(1000, 96, 0), targets(1000)[0], study_folds(1000)
    return (x, y, fold), peers.study(x, y, fold)[1].mean()


def table(xs, y, fold, select):
    found = [gf.cross_validate(x, y, fold, select=select) for x in xs]
    scores = fold_scores(torch.stack([s.predictions for s in found]), y, fold)
    return found, scores


def measure(benchmark, group, layers, rounds, function, *args, warm=False):
    benchmark.group = group
    benchmark.extra_info["layers"] = layers
    cold = rounds > 1 and not warm
    benchmark.pedantic(function, args, rounds=rounds, warmup_rounds=1 if cold else 0)


@pytest.mark.parametrize("select", ["gcv", "loo"])
def test_geofast(benchmark, job, answer, select):
    xs, y, fold, group = job
    found, scores = table(xs, y, fold, select)
    for i, (alphas, r2) in enumerate(answer[select]):
        np.testing.assert_allclose(found[i].alpha[: len(alphas)], alphas, rtol=1e-9)
        np.testing.assert_allclose(scores.r2[i, : len(r2)], r2, atol=1e-6)
    measure(benchmark, group, len(xs), 5, table, xs, y, fold, select, warm=True)


@pytest.mark.usefixtures("answer")
def test_study(benchmark, job):
    xs, y, fold, group = job
    if xs[0].shape[1] >= 4096:
        pytest.skip("the study's code takes about eight minutes a layer at d=4096")
    measure(benchmark, group, 1, 1, peers.study, xs[0], y, fold)


# The two choose alpha by other rules than the study, so the third decimal may differ.
def test_torch_cholesky(benchmark, job, small):
    xs, y, fold, group = job
    np.testing.assert_allclose(peers.torch_cholesky(*small[0]).mean(), small[1], atol=1e-3)
    rounds = 3 if xs[0].shape[1] < 1000 else 1
    measure(benchmark, group, 1, rounds, peers.torch_cholesky, xs[0], y, fold)


def test_himalaya(benchmark, job, small):
    xs, y, fold, group = job
    if xs[0].shape[1] > 768:
        pytest.skip("himalaya takes several minutes a layer beyond d=768")
    np.testing.assert_allclose(peers.himalaya(*small[0]).mean(), small[1], atol=1e-3)
    measure(benchmark, group, 1, 1, peers.himalaya, xs[0], y, fold)
