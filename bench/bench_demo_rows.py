"""The probe stage on real rows: DINOv2-S on 600 Blue Marble crops, 26 sites and pools."""

import numpy as np
import peers
import pytest
import torch
from inputs import study_folds

import geofast as gf
from geofast.data.demos import dinov2_small, satellite

CROPS = 600


@pytest.fixture(scope="module")
def job():
    samples, model = satellite(CROPS), gf.load(dinov2_small())
    with gf.capture(model, pool=["cls", "mean:patch"]) as rows:
        for part in np.array_split(np.arange(CROPS), CROPS // 20):
            model.forward(model.prepare([samples.load(i) for i in part]))
    y = torch.tensor(samples.table[["latitude", "longitude"]].to_numpy())
    return [rows[key] for key in rows], y, study_folds(CROPS)


@pytest.fixture(scope="module")
def answer(job):
    """Alphas and R2 by selection: the study's, which eigenvectors in float64 confirm, and GCV's."""
    xs, y, fold = job
    study, found = [peers.study(x, y, fold) for x in xs], [peers.exact(x, y, fold) for x in xs]
    check(study, [one["loo"] for one in found])
    return {"loo": study, "gcv": [one["gcv"] for one in found]}


def check(found, answer):
    for (alphas, r2), (want_alphas, want_r2) in zip(found, answer, strict=True):
        # The CLS token before the first layer is the same for every image: no alpha is the best.
        if want_r2.max() > 0:
            np.testing.assert_allclose(alphas, want_alphas, rtol=1e-9)
        np.testing.assert_allclose(r2, want_r2, atol=1e-6)


@pytest.mark.parametrize("select", ["gcv", "loo"])
def test_geofast(benchmark, job, answer, select):
    xs, y, fold = job
    benchmark.group = f"probe stage on the demo's rows: n={CROPS}, d=384, 26 sites and pools"

    def table():
        return [gf.cross_validate(x, y, fold, select=select) for x in xs]

    check([(one.alpha, one.r2) for one in table()], answer[select])
    benchmark.pedantic(table, rounds=5)


@pytest.mark.usefixtures("answer")
def test_study(benchmark, job):
    xs, y, fold = job
    benchmark.group = f"probe stage on the demo's rows: n={CROPS}, d=384, 26 sites and pools"
    benchmark.pedantic(lambda: [peers.study(x, y, fold) for x in xs], rounds=1)
