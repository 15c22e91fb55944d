"""The probe stage: pooled rows in, a table of R2 for every layer out.

5 folds, 12 alphas, two targets, intercept; the same rows and process for everybody. The slow
peers run on fewer layers, since every layer costs them the same; the table compares a layer.
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
    """The study's alphas and R2 of the first layer; with 4096 dimensions it takes too long."""
    xs, y, fold, _ = job
    return peers.study(xs[0], y, fold) if xs[0].shape[1] < 4096 else None


def table(xs, y, fold, select):
    found = [gf.cross_validate(x, y, fold, select=select) for x in xs]
    scores = fold_scores(torch.stack([s.predictions for s in found]), y, fold)
    return found, scores


def measure(benchmark, group, layers, rounds, function, *args):
    benchmark.group = group
    benchmark.extra_info["layers"] = layers
    return benchmark.pedantic(function, args, rounds=rounds, warmup_rounds=1 if rounds > 1 else 0)


@pytest.mark.parametrize("select", ["gcv", "loo"])
def test_geofast(benchmark, job, answer, select):
    xs, y, fold, group = job
    found, scores = measure(benchmark, group, len(xs), 5, table, xs, y, fold, select)
    assert scores.r2.shape == (len(xs), 5, 2)
    if answer is not None:
        np.testing.assert_allclose(found[0].alpha, answer[0], rtol=1e-9)
        np.testing.assert_allclose(scores.r2[0], answer[1], atol=1e-6)


def test_study(benchmark, job, answer):
    xs, y, fold, group = job
    if answer is None:
        pytest.skip("the study's code takes about eight minutes a layer at d=4096")
    alphas, _ = measure(benchmark, group, 1, 1, peers.study, xs[0], y, fold)
    np.testing.assert_allclose(alphas, answer[0])


def test_torch_cholesky(benchmark, job, answer):
    xs, y, fold, group = job
    r2 = measure(
        benchmark, group, 1, 3 if xs[0].shape[1] < 1000 else 1, peers.torch_cholesky, xs[0], y, fold
    )
    if answer is not None:
        np.testing.assert_allclose(r2.mean(), answer[1].mean(), atol=5e-3)


def test_himalaya(benchmark, job, answer):
    xs, y, fold, group = job
    if xs[0].shape[1] > 768:
        pytest.skip("himalaya takes several minutes a layer beyond d=768")
    r2 = measure(benchmark, group, 1, 1, peers.himalaya, xs[0], y, fold)
    np.testing.assert_allclose(r2.mean(), answer[1].mean(), atol=5e-3)
