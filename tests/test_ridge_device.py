"""The solvers on another device than the CPU, and the operations that serve it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from importlib import import_module

import pytest
import torch
from pretend import Pretend
from synthetic import rows

import geofast as gf
from geofast import _device, _reference
from geofast.ridge import (
    Select,
    cross_validate_many,
    fit_many,
    fold_errors,
    memory,
    solve_many,
    training,
)

TYPES = [torch.float32, torch.float64]
SIZES = [1, 7, 16, 17, 48, 130]
SENTINEL = 12345.0


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way through the blocks, on matrices of a few rows."""
    monkeypatch.setattr(_device, "_PANEL", 8)
    monkeypatch.setattr(_device, "BLOCK", 16)
    monkeypatch.setattr(_device, "_STRIP", 12)
    monkeypatch.setattr(_device, "_BYTES", 1 << 12)


def matrices(m: int, d: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Return m positive definite matrices with condition near 1e3, upper triangles a sentinel."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, 2 * d + 3, d, generator=generator, dtype=torch.float64)
    x *= torch.logspace(0, 1, d, dtype=torch.float64)
    a = x.mT @ x
    return (a.tril() + torch.full_like(a, SENTINEL).triu(1)).to(dtype)


def factors(m: int, d: int, dtype: torch.dtype) -> torch.Tensor:
    found = torch.linalg.cholesky(matrices(m, d, torch.float64).tril())
    return (found + torch.full_like(found, SENTINEL).triu(1)).to(dtype).contiguous()


def residual(a: torch.Tensor, factor: torch.Tensor) -> float:
    """Return the largest error of L L' over sqrt(a_ii a_jj)."""
    a, factor = a.double().tril(), factor.double().tril()
    scale = a.diagonal(dim1=1, dim2=2).sqrt()
    error = (factor @ factor.mT - a).tril().abs() / (scale[:, :, None] * scale[:, None])
    return float(error.max())


def factored(a: torch.Tensor) -> torch.Tensor:
    out, info = a.clone(), torch.full((len(a),), -7, dtype=torch.int32)
    _device.cholesky(out, info)
    assert not info.any()
    return out


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("d", SIZES)
def test_cholesky(d: int, m: int, dtype: torch.dtype) -> None:
    a = matrices(m, d, dtype)
    got, eps = factored(a), torch.finfo(dtype).eps
    assert residual(a, got) < 8 * eps
    want = torch.linalg.cholesky(a.double().tril())
    assert float((got.tril() - want).abs().max() / want.abs().max()) < 200 * eps


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("d", [257, 513])
def test_cholesky_in_blocks_of_their_size(d: int, dtype: torch.dtype) -> None:
    a = matrices(2, d, dtype)
    assert residual(a, factored(a)) < 16 * torch.finfo(dtype).eps


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", TYPES)
def test_badly_scaled_diagonals(dtype: torch.dtype) -> None:
    a = matrices(2, 130, torch.float64)
    order = torch.randperm(130, generator=torch.Generator().manual_seed(0))
    scale = torch.logspace(-7, 7, 130, dtype=torch.float64)[order]
    a = (a.tril() * scale[:, None] * scale + a.triu(1)).to(dtype)
    assert residual(a, factored(a)) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", TYPES)
def test_nearly_collinear_columns(dtype: torch.dtype) -> None:
    """Ninety columns with one huge common part, with the ridge that LAPACK's float32 needs."""
    eps = torch.finfo(dtype).eps
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(300, 100, dtype=torch.float64, generator=generator)
        x[:, 1:90] += 1000 * x[:, :1]
        a = x.T @ x
        a = (a + 15 * eps * a.diagonal().max() * torch.eye(100)).to(dtype)[None]
        assert residual(a, factored(a)) < 16 * eps


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bad", [0, 1, 5, 7, 8, 23, 24, 63, 129])
@pytest.mark.parametrize("value", [-1.0, 0.0, float("nan"), float("inf")])
def test_the_first_bad_pivot_is_named(value: float, bad: int, dtype: torch.dtype) -> None:
    a = matrices(3, 130, dtype)
    whole = a.clone()
    a[1, 129, 129] = -1  # a later one must not hide it
    a[1, bad, bad] = value
    info = torch.zeros(3, dtype=torch.int32)
    _device.cholesky(a, info)
    assert info.tolist() == [0, bad + 1, 0]
    assert residual(whole[[0, 2]], a[[0, 2]]) < 8 * torch.finfo(dtype).eps


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("sides", [1, 3, 20, 333])
@pytest.mark.parametrize("d", SIZES)
def test_solve_lower(d: int, sides: int, transpose: bool, dtype: torch.dtype) -> None:
    factor = factors(3, d, dtype)
    generator = torch.Generator().manual_seed(0)
    b = torch.randn(3, sides, d, dtype=torch.float64, generator=generator).to(dtype)
    got, want = b.clone(), b.double()
    _device.solve_lower(factor, got, transpose)
    _reference.solve_lower(factor.double(), want, transpose)
    assert float((got - want).abs().max() / want.abs().max()) < 50 * torch.finfo(dtype).eps


@pytest.mark.usefixtures("small_blocks")
def test_a_factor_comes_with_the_inverses_of_its_blocks() -> None:
    a = matrices(2, 45, torch.float64)
    inverses = _device.factor(a, torch.zeros(2, dtype=torch.int32))
    assert inverses.shape == (2, 45, 16)
    for i in range(0, 45, 16):
        block = a[:, i : i + 16, i : i + 16].tril()
        size = block.shape[1]
        eye = torch.eye(size, dtype=torch.float64).expand(2, -1, -1)
        torch.testing.assert_close(block @ inverses[:, i : i + 16, :size], eye)
    torch.testing.assert_close(inverses, _device.invert_blocks(a))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("d", SIZES)
def test_inverse_trace(d: int, m: int, dtype: torch.dtype) -> None:
    factor = factors(m, d, dtype)
    got, want = torch.zeros(m, dtype=torch.float64), torch.zeros(m, dtype=torch.float64)
    _device.inverse_trace(factor, got)
    _reference.inverse_trace(factor, want)
    torch.testing.assert_close(got, want, rtol=100 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("row_dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("d", SIZES)
def test_leverage(d: int, row_dtype: torch.dtype, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(d)
    factor = factors(1, d, dtype)[0]
    x = (torch.randn(150, d + 5, generator=generator) + 100).to(row_dtype)[:, 2 : d + 2]
    center = 100 + torch.randn(d, generator=generator, dtype=torch.float64)
    rows = torch.randint(150, (211,), generator=generator)
    got, want = torch.zeros(211, dtype=torch.float64), torch.zeros(211, dtype=torch.float64)
    _device.leverage(factor, x, center, rows, got)
    _reference.leverage(factor, x, center, rows, want)
    torch.testing.assert_close(got, want, rtol=100 * torch.finfo(dtype).eps, atol=0)


def statistics(layers: int, folds: int, d: int, q: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(d)
    x = torch.randn(layers, folds, 3 * d, d, generator=generator, dtype=torch.float64) + 2.0
    z = torch.randn(layers, folds, 3 * d, q, generator=generator, dtype=torch.float64)
    z[..., 0] = 1.0
    a = torch.cat([x, z], -1)
    return (a.mT @ a).tril()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("sets", [list(range(10)), [3, 3, 9, 0], [7]])
@pytest.mark.parametrize("d", [1, 12, 25])
def test_training_matrices_of_two_layers(d: int, sets: list[int], dtype: torch.dtype) -> None:
    held = statistics(2, 5, d)
    total, at = held.sum(1), torch.tensor(sets)
    alpha = torch.rand(len(at), dtype=torch.float64) + 0.1
    got, want = (torch.zeros(len(at), d, d, dtype=dtype) for _ in range(2))
    _device.training_matrix(total, held.flatten(0, 1), at, alpha, got)
    for m, s in enumerate(sets):
        one = (at[m : m + 1] % 5, alpha[m : m + 1], want[m : m + 1])
        _reference.training_matrix(total[s // 5], held[s // 5], *one)
        mine = torch.zeros_like(want[:1])
        _device.training_matrix(total[s // 5], held[s // 5], *one[:2], mine)
        assert torch.equal(mine.tril(), got[m : m + 1].tril())
    eps, scale = torch.finfo(dtype).eps, float(want.abs().max())
    torch.testing.assert_close(got.tril(), want.tril(), rtol=2 * eps, atol=1e-15 * scale)


Project = Callable[..., None]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("take", ["all", "repeats"])
@pytest.mark.parametrize(
    ("ours", "reference", "transpose"),
    [
        (_device.project, _reference.project, False),
        (_device.project_t, _reference.project_t, True),
    ],
)
def test_projections(
    ours: Project, reference: Project, transpose: bool, take: str, dtype: torch.dtype
) -> None:
    n, d, m = 257, 33, 5
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(n, d + 3, generator=generator) + 1000).to(dtype)[:, 1 : d + 1]
    rows = None if take == "all" else torch.randint(n, (301,), generator=generator)
    taken = n if rows is None else len(rows)
    shift, by = x.double().mean(0), torch.randn(taken if transpose else m, m if transpose else d)
    shape = (m, d) if transpose else (taken, m)
    got, want = (torch.full(shape, SENTINEL, dtype=torch.float64) for _ in range(2))
    ours(x, shift, by.double(), got, rows=rows)
    reference(x, shift, by.double(), want, rows=rows)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


# The solvers themselves, on a device that is pretended.


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretend]:
    """A device that solves every width as it solves a large one."""
    monkeypatch.setattr(training, "_SMALL", 0)
    with Pretend() as gpu:
        yield gpu


@pytest.fixture(params=["float32", "float64"])
def precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors that begin in float32, and those of a GPU with tensor cores for float64."""
    if request.param == "float64":
        module = import_module("geofast.ridge.solve")
        monkeypatch.setattr(module, "_precisions", lambda *_: [torch.float64])


def moved(gram: gf.Gram) -> gf.Gram:
    there = gf.Gram(gram.dim, gram.targets, gram.cells, device=Pretend.device)
    assert gram.shift is not None
    there.matrix.copy_(gram.matrix)
    there.shift = gram.shift.to(Pretend.device)
    return there


def assert_same(found: gf.Solution, want: gf.Solution, tolerance: float = 1e-7) -> None:
    assert all(t.is_cpu for t in vars(found).values() if isinstance(t, torch.Tensor))
    # How far float32 serves is not quite the same for the core and for a library, and a grid of
    # penalties takes the CPU eigenvectors.
    mine, theirs = (
        re.sub(r"float\d+, |eigenvectors|Cholesky", "", one.method) for one in (found, want)
    )
    assert mine == theirs
    assert torch.equal(found.alpha, want.alpha)
    for name in ("coef", "intercept", "r2", "mse", "predictions", "inner_r2"):
        mine, theirs = getattr(found, name), getattr(want, name)
        assert (mine is None) == (theirs is None), name
        if mine is not None:
            scale = float(theirs.abs().max()) if name in ("coef", "predictions") else 1.0
            torch.testing.assert_close(mine / scale, theirs / scale, atol=tolerance, rtol=tolerance)


FOLD = torch.arange(400) % 5
SEEDS = {"plain": 0, "collinear": 1, "massive_dims": 2, "large_means": 3, "steep": 4}


def grams(d: int = 40) -> list[gf.Gram]:
    layers = [rows(d=d, kind=kind, seed=seed) for kind, seed in SEEDS.items()]
    return [gf.Gram(d, 2, 5).update(x, y, FOLD) for x, y in layers]


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("select", ["gcv", "folds"])
@pytest.mark.parametrize("blocks", [True, False])
def test_statistics_of_many_layers(
    gpu: Pretend, request: pytest.FixtureRequest, blocks: bool, select: str
) -> None:
    if blocks:
        request.getfixturevalue("small_blocks")
    here = grams(24)
    folds = torch.tensor([0, 1, -1, 2, 0]) if blocks else None
    want = [gf.solve(gram, folds=folds, select=select, inner=True) for gram in here]
    there = [moved(gram) for gram in here]
    together = solve_many(there, folds=folds, select=select, inner=True)
    for one, found in zip(want, together, strict=True):
        assert isinstance(found, gf.Solution)
        assert_same(found, one)
    alone = gf.solve(there[1], folds=folds, select=select, inner=True)
    assert isinstance(together[1], gf.Solution)
    assert_same(together[1], alone, 1e-12)


def test_all_rows_of_many_layers(gpu: Pretend) -> None:
    here, everyone = grams()[:2], torch.zeros(5, dtype=torch.int64)
    together = solve_many([moved(gram) for gram in here], folds=everyone)
    for gram, found in zip(here, together, strict=True):
        assert isinstance(found, gf.Solution)
        assert found.r2 is None
        assert_same(found, gf.solve(gram, folds=everyone))


def test_the_host_waits_as_often_for_many_layers_as_for_one(gpu: Pretend) -> None:
    waits = []
    for count in (1, 8):
        there = [moved(grams()[0]) for _ in range(count)]
        gpu.syncs.clear()
        solve_many(there, inner=True)
        waits.append(len(gpu.syncs))
    assert waits[0] == waits[1] < 60


def test_few_features_are_solved_on_the_cpu() -> None:
    here = grams()
    with Pretend():
        together = solve_many([moved(gram) for gram in here])
    for gram, found in zip(here, together, strict=True):
        assert isinstance(found, gf.Solution)
        assert_same(found, gf.solve(gram), 0.0)


def test_a_layer_that_fails_costs_no_other(gpu: Pretend) -> None:
    """Of five layers one has a NaN, one a constant target, and one needs float64."""
    x, y = rows(d=40)
    bad, flat, badly_scaled = x.clone(), y * torch.tensor([1.0, 0.0]), x.clone()
    bad[7, 5] = torch.nan
    badly_scaled[:, 7:] = 1e3 * x[:, :1] + 1e-2 * x[:, 7:]
    tables = [(x, y), (bad, y), (badly_scaled, y), (x, flat), (2 * x, y)]
    here = [gf.Gram(40, 2, 5).update(*table, FOLD) for table in tables]
    found = solve_many([moved(gram) for gram in here])
    assert "column 5 of the Gram is not finite" in str(found[1])
    assert "target 1 is constant over a training part" in str(found[3])
    for i in (0, 2, 4):
        one = found[i]
        assert isinstance(one, gf.Solution)
        assert f"Cholesky in float{64 if i == 2 else 32}, refined" in one.method
        assert_same(one, gf.solve(here[i]), 1e-5)
    hopeless = torch.zeros_like(here[0].matrix)
    hopeless[:] = here[0].matrix
    hopeless[:, 3, 3] = -1e6
    there = [moved(here[0]), moved(here[0])]
    there[0].matrix.copy_(hopeless)
    first, second = solve_many(there)
    assert "not positive definite in float64" in str(first)
    assert isinstance(second, gf.Solution)


@pytest.mark.parametrize(("room", "limit", "sizes"), [(3, 5, [3, 2]), (9, 2, [5, 2, 2, 1])])
def test_layers_are_taken_in_parts_when_memory_is_short(
    gpu: Pretend, monkeypatch: pytest.MonkeyPatch, room: int, limit: int, sizes: list[int]
) -> None:
    """By what is free, and when that was not enough by half of what did not fit."""
    there, tried = [moved(gram) for gram in grams()], []
    whole = solve_many(there)
    module = import_module("geofast.ridge.solve")
    inside = module._solve_layers

    def limited(some: list[gf.Gram], *rest: object) -> object:
        tried.append(len(some))
        if len(some) > limit:
            raise torch.OutOfMemoryError
        return inside(some, *rest)

    monkeypatch.setattr(module, "_solve_layers", limited)
    monkeypatch.setattr(memory, "_SHARE", 0.5)
    each = memory.bytes_of_statistics(40, 2, 5, len(gf.ALPHAS), "gcv")
    monkeypatch.setattr(memory, "_free", lambda _: 2 * room * each)
    parts = solve_many(there)
    assert tried == sizes
    for one, other in zip(parts, whole, strict=True):
        assert isinstance(one, gf.Solution)
        assert isinstance(other, gf.Solution)
        assert_same(one, other, 1e-12)


@pytest.mark.parametrize(("capability", "first"), [((9, 0), "float64"), ((8, 6), "float32")])
def test_factors_begin_in_the_precision_that_a_gpu_is_quick_at(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], first: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    precisions = import_module("geofast.ridge.solve")._precisions
    tried = precisions(1024, torch.device("cuda"))
    assert tried[0] == getattr(torch, first)
    assert tried[-1] == torch.float64
    assert precisions(256, torch.device("cuda")) == [torch.float64]


def test_layers_that_differ_are_refused(gpu: Pretend) -> None:
    with pytest.raises(ValueError, match="must have one width"):
        solve_many([grams(40)[0], grams(30)[0]])


@pytest.mark.parametrize("kind", ["plain", "massive_rows"])
@pytest.mark.parametrize("select", ["loo", "gcv", "folds"])
@pytest.mark.parametrize("shape", [(200, 24), (60, 80)])
def test_rows(
    gpu: Pretend, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], select: Select, kind: str
) -> None:
    x, y = rows(*shape, kind=kind, seed=1)
    fold = torch.arange(len(x)) % 5
    inner, near = select != "loo", 1e-6
    with monkeypatch.context() as exact:  # float64 and whole spectra, as befits so few features
        exact.setattr(training, "_SMALL", 256)
        want = gf.cross_validate(x, y, fold, select=select, inner=inner)
    there = x.to(gpu.device)
    assert_same(gf.cross_validate(there, y, fold, select=select, inner=inner), want, near)
    if kind != "plain":
        return
    far = (there, y.to(gpu.device), fold.to(gpu.device))
    assert_same(gf.cross_validate(*far, select=select, inner=inner), want, near)
    if select == "folds":
        errors = fold_errors(there, y, fold)
        assert errors.is_cpu
        torch.testing.assert_close(errors, fold_errors(x, y, fold), rtol=near, atol=0)
    else:
        assert_same(gf.fit(there, y, select=select), gf.fit(x, y, select=select), near)


@pytest.mark.parametrize("select", ["loo", "gcv", "folds"])
def test_fewer_rows_than_features_of_many_layers(gpu: Pretend, select: Select) -> None:
    """One layer has a NaN, and folds differ in size."""
    some, y = tables(5, n=60, d=90)
    fold = torch.arange(60) % 4
    fold[:9] = 0
    some[1] = some[1].clone()
    some[1][7, 5] = torch.nan
    there = [x.to(gpu.device) for x in some]
    found = cross_validate_many(there, y, fold, select=select, inner=True)
    assert "feature 5 of row 7 is nan" in str(found[1])
    for i in (0, 2, 3, 4):
        one = found[i]
        assert isinstance(one, gf.Solution)
        assert "Cholesky of X X'" in one.method
        assert_same(one, gf.cross_validate(some[i], y, fold, select=select, inner=True), 1e-6)
    if select == "folds":
        return
    for x, one in zip(some[3:], fit_many(there[3:], y, select=select), strict=True):
        assert isinstance(one, gf.Solution)
        assert one.r2 is None
        assert_same(one, gf.fit(x, y, select=select), 1e-6)
    # Every row twice, and so large that float64 knows nothing of the penalties: no factor.
    huge = [1e9 * x[torch.arange(60) // 2] for x in there[2:4]]
    for one in cross_validate_many(huge, y, fold, select=select):
        assert isinstance(one, gf.Solution)
        assert "eigenvectors of X X'" in one.method
        assert one.r2 is not None
        assert one.r2.isfinite().all()


@pytest.mark.parametrize("n", [100, 150, 260, 400])
def test_statistics_of_hardly_more_rows_than_features_or_fewer(gpu: Pretend, n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 288, generator=generator) * torch.logspace(2, 0, 288)
    y = (x[:, :2] + 200 * torch.randn(n, 2, generator=generator)).double()
    gram = gf.Gram(288, 2, 5).update(x, y, torch.arange(n) % 5)
    assert_same(gf.solve(moved(gram)), gf.solve(gram), 1e-6)


def test_bad_rows_on_a_device(gpu: Pretend) -> None:
    x, y = rows()
    fold = torch.arange(len(x)) % 5
    bad = x.clone()
    bad[7, 5] = torch.inf
    with pytest.raises(ValueError, match="feature 5 of row 7 is inf"):
        gf.cross_validate(bad.to(gpu.device), y, fold)
    with pytest.raises(ValueError, match="target 1 is constant"):
        gf.cross_validate(x.to(gpu.device), y * torch.tensor([1.0, 0.0]), fold)


def tables(count: int = 6, n: int = 200, d: int = 24) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return rows of many layers, some hard, that have their targets in common."""
    kinds = [*SEEDS, "massive_rows"]
    pairs = [rows(n, d, kind=kinds[i % len(kinds)], seed=i) for i in range(count)]
    noise = torch.Generator().manual_seed(0)
    y = torch.stack([pairs[0][1][:, 0], pairs[-1][1][:, 1]], 1)
    scale = torch.logspace(0, 2, count)  # least leave-one-out error at many penalties
    near = [
        x + s * torch.randn(x.shape, generator=noise)
        for (x, _), s in zip(pairs, scale, strict=True)
    ]
    return near, y


def solved_near(
    monkeypatch: pytest.MonkeyPatch, some: list[torch.Tensor], *rest: torch.Tensor, **options: str
) -> list[gf.Solution]:
    with monkeypatch.context() as exact:
        exact.setattr(training, "_SMALL", 256)
        return [gf.cross_validate(x, *rest, **options) for x in some]


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("select", ["loo", "gcv", "folds"])
def test_rows_of_many_layers(
    gpu: Pretend,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    select: Select,
    blocks: bool,
) -> None:
    if blocks:
        request.getfixturevalue("small_blocks")
    some, y = tables()
    fold = torch.arange(len(y)) % 4 - 1  # the first of four is left out
    kept, inner = fold >= 0, select != "loo"
    mine = [x[kept] for x in some]
    want = solved_near(monkeypatch, mine, y[kept], fold[kept], select=select, inner=inner)
    there = [x.to(gpu.device) for x in some]
    found = cross_validate_many(there, y, fold, select=select, inner=inner)
    for one, other in zip(found, want, strict=True):
        assert isinstance(one, gf.Solution)
        assert_same(one, other, 1e-6)
    if select != "folds":
        fitted = fit_many(there, y, select=select)
        for x, one in zip(some, fitted, strict=True):
            assert isinstance(one, gf.Solution)
            assert_same(one, gf.fit(x, y, select=select), 1e-6)


def test_leave_one_out_of_all_is_least_wherever_gcv_is(
    gpu: Pretend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A single row can move the minimum far from GCV's, where the search begins."""
    some, y = tables(4, n=60, d=12)
    for i, x in enumerate(some):
        x[i] *= 1000
        x[i + 7] *= 30
    fold, alphas = torch.arange(60) % 3, [10.0**a for a in range(-3, 9)]
    found = cross_validate_many([x.to(gpu.device) for x in some], y, fold, alphas)
    moved = 0
    for x, one in zip(some, found, strict=True):
        assert isinstance(one, gf.Solution)
        for f in range(3):
            who = fold != f
            inside, targets = x[who].double(), y[who].double()
            errors = [left_out(inside, targets, alpha) for alpha in alphas]
            assert float(one.alpha[f]) == alphas[errors.index(min(errors))]
        moved += int((one.alpha != gf.cross_validate(x, y, fold, alphas, select="gcv").alpha).sum())
    assert moved > 0


def left_out(x: torch.Tensor, y: torch.Tensor, alpha: float) -> float:
    x, y = x - x.mean(0), y - y.mean(0)
    inside = torch.linalg.solve(x.T @ x + alpha * torch.eye(x.shape[1]), x.T)
    hat = x @ inside + 1 / len(x)
    error = (y - x @ (inside @ y)) / (1 - hat.diagonal())[:, None]
    return float(error.square().mean())


def test_the_host_waits_as_often_for_rows_of_many_layers_as_for_one(gpu: Pretend) -> None:
    (x, *_), y = tables()
    waits = []
    for count in (1, 8):
        there = [x.to(gpu.device) for _ in range(count)]
        gpu.syncs.clear()
        cross_validate_many(there, y, torch.arange(len(y)) % 5)
        waits.append(len(gpu.syncs))
    assert waits[0] == waits[1] < 60


def test_rows_that_fail_cost_no_other(gpu: Pretend, monkeypatch: pytest.MonkeyPatch) -> None:
    some, y = tables(4)
    fold = torch.arange(len(y)) % 5
    some[1][7, 5] = torch.inf
    found = cross_validate_many([x.to(gpu.device) for x in some], y, fold)
    assert "feature 5 of row 7 is inf" in str(found[1])
    rest = [0, 2, 3]
    for i, want in zip(
        rest, solved_near(monkeypatch, [some[i] for i in rest], y, fold), strict=True
    ):
        one = found[i]
        assert isinstance(one, gf.Solution)
        assert_same(one, want, 1e-6)
    with pytest.raises(ValueError, match="must be alike"):
        cross_validate_many([some[0], some[1][:, 1:]], y, fold)


def test_tables_are_taken_in_parts_when_memory_is_short(
    gpu: Pretend, monkeypatch: pytest.MonkeyPatch
) -> None:
    some, y = tables(5)
    there, fold = [x.to(gpu.device) for x in some], torch.arange(len(y)) % 5
    whole, tried = cross_validate_many(there, y, fold), []
    module = import_module("geofast.ridge.solve")
    inside = module._solve_tables

    def limited(part: list[torch.Tensor], *rest: object) -> object:
        tried.append(len(part))
        if len(part) > 2:
            raise torch.OutOfMemoryError
        return inside(part, *rest)

    monkeypatch.setattr(module, "_solve_tables", limited)
    parts = cross_validate_many(there, y, fold)
    assert tried == [5, 2, 2, 1]
    for one, other in zip(parts, whole, strict=True):
        assert isinstance(one, gf.Solution)
        assert isinstance(other, gf.Solution)
        assert_same(one, other, 1e-9)
    monkeypatch.setattr(memory, "_free", lambda _: 0)
    tried.clear()
    cross_validate_many(there[:2], y, fold)
    assert tried == [1, 1]
