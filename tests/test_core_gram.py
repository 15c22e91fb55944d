"""gram and training_matrix of the compiled core against their float64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geofast import _core, _reference

ISAS = ["baseline"] + ([_core.detected_isa()] if _core.detected_isa() != "baseline" else [])
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SIZES = [1, 2, 7, 63, 64, 65, 130, 257]
SENTINEL = 12345.0
# Componentwise, as a share of sqrt(G_ii G_jj).
TOLERANCE = {"float64": 1e-13, "float32": 1e-6}
# What no input can exceed, by Cauchy and Schwarz: in float32 a row is rounded once, and at most 128
# products are added before the float64 sum, each with a rounding of 2^-24.
BOUND = {"float64": 1e-13, "float32": 130 * 2.0**-24}


def cells_of(counts: list[int], n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Order and offsets of cells with these numbers of rows, drawn with repeats."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randint(n, (sum(counts),), generator=generator)
    return order, torch.tensor([0, *counts]).cumsum(0)


def problem(
    n: int, d: int, q: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(n, d, generator=generator) + 3).to(dtype)
    z = torch.randn(n, q, generator=generator, dtype=torch.float64)
    z[:, :1] = 1
    shift = 3 + 0.1 * torch.randn(d, generator=generator, dtype=torch.float64)
    return x, shift, z


def scaled_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Return the largest error of the lower triangle over sqrt(G_ii G_jj)."""
    scale = want.diagonal(dim1=-2, dim2=-1).sqrt()
    error = (got - want).tril().abs() / (scale[:, :, None] * scale[:, None]).clamp_min(1e-300)
    return float(error.max()) if error.numel() else 0.0


def check(
    x: torch.Tensor,
    shift: torch.Tensor,
    z: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    products: str,
    isa: str,
    tolerance: dict[str, float] = TOLERANCE,
) -> None:
    cells, p = len(offsets) - 1, x.shape[1] + z.shape[1]
    got = torch.full((cells, p, p), SENTINEL, dtype=torch.float64).triu(1)
    want = torch.zeros(cells, p, p, dtype=torch.float64)
    _core.gram(x, shift, z, order, offsets, got, products=products, isa=isa)
    _reference.gram(x, shift, z, order, offsets, want)
    assert scaled_error(got, want) < tolerance[products]
    assert torch.equal(got.triu(1), torch.full_like(got, SENTINEL).triu(1))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("products", ["float64", "float32"])
