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
    xs, y, fold = job
    return [peers.study(x, y, fold) for x in xs]


@pytest.mark.parametrize("select", ["loo", "gcv"])
def test_geofast(benchmark, job, answer, select):
    xs, y, fold = job
    benchmark.group = f"probe stage on the demo's rows: n={CROPS}, d=384, 26 sites and pools"

    def table():
        return [gf.cross_validate(x, y, fold, select=select) for x in xs]

    found = benchmark.pedantic(table, rounds=5, warmup_rounds=1)
    if select == "loo":
        for mine, (alphas, r2) in zip(found, answer, strict=True):
            np.testing.assert_allclose(mine.alpha, alphas)
            np.testing.assert_allclose(mine.r2, r2, atol=1e-6)


def test_study(benchmark, job, answer):
    xs, y, fold = job
    benchmark.group = f"probe stage on the demo's rows: n={CROPS}, d=384, 26 sites and pools"
    again = benchmark.pedantic(lambda: [peers.study(x, y, fold) for x in xs], rounds=1)
    assert len(again) == len(answer)
