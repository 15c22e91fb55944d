"""Token-level probes: statistics of every patch of every layer, added to while the model runs.

Beside it the plain way: hidden states that the model returns, and a product of torch's in float64
for every layer and fold.
"""

import overhead
import pytest
import torch
from bench_pass import BATCH, clip_base, dinov2_small, images

import geofast as gf
from geofast import _reference
from geofast.accumulate import Statistics
from geofast.batching import Budget
from geofast.rows import Rows

PAIRS, FOLDS = 3, 5
LIMIT = 0.5  # of the bare forward, inside the hooks
JOBS = {"DINOv2-S": dinov2_small, "CLIP-B/16": clip_base}


def batch_of():
    """Images, targets [n, 2] and the fold of each."""
    return images(BATCH), torch.randn(BATCH, 2).double(), torch.arange(BATCH) % FOLDS


def added(module, given):
    """Statistics of all patches, by site."""
    batch, y, fold = given
    rows = Rows()
    statistics = Statistics(FOLDS, Budget(1), rows.aside)
    rows.take_tokens = statistics.tokens.take
    statistics.tokens.begin(range(BATCH), y, fold)
    with torch.inference_mode(), gf.capture(module, pool="each:patch", rows=rows):
        module(**batch)
    return statistics.grams


@torch.inference_mode()
def plain(module, given):
    """Products [layers, folds, d, d] of the hidden states that the model returns."""
    batch, _, fold = given
    states = module(**batch, output_hidden_states=True).hidden_states
    return [
        torch.stack([_product(h[fold == f, 1:].flatten(0, 1).double()) for f in range(FOLDS)])
        for h in states
    ]


def _product(x):
    return x.T @ x


def check(module, given):
    """Hold every site's statistics to the float64 reference on the tokens themselves."""
    batch, y, fold = given
    with torch.inference_mode(), gf.capture(module, pool="each:patch") as rows:
        module(**batch)
    for key, gram in added(module, given).items():
        x, patches = rows[key], len(rows[key]) // BATCH
        about = gram.shift[gram.dim :]
        z = torch.cat([torch.ones(BATCH, 1).double(), y - about], 1).repeat_interleave(patches, 0)
        order = fold.repeat_interleave(patches).argsort(stable=True)
        offsets = torch.cat([torch.zeros(1), fold.bincount().cumsum(0) * patches]).long()
        expected = torch.zeros_like(gram.matrix)
        _reference.gram(x, gram.shift[: gram.dim], z, order, offsets, expected)
        scale = expected.diagonal(dim1=1, dim2=2).sqrt()
        error = (gram.matrix - expected).abs() / (scale[:, :, None] * scale[:, None])
        assert error.max() < 1e-12


@pytest.fixture(scope="module", params=JOBS)
def job(request):
    torch.manual_seed(0)
    module, given = JOBS[request.param](), batch_of()
    check(module, given)
    return f"every patch a row: {request.param}, batch {BATCH}", module, given


def test_added_while_the_model_runs(benchmark, job):
    benchmark.group, module, given = job

    @torch.inference_mode()
    def bare():
        module(**given[0])

    def probed():
        added(module, given)

    share, ratio = overhead.in_pairs(bare, probed, PAIRS)
    benchmark.extra_info["paired ratio"] = f"{ratio:.3f}"
    benchmark.extra_info["in hooks"] = f"{100 * share:.1f} %"
    benchmark.pedantic(probed, rounds=3)
    assert share < LIMIT


def test_bare_forward(benchmark, job):
    benchmark.group, module, given = job
    with torch.inference_mode():
        benchmark.pedantic(module, kwargs=given[0], rounds=3, warmup_rounds=1)


def test_hidden_states_and_products_in_torch(benchmark, job):
    benchmark.group, module, given = job
    benchmark.pedantic(plain, (module, given), rounds=2)
