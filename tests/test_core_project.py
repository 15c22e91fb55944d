"""project and project_t of the compiled core against their float64 reference."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geofast import _core, _reference

ISAS = sorted({"baseline", _core.detected_isa()})
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SENTINEL = 12345.0
TOLERANCE = 1e-14  # as a share of the sum of magnitudes; float32 products would give 1e-8


@pytest.fixture
def many_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    yield
    torch.set_num_threads(before)


def table(n: int, d: int, dtype: torch.dtype, kind: str = "plain", seed: int = 0) -> torch.Tensor:
    """Rows with a padding of NaN between them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator)
    if kind == "large mean":
        x += 1000
    elif kind == "outliers":
        x[torch.rand(n, d, generator=generator) < 0.02] *= 1e4
    whole = torch.full((n, d + 3), torch.nan, dtype=dtype)
    whole[:, 1 : 1 + d] = x.to(dtype)
    return whole[:, 1 : 1 + d]


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def check(
    x: torch.Tensor, shift: torch.Tensor, m: int, rows: torch.Tensor | None, isa: str | None
) -> None:
    n, d = x.shape[0] if rows is None else len(rows), x.shape[1]
    taken = (x if rows is None else x[rows]).double() - shift
    w, r = normal(m, d), normal(n, m, seed=2)
    out, out_t = torch.full((n, m), SENTINEL).double(), torch.full((m, d), SENTINEL).double()
    want, want_t = torch.empty_like(out), torch.empty_like(out_t)
    _core.project(x, shift, w, out, rows=rows, isa=isa)
    _core.project_t(x, shift, r, out_t, rows=rows, isa=isa)
    _reference.project(x, shift, w, want, rows=rows)
    _reference.project_t(x, shift, r, want_t, rows=rows)
    assert bool(((out - want).abs() <= TOLERANCE * (taken.abs() @ w.abs().T)).all())
    assert bool(((out_t - want_t).abs() <= TOLERANCE * (r.abs().T @ taken.abs())).all())


@settings(max_examples=200, deadline=None)
@given(
    n=st.one_of(st.integers(1, 40), st.sampled_from([130, 257])),
    d=st.one_of(st.integers(1, 40), st.sampled_from([511, 512, 513, 600, 1030])),
    m=st.integers(1, 11),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["plain", "large mean", "outliers"]),
    take=st.sampled_from(["all", "few", "repeats"]),
    isa=st.sampled_from(ISAS),
    seed=st.integers(0, 1000),
)
def test_matches_the_reference(
    n: int, d: int, m: int, dtype: torch.dtype, kind: str, take: str, isa: str, seed: int
) -> None:
    x = table(n, d, dtype, kind, seed)
    generator = torch.Generator().manual_seed(seed)
    rows = {
        "all": None,
        "few": torch.randperm(n, generator=generator)[: n // 2 + 1],
        "repeats": torch.randint(n, (2 * n + 1,), generator=generator),
    }[take]
    check(x, x.double().mean(0), m, rows, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [2, 40, 64])
def test_many_rows_and_threads(many_threads: None, m: int, dtype: torch.dtype, isa: str) -> None:
    x = table(2500, 640, dtype)
    check(x, normal(640, seed=3), m, torch.randperm(2500), isa)


def test_the_result_does_not_depend_on_the_threads(many_threads: None) -> None:
    x, shift, r = table(5000, 200, torch.float32), normal(200), normal(5000, 3)
    several, one = torch.empty(3, 200).double(), torch.empty(3, 200).double()
    _core.project_t(x, shift, r, several)
    torch.set_num_threads(1)
    _core.project_t(x, shift, r, one)
    assert torch.equal(several, one)


@pytest.mark.parametrize("isa", ISAS)
def test_large_means_do_not_cancel(isa: str) -> None:
    """Signal of size 1 on means of 1e6: subtracting after the product loses six digits."""
    x = (normal(50, 96).round(decimals=2) + 1e6).double()
    shift = torch.full((96,), 1e6).double()
    w = normal(2, 96)
    out, want = torch.empty(50, 2).double(), (x - shift) @ w.T
    _core.project(x, shift, w, out, isa=isa)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-13)
    late = x @ w.T - shift @ w.T
    assert float((late - want).abs().max()) > 1e-10


