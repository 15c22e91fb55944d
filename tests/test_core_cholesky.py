"""Cholesky factors and solves of the compiled core against their float64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geofast import _core, _reference

ISAS = ["baseline"] + ([_core.detected_isa()] if _core.detected_isa() != "baseline" else [])
SIZES = [1, 2, 7, 63, 64, 65, 130, 257]
TYPES = [torch.float32, torch.float64]
SENTINEL = 12345.0


def matrices(m: int, d: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Return m positive definite matrices with condition near 1e3, upper triangles a sentinel."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, 2 * d + 3, d, generator=generator, dtype=torch.float64)
    x *= torch.logspace(0, 1, d, dtype=torch.float64)
    a = x.mT @ x
    return (a.tril() + torch.full_like(a, SENTINEL).triu(1)).to(dtype)


def factors(m: int, d: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    found = torch.linalg.cholesky(matrices(m, d, torch.float64, seed).tril())
    return (found + torch.full_like(found, SENTINEL).triu(1)).to(dtype).contiguous()


def residual(a: torch.Tensor, factor: torch.Tensor) -> float:
    """Return the largest error of L L' over sqrt(a_ii a_jj)."""
    a, factor = a.double().tril(), factor.double().tril()
    scale = a.diagonal(dim1=1, dim2=2).sqrt()
    error = (factor @ factor.mT - a).tril().abs() / (scale[:, :, None] * scale[:, None])
    return float(error.max())


def factored(a: torch.Tensor, isa: str) -> torch.Tensor:
    out, info = a.clone(), torch.full((len(a),), -7, dtype=torch.int32)
    _core.cholesky(out, info, isa=isa)
    assert not info.any()
    assert torch.equal(out.triu(1), a.triu(1))
    return out


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("m", [1, 2, 3, 5])
@pytest.mark.parametrize("d", SIZES)
def test_cholesky(d: int, m: int, dtype: torch.dtype, isa: str) -> None:
    a = matrices(m, d, dtype)
    got, eps = factored(a, isa), torch.finfo(dtype).eps
    assert residual(a, got) < 8 * eps
    want = torch.linalg.cholesky(a.double().tril())
    assert float((got.tril() - want).abs().max() / want.abs().max()) < 200 * eps


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("d", [513, 1030])
def test_cholesky_of_large_matrices(d: int, dtype: torch.dtype) -> None:
    a = matrices(3, d, dtype)
    assert residual(a, factored(a, _core.detected_isa())) < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TYPES)
def test_badly_scaled_diagonals(dtype: torch.dtype, isa: str) -> None:
    a = matrices(2, 130, torch.float64)
    scale = torch.logspace(-7, 7, 130, dtype=torch.float64)[torch.randperm(130)]
    a = (a.tril() * scale[:, None] * scale + a.triu(1)).to(dtype)
    assert residual(a, factored(a, isa)) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TYPES)
def test_nearly_collinear_columns(dtype: torch.dtype, isa: str) -> None:
    """Ninety columns with one huge common part: LAPACK's float32 needs three times this ridge."""
    eps = torch.finfo(dtype).eps
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(300, 100, dtype=torch.float64, generator=generator)
        x[:, 1:90] += 1000 * x[:, :1]
        a = x.T @ x
        a = (a + 5 * eps * a.diagonal().max() * torch.eye(100)).to(dtype)[None]
        assert residual(a, factored(a, isa)) < 16 * eps


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bad", [0, 1, 5, 23, 24, 63, 64, 95, 96, 129])
@pytest.mark.parametrize("value", [-1.0, 0.0, float("nan"), float("inf")])
def test_the_first_bad_pivot_is_named(value: float, bad: int, dtype: torch.dtype, isa: str) -> None:
    a = matrices(3, 130, dtype)
    whole = a.clone()
    a[1, 129, 129] = -1  # a later one must not hide it
    a[1, bad, bad] = value
    info = torch.zeros(3, dtype=torch.int32)
    _core.cholesky(a, info, isa=isa)
    assert info.tolist() == [0, bad + 1, 0]
    assert residual(whole[[0, 2]], a[[0, 2]]) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("isa", ISAS)
def test_a_nan_below_the_diagonal_is_flagged(isa: str) -> None:
    a = matrices(1, 70, torch.float32)
    a[0, 41, 3] = torch.nan
    info = torch.zeros(1, dtype=torch.int32)
    _core.cholesky(a, info, isa=isa)
    assert info.tolist() == [42]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("sides", [1, 3, 9, 20, 64])
@pytest.mark.parametrize("d", SIZES)
def test_solve_lower(d: int, sides: int, transpose: bool, dtype: torch.dtype, isa: str) -> None:
    factor = factors(3, d, dtype)
    b = torch.randn(3, sides, d, dtype=torch.float64).to(dtype)
    got, want = b.clone(), b.double()
    _core.solve_lower(factor, got, transpose, isa=isa)
    _reference.solve_lower(factor.double(), want, transpose)
    assert float((got - want).abs().max() / want.abs().max()) < 50 * torch.finfo(dtype).eps


