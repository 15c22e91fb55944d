"""The symmetric update: X'X by fold of rows [n, d], beside the machine's peak and torch.

Operations count one triangle, n d (d + 1). The peak is a loop of multiply-adds in registers, run in
turn with the update, so that both see the same clock.
"""

import itertools

import pytest
import torch
from inputs import layer, study_folds, targets
from limits import fast, in_turn, multiply_add

import geofast as gf

N, ROUNDS = 5000, 12
THREADS = torch.get_num_threads()


def plain(x, y, fold, folds, products):
    z = x.double() if products == "float64" else x
    return torch.stack([z[fold == f].mT @ z[fold == f] for f in range(folds)])


def job(d, folds, products, dtype):
    """Ways to the same sums, all on the same rows, and a check that they agree."""
    x, y = layer(N, d, 0), targets(N)[0]
    fold = study_folds(N) if folds > 1 else torch.zeros(N, dtype=torch.int64)
    gram = gf.Gram(d, 2, folds, products=products)
    rows = x.to(dtype)
    ways = {
        "geofast": lambda _: gram.update(rows, y, fold),
        "float32 rows": lambda _: gram.update(x, y, fold),
        "peak": lambda _: multiply_add(products, THREADS),
        "torch": lambda _: plain(rows.float(), y, fold, folds, products),
    }
    found = gf.Gram(d, 2, folds, products=products).update(rows, y, fold)
    exact = rows.double() - found.shift[:d]
    for f in range(folds):
        want = (exact[fold == f].mT @ exact[fold == f]).tril()
        scale = want.diagonal().sqrt()
        error = (found.matrix[f, :d, :d] - want).abs() / (scale[:, None] * scale)
        # Float32 products add up to 128 rows before float64 takes over.
        assert float(error.max()) < (1e-12 if products == "float64" else 128 * 2.0**-24)
    sums, wide = ways["torch"](None), rows.double()
    for f in range(folds):
        want = wide[fold == f].mT @ wide[fold == f]
        scale = want.diagonal().sqrt()
        error = (sums[f] - want).abs() / (scale[:, None] * scale)
        assert float(error.max()) < (1e-12 if products == "float64" else N * 2.0**-24)
    return ways


JOBS = [
    (d, folds, products, torch.float32)
    for d, folds, products in itertools.product((768, 2048), (1, 5), ("float32", "float64"))
]
JOBS += [(768, 5, "float32", dtype) for dtype in (torch.bfloat16, torch.float16)]


@pytest.fixture(
    scope="module",
    params=JOBS,
    ids=lambda p: f"d{p[0]}-{p[1]}folds-{p[2]}-{str(p[3])[6:]}",
)
def measured(request):
    d, folds, products, dtype = request.param
    ways = job(d, folds, products, dtype)
    seconds = {k: fast(v) for k, v in in_turn(ways, [None], ROUNDS).items()}
    cells = "one matrix" if folds == 1 else f"{folds} folds"
    group = f"Gram N={N} d={d}, {cells}, {str(dtype)[6:]} rows, {products} products"
    peak = multiply_add(products, THREADS) / seconds["peak"]
    note = {
        "of peak": f"{N * d * (d + 1) / seconds['geofast'] / peak:.0%}",
        "GFLOP/s": f"{N * d * (d + 1) / seconds['geofast'] / 1e9:.0f} of {peak / 1e9:.0f}",
        "over float32 rows": f"{seconds['geofast'] / seconds['float32 rows']:.3f}",
    }
    return group, ways, note


def test_geofast(benchmark, measured):
    group, ways, note = measured
    benchmark.group = group
    benchmark.extra_info.update(note)
    benchmark.pedantic(ways["geofast"], [None], rounds=ROUNDS, warmup_rounds=1)


def test_torch(benchmark, measured):
    group, ways, _ = measured
    benchmark.group = group
    benchmark.pedantic(ways["torch"], [None], rounds=3, warmup_rounds=1)