@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference(dtype: torch.dtype, d: int, products: str, isa: str) -> None:
    x, shift, z = problem(400, d, 3, dtype)
    # A cell of one row, an empty one, and lengths around the chunk and the direct path.
    order, offsets = cells_of([1, 0, 37, 128, 129, 700], 400)
    check(x, shift, z, order, offsets, products, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("products", ["float64", "float32"])
@pytest.mark.parametrize("d", [384, 391, 768])
def test_several_tiles(d: int, products: str, isa: str) -> None:
    x, shift, z = problem(600, d, 3)
    check(x, shift, z, *cells_of([300, 500], 600), products, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("q", [0, 1, 4, 5, 16, 17])
def test_any_number_of_targets(q: int, isa: str) -> None:
    x, shift, z = problem(300, 65, q)
    for products in TOLERANCE:
        check(x, shift, z, *cells_of([40, 257], 300), products, isa)


@pytest.mark.parametrize("isa", ISAS)
def test_rows_of_a_wider_table(isa: str) -> None:
    x, shift, z = problem(50, 200, 3)
    part = x[::2, 17:100]
    assert part.stride(0) == 400
    check(part, shift[17:100].clone(), z[::2].clone(), *cells_of([60], 25), "float64", isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("products", ["float64", "float32"])
def test_calls_add_up(products: str, isa: str) -> None:
    x, shift, z = problem(900, 70, 2)
    order, offsets = torch.arange(900), torch.tensor([0, 300, 900])
    whole = torch.zeros(2, 72, 72, dtype=torch.float64)
    _reference.gram(x, shift, z, order, offsets, whole)
    parts = torch.zeros_like(whole)
    for first in range(0, 900, 90):
        now = order[first : first + 90]
        split = torch.tensor([0, int((now < 300).sum()), 90])
        _core.gram(x, shift, z, now, split, parts, products=products, isa=isa)
    assert scaled_error(parts, whole) < TOLERANCE[products]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("products", ["float64", "float32"])
def test_large_means_need_the_shift(products: str, isa: str) -> None:
    generator = torch.Generator().manual_seed(1)
    mean = 1000 * torch.randn(97, generator=generator, dtype=torch.float64)
    x = (torch.randn(500, 97, generator=generator) + mean).float()
    z = torch.ones(500, 1, dtype=torch.float64)
    order, offsets = torch.arange(500), torch.tensor([0, 500])
    check(x, mean, z, order, offsets, products, isa)

    def centred(shift: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(1, 98, 98, dtype=torch.float64)
        _core.gram(x, shift, z, order, offsets, out, products=products, isa=isa)
        sums, g = out[0, 97, :97], out[0, :97, :97]
        return (g + g.tril(-1).T - sums[:, None] * sums / 500).tril()[None]

    about = x.double() - x.double().mean(0)
    truth = (about.T @ about)[None]
    assert scaled_error(centred(mean), truth) < TOLERANCE[products]
    # Without a shift float32 products lose what the shift keeps: the test above can fail.
    if products == "float32":
        assert scaled_error(centred(torch.zeros_like(mean)), truth) > 1e-4


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("products", ["float64", "float32"])
def test_massive_dimensions_and_rows(products: str, isa: str) -> None:
    x, shift, z = problem(500, 130, 3)
    x[:, [3, 77]] *= 1000
    x[[11, 200, 201]] *= 1000
    check(x, shift, z, *cells_of([200, 300], 500), products, isa)


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """Return the same rows in other memory, NaN wherever nobody may look."""
    n, d = x.shape
    if layout == "skipped rows":
        whole = x.new_full((3 * n + 1, d), torch.nan)
        part = whole[1::3]
    elif layout == "columns of a table":
        whole = x.new_full((n, d + 5), torch.nan)
        part = whole[:, 3 : 3 + d]
    elif layout == "both":
        whole = x.new_full((2 * n, d + 1), torch.nan)
        part = whole[::2, 1:]
    else:
        return x
    return part.copy_(x)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=100, deadline=None)
@given(
    n=st.one_of(st.integers(1, 5), st.integers(1, 300)),
    d=st.one_of(st.integers(1, 90), st.sampled_from([127, 192, 193, 260])),
    q=st.integers(0, 6),
    counts=st.lists(st.integers(0, 300), min_size=1, max_size=5),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["plain", "skipped rows", "columns of a table", "both"]),
    products=st.sampled_from(["float64", "float32"]),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    isa: str,
    n: int,
    d: int,
    q: int,
    counts: list[int],
    dtype: torch.dtype,
    layout: str,
    products: str,
    seed: int,
) -> None:
    x, shift, z = problem(n, d, q, dtype, seed)
    order, offsets = cells_of(counts, n, seed)
    check(laid_out(x, layout), shift, z, order, offsets, products, isa, BOUND)


def test_half_widens_exactly() -> None:
    """Every finite half, subnormals among them, through the baseline's integer arithmetic."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    halves = bits.view(torch.float16)
    halves = halves[halves.isfinite()]
    x, z = halves[:, None].expand(-1, 1).contiguous(), torch.zeros(len(halves), 0).double()
    order, offsets = torch.arange(len(halves)), torch.arange(len(halves) + 1)
    for isa in ISAS:
        out = torch.zeros(len(halves), 1, 1, dtype=torch.float64)
        _core.gram(x, torch.zeros(1).double(), z, order, offsets, out, isa=isa)
        assert torch.equal(out[:, 0, 0], halves.double().square())


def test_threads_do_not_change_the_result() -> None:
    x, shift, z = problem(700, 300, 3)
    order, offsets = cells_of([300, 400], 700)
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, threads, 5):
            torch.set_num_threads(count)
            out = torch.zeros(2, 303, 303, dtype=torch.float64)
            _core.gram(x, shift, z, order, offsets, out)
            found.append(out)
    finally:
        torch.set_num_threads(threads)
    assert all(scaled_error(out, found[0]) < 1e-14 for out in found)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("d", [1, 7, 65, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_matrix(dtype: torch.dtype, d: int, isa: str) -> None:
    x, shift, z = problem(600, d, 3)
    order, offsets = torch.arange(600), torch.tensor([0, 100, 350, 600])
    cells = torch.zeros(3, d + 3, d + 3, dtype=torch.float64)
    _core.gram(x, shift, z, order, offsets, cells)
    total, alpha = cells.sum(0), torch.tensor([0.1, 1.0, 1e4], dtype=torch.float64)
    got = torch.full((3, d, d), SENTINEL, dtype=dtype)
    want = got.clone()
    sets = torch.tensor([2, 1, 0])
    _core.training_matrix(total, cells, sets, alpha.flip(0), got, isa=isa)
    _reference.training_matrix(total, cells, sets, alpha.flip(0), want)
    got, want = got.flip(0), want.flip(0)
    assert scaled_error(got.double().tril(), want.double().tril()) < 2 * torch.finfo(dtype).eps
    assert torch.equal(got.triu(1), want.triu(1))
    # And it is what it says: the rows that are left, about their own mean.
    rest = torch.cat([x[:100], x[350:]]).double()
    about = rest - rest.mean(0)
    truth = about.T @ about + torch.eye(d)
    assert scaled_error(got[1:2].double().tril(), truth[None]) < max(1e-12, torch.finfo(dtype).eps)


def test_bad_arguments_are_named() -> None:
    x, shift, z = problem(10, 5, 2)
    order, offsets = torch.arange(10), torch.tensor([0, 4, 10])
    out = torch.zeros(2, 7, 7, dtype=torch.float64)
    good = {"x": x, "shift": shift, "z": z, "order": order, "offsets": offsets, "out": out}
    bad = [
        ("x", x.int(), "x is int32"),
        ("x", x.T.contiguous().T, "x must be contiguous"),
        ("x", x[:, :0], "x has no columns"),
        ("x", x[0], "x has shape"),
        ("shift", shift[:4], "shift has shape"),
        ("shift", shift.float(), "shift is float32"),
        ("z", z[:9], "z has shape"),
        ("order", order.int(), "order is int32"),
        ("order", order[:0].reshape(0, 1), "order has shape"),
        ("offsets", torch.tensor([], dtype=torch.int64), "offsets must hold"),
        ("offsets", torch.tensor([0, 6, 4]), r"offsets\[2\] is 4"),
        ("offsets", torch.tensor([-1, 6, 10]), r"offsets\[0\] is -1"),
        ("offsets", torch.tensor([0, 6, 11]), r"offsets\[2\] is 11"),
        ("out", out[:1], "out has shape"),
        ("out", out.mT, "out must be contiguous"),
        ("out", out.float(), "out is float32"),
    ]
    for name, value, message in bad:
        with pytest.raises(ValueError, match=message):
            _core.gram(**{**good, name: value})
    with pytest.raises(ValueError, match="products must be 'float64' or 'float32', got 'bf16'"):
        _core.gram(**good, products="bf16")
    with pytest.raises(ValueError, match="unknown isa 'mmx'"):
        _core.gram(**good, isa="mmx")
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor"):
        _core.gram(**{**good, "x": x.numpy()})
    assert not out.any()


@pytest.mark.parametrize("wrong", [-1, 10, 2**40])
def test_rows_out_of_range_are_named_before_anything_is_written(wrong: int) -> None:
    x, shift, z = problem(10, 5, 2)
    out = torch.zeros(1, 7, 7, dtype=torch.float64)
    order = torch.arange(10)
    order[6] = wrong
    with pytest.raises(IndexError, match=rf"order\[6\] is {wrong}, but x has 10 rows"):
        _core.gram(x, shift, z, order, torch.tensor([0, 10]), out)
    assert not out.any()


def test_bad_training_sets_are_named() -> None:
    total = torch.eye(6, dtype=torch.float64) * 10
    held = torch.eye(6, dtype=torch.float64).repeat(2, 1, 1)
    alpha, out = torch.ones(2, dtype=torch.float64), torch.zeros(2, 4, 4)
    sets = torch.arange(2)
    _core.training_matrix(total, held, sets, alpha, out)
    for name, value, message in [
        ("total", total[:5], "total must be square"),
        ("held", held[:, :5], "held has shape"),
        ("held", torch.stack([held[0], total]), r"held\[1\] leaves 0.0* rows"),
        ("sets", sets.int(), "sets is int32"),
        ("alpha", alpha[:1], "alpha has shape"),
        ("out", out.half(), "out is float16"),
        ("out", torch.zeros(2, 4, 3), "out must hold square"),
        ("out", torch.zeros(2, 6, 6), "out has matrices of width 6"),
    ]:
        given = {"total": total, "held": held, "sets": sets, "alpha": alpha, "out": out}
        with pytest.raises(ValueError, match=message):
            _core.training_matrix(**(given | {name: value}))
    with pytest.raises(IndexError, match=r"sets\[1\] is 2"):
        _core.training_matrix(total, held, torch.tensor([0, 2]), alpha, out)