@pytest.mark.parametrize("m", [1, 5])
def test_solve_lower_with_more_sides_than_rows(m: int) -> None:
    factor, b = factors(m, 40, torch.float64), torch.randn(m, 333, 40, dtype=torch.float64)
    for transpose in (False, True):
        got, want = b.clone(), b.clone()
        _core.solve_lower(factor, got, transpose)
        _reference.solve_lower(factor, want, transpose)
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("d", SIZES)
def test_inverse_trace(d: int, m: int, dtype: torch.dtype, isa: str) -> None:
    factor = factors(m, d, dtype)
    before = factor.clone()
    got, want = torch.zeros(m, dtype=torch.float64), torch.zeros(m, dtype=torch.float64)
    _core.inverse_trace(factor, got, isa=isa)
    _reference.inverse_trace(factor, want)
    torch.testing.assert_close(got, want, rtol=100 * torch.finfo(dtype).eps, atol=0)
    assert torch.equal(factor, before)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("row_dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("d", SIZES)
def test_leverage(d: int, row_dtype: torch.dtype, dtype: torch.dtype, isa: str) -> None:
    generator = torch.Generator().manual_seed(d)
    factor = factors(1, d, dtype)[0]
    x = (torch.randn(150, d + 5, generator=generator) + 100).to(row_dtype)[:, 2 : d + 2]
    center = 100 + torch.randn(d, generator=generator, dtype=torch.float64)
    rows = torch.randint(150, (211,), generator=generator)
    got, want = torch.zeros(211, dtype=torch.float64), torch.zeros(211, dtype=torch.float64)
    _core.leverage(factor, x, center, rows, got, isa=isa)
    _reference.leverage(factor, x, center, rows, want)
    torch.testing.assert_close(got, want, rtol=100 * torch.finfo(dtype).eps, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    d=st.integers(1, 120),
    m=st.integers(0, 5),
    sides=st.integers(0, 30),
    dtype=st.sampled_from(TYPES),
    isa=st.sampled_from(ISAS),
)
def test_any_shape(d: int, m: int, sides: int, dtype: torch.dtype, isa: str) -> None:
    eps = torch.finfo(dtype).eps
    a = matrices(m, d, dtype)
    factor = factored(a, isa)
    if not m:
        return
    assert residual(a, factor) < 8 * eps
    for transpose in (False, True):
        b = torch.randn(m, sides, d).to(dtype)
        got, want = b.clone(), b.double()
        _core.solve_lower(factor, got, transpose, isa=isa)
        _reference.solve_lower(factor.double(), want, transpose)
        if sides:
            assert float((got - want).abs().max() / want.abs().max()) < 50 * eps
    rows, out, want = (
        torch.arange(sides) % 4,
        torch.zeros(sides).double(),
        torch.zeros(sides).double(),
    )
    x, center = torch.randn(4, d), torch.zeros(d, dtype=torch.float64)
    _core.leverage(factor[0], x, center, rows, out, isa=isa)
    _reference.leverage(factor[0], x, center, rows, want)
    torch.testing.assert_close(out, want, rtol=100 * eps, atol=0)


def test_any_number_of_threads() -> None:
    a = matrices(5, 300, torch.float64)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, threads, 7):
            torch.set_num_threads(count)
            found.append(factored(a, _core.detected_isa()))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_bad_arguments_are_named() -> None:
    a, info = matrices(2, 5, torch.float32), torch.zeros(2, dtype=torch.int32)
    b, trace = torch.zeros(2, 3, 5), torch.zeros(2, dtype=torch.float64)
    x, center, rows = torch.zeros(9, 5), torch.zeros(5).double(), torch.arange(9)
    out = torch.zeros(9, dtype=torch.float64)
    cases = [
        (_core.cholesky, (a.half(), info), "a is float16"),
        (_core.cholesky, (a[0], info), "a has shape"),
        (_core.cholesky, (a[:, :4], info), "a must be contiguous|a must hold square"),
        (_core.cholesky, (a.mT, info), "a must be contiguous"),
        (_core.cholesky, (a, info.long()), "info is int64"),
        (_core.cholesky, (a, info[:1]), "info has shape"),
        (_core.solve_lower, (a, b.double(), True), "b is float64"),
        (_core.solve_lower, (a, b[:, :, :4].clone(), True), "b has shape"),
        (_core.solve_lower, (a.int(), b, True), "l is int32"),
        (_core.inverse_trace, (a, trace.float()), "out is float32"),
        (_core.inverse_trace, (a[:, :4].clone(), trace), "l must hold square"),
        (_core.leverage, (a, x, center, rows, out), "l has shape"),
        (_core.leverage, (a[0, :4].clone(), x, center, rows, out), "l must be square"),
        (_core.leverage, (a[0], x[:, :4], center, rows, out), "x has shape"),
        (_core.leverage, (a[0], x, center.float(), rows, out), "center is float32"),
        (_core.leverage, (a[0], x, center, rows.int(), out), "rows is int32"),
        (_core.leverage, (a[0], x, center, rows, out[:8]), "out has shape"),
    ]
    for function, arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            function(*arguments)
    with pytest.raises(IndexError, match=r"rows\[0\] is 9, but x has 9 rows"):
        _core.leverage(a[0], x, center, rows + 9, out)
