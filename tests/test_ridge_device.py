"""The solvers on another device than the CPU, and the operations that serve it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from geofast import _device, _reference

TYPES = [torch.float32, torch.float64]
SIZES = [1, 7, 16, 17, 48, 130]
SENTINEL = 12345.0


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way through the blocks, on matrices of a few rows."""
    monkeypatch.setattr(_device, "_PANEL", 8)
    monkeypatch.setattr(_device, "_BLOCK", 16)
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


def test_tensor_float_32_is_switched_off_and_on_again() -> None:
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    try:
        for setting, inside in (("tf32", "ieee"), ("ieee", "ieee")):
            products.fp32_precision = setting
            with _device.float32_products():
                assert products.fp32_precision == inside
            assert products.fp32_precision == setting
    finally:
        products.fp32_precision = before