@pytest.mark.parametrize("isa", ISAS)
def test_by_hand(isa: str) -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=torch.bfloat16)
    shift, w = torch.tensor([1.0, 1.0, 1.0]).double(), torch.tensor([[1.0, 10.0, 100.0]]).double()
    out, out_t = torch.empty(3, 1).double(), torch.empty(1, 3).double()
    rows = torch.tensor([1, 0, 1])
    _core.project(x, shift, w, out, rows=rows, isa=isa)
    assert out[:, 0].tolist() == [543.0, 210.0, 543.0]
    r = torch.tensor([[1.0], [10.0], [100.0]]).double()
    _core.project_t(x, shift, r, out_t, rows=rows, isa=isa)
    assert out_t.tolist() == [[303.0, 414.0, 525.0]]


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_not_finite_stays_in_its_row_and_column(isa: str) -> None:
    x = table(9, 21, torch.float32)
    x[3, 20], x[5, 0] = torch.nan, torch.inf
    out, out_t = torch.empty(9, 4).double(), torch.empty(4, 21).double()
    _core.project(x, torch.zeros(21).double(), normal(4, 21), out, isa=isa)
    _core.project_t(x, torch.zeros(21).double(), normal(9, 4), out_t, isa=isa)
    assert (~out.isfinite()).all(1).nonzero()[:, 0].tolist() == [3, 5]
    assert (~out.isfinite()).any(1).nonzero()[:, 0].tolist() == [3, 5]
    assert (~out_t.isfinite()).all(0).nonzero()[:, 0].tolist() == [0, 20]
    assert (~out_t.isfinite()).any(0).nonzero()[:, 0].tolist() == [0, 20]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("n", "d", "m"), [(0, 5, 3), (4, 0, 3), (4, 5, 0)])
def test_empty(n: int, d: int, m: int, isa: str) -> None:
    x, shift = torch.ones(n, d), torch.zeros(d).double()
    out, out_t = torch.full((n, m), SENTINEL).double(), torch.full((m, d), SENTINEL).double()
    _core.project(x, shift, torch.ones(m, d).double(), out, isa=isa)
    _core.project_t(x, shift, torch.ones(n, m).double(), out_t, isa=isa)
    assert out.tolist() == torch.zeros(n, m).tolist()
    assert out_t.tolist() == torch.zeros(m, d).tolist()


X, SHIFT = torch.zeros(4, 6), torch.zeros(6).double()
W, R, OUT = torch.zeros(2, 6).double(), torch.zeros(4, 2).double(), torch.zeros(4, 2).double()
OUT_T = torch.zeros(2, 6).double()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": 3}, TypeError, "x must be a torch.Tensor"),
        ({"x": X.int()}, ValueError, "x .*float32, float16, bfloat16"),
        ({"x": X[0]}, ValueError, r"x has shape \[6\]"),
        ({"x": X.T.contiguous().T}, ValueError, "x must be contiguous in dimension 1"),
        ({"shift": SHIFT.float()}, ValueError, "shift is float32; expected float64"),
        ({"shift": SHIFT[:5]}, ValueError, r"shift has shape \[5\]; expected \[6\]"),
        ({"w": W[:, :5].contiguous()}, ValueError, r"w has shape \[2, 5\]; expected \[any, 6\]"),
        ({"w": W.T.contiguous().T}, ValueError, "w must be contiguous"),
        ({"out": OUT[:3]}, ValueError, r"out has shape \[3, 2\]; expected \[4, 2\]"),
        ({"out": OUT.float()}, ValueError, "out is float32; expected float64"),
        ({"rows": torch.zeros(4).int()}, ValueError, "rows is int32; expected int64"),
        ({"rows": torch.tensor([0, 1, 4, 2])}, IndexError, r"rows\[2\] is 4, but x has 4 rows"),
        ({"rows": torch.tensor([0, -1, 1, 2])}, IndexError, r"rows\[1\] is -1, but x has 4 rows"),
        ({"isa": "avx9"}, ValueError, "unknown isa 'avx9'"),
    ],
)
def test_bad_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments: dict[str, object] = {"x": X, "shift": SHIFT, "w": W, "out": OUT, **change}
    with pytest.raises(error, match=message):
        _core.project(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"r": R[:3]}, ValueError, r"r has shape \[3, 2\]; expected \[4, any\]"),
        ({"r": R.float()}, ValueError, "r is float32; expected float64"),
        ({"out": OUT_T[:, :5].contiguous()}, ValueError, r"out has shape \[2, 5\]; expected \[2"),
        ({"rows": torch.tensor([0, 1, 2, 9])}, IndexError, r"rows\[3\] is 9, but x has 4 rows"),
    ],
)
def test_bad_arguments_of_the_transpose(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    arguments: dict[str, object] = {"x": X, "shift": SHIFT, "r": R, "out": OUT_T, **change}
    with pytest.raises(error, match=message):
        _core.project_t(**arguments)  # type: ignore[arg-type]
