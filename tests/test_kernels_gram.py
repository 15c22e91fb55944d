"""The Gram kernel against the float64 reference: on a GPU if there is one, else interpreted."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
import torch

NATIVE = torch.cuda.is_available()
if not NATIVE:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported

pytest.importorskip("triton")

from geofast.kernels import gram as kernels  # noqa: E402

from geofast import _reference  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SENTINEL = 12345.0
# As a share of sqrt(G_ii G_jj). Tensor cores cut their sums off where the interpreter rounds them:
# 48 additions to a sum of 128 rows, each to the same side and by at most 2^-23.
TOLERANCE = 6e-6 if NATIVE else 1e-6
pytestmark = pytest.mark.parametrize(
    "device", ["cuda" if NATIVE else "cpu"], ids=["native" if NATIVE else "interpreted"]
)


def test_the_kernel_runs_as_the_id_says(device: str) -> None:
    for function in (kernels.gram_kernel, kernels.tl.zeros):
        interpreted = type(function).__name__ == "InterpretedFunction"
        assert interpreted == (device == "cpu"), "triton was imported before TRITON_INTERPRET"


def problem(
    n: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(n, d, generator=generator) + 3).to(dtype)
    return x, 3 + 0.1 * torch.randn(d, generator=generator, dtype=torch.float64)


def targets(n: int, q: int) -> torch.Tensor:
    z = torch.randn(n, q, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    z[:, :1] = 1
    return z


def cells_of(counts: list[int], n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Order and offsets of cells with these numbers of rows, drawn with repeats."""
    generator = torch.Generator().manual_seed(8)
    order = torch.randint(n, (sum(counts),), generator=generator)
    return order, torch.tensor([0, *counts]).cumsum(0)


def scaled_error(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Return the error of the lower triangle over sqrt(G_ii G_jj)."""
    scale = want.diagonal(dim1=-2, dim2=-1).sqrt()
    return (got - want).tril().abs() / (scale[:, :, None] * scale[:, None]).clamp_min(1e-300)


def check(
    device: str,
    problems: Sequence[tuple[torch.Tensor, torch.Tensor]],
    z: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
) -> None:
    dim, cells, p = problems[0][0].shape[1], len(offsets) - 1, problems[0][0].shape[1] + z.shape[1]
    start = torch.full((cells, p, p), SENTINEL, dtype=torch.float64).triu(1)
    outs = [start.to(device, copy=True) for _ in problems]
    kernels.grams(
        [x.to(device) for x, _ in problems],
        [shift.to(device) for _, shift in problems],
        z.to(device),
        order.to(device),
        offsets.to(device),
        outs,
    )
    for (x, shift), out in zip(problems, outs, strict=True):
        got, want = out.cpu(), torch.zeros(cells, p, p, dtype=torch.float64)
        _reference.gram(x, shift, z, order, offsets, want)
        error = scaled_error(got, want)
        assert bool((error[:, :dim] < TOLERANCE).all())
        assert bool((error[:, dim:] < 1e-13).all())  # with z, products are float64
        assert torch.equal(got.triu(1), start)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 5, 17, 64, 130])
def test_matches_the_reference(device: str, dim: int, dtype: torch.dtype) -> None:
    # A cell of one row, an empty one, and in one case a row more than a float32 sum takes.
    long = 129 if dim == 5 else 19
    check(device, [problem(150, dim, dtype)], targets(150, 3), *cells_of([1, 0, long], 150))


def test_rows_of_odd_width(device: str) -> None:
    check(device, [problem(40, 257)], targets(40, 1), *cells_of([20], 40))


@pytest.mark.parametrize("q", [0, 1, 4, 5, 33])
def test_any_number_of_targets(device: str, q: int) -> None:
    check(device, [problem(60, 3)], targets(60, q), *cells_of([13], 60))


def test_no_columns_and_no_cells(device: str) -> None:
    check(device, [problem(9, 0)], targets(9, 2), *cells_of([5, 4], 9))
    check(device, [problem(9, 4)], targets(9, 2), *cells_of([], 9))
    check(device, [problem(0, 4)], targets(0, 2), *cells_of([0], 1))


def test_several_problems(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "PROBLEMS", (1, 2))  # in a launch of two and one of one
    problems = [problem(30, 6, torch.bfloat16, seed) for seed in range(3)]
    check(device, problems, targets(30, 2), *cells_of([17, 4], 30))


def test_rows_of_a_wider_table(device: str) -> None:
    x, shift = problem(50, 70)
    part = x.to(device)[::2, 17:60]
    assert part.stride(0) == 140
    check(device, [(part, shift[17:60].clone())], targets(25, 2), *cells_of([40], 25))


def test_calls_add_up(device: str) -> None:
    x, shift = problem(90, 20)
    z, order, offsets = targets(90, 2), torch.arange(90), torch.tensor([0, 30, 90])
    whole = torch.zeros(2, 22, 22, dtype=torch.float64)
    _reference.gram(x, shift, z, order, offsets, whole)
    parts = torch.zeros_like(whole).to(device)
    for first in range(0, 90, 45):
        split = torch.tensor([0, max(30 - first, 0), 45], device=device)
        now = order[first : first + 45].to(device)
        kernels.grams([x.to(device)], [shift.to(device)], z.to(device), now, split, [parts])
    assert float(scaled_error(parts.cpu(), whole).max()) < TOLERANCE


def test_large_means_need_all_of_the_shift(device: str) -> None:
    generator = torch.Generator().manual_seed(1)
    mean = 1000 * torch.randn(40, generator=generator, dtype=torch.float64)
    x = (torch.randn(140, 40, generator=generator) + mean).float()
    z, order, offsets = torch.ones(140, 1, dtype=torch.float64), torch.arange(140), [0, 140]
    check(device, [(x, mean)], z, order, torch.tensor(offsets))
    about = x.double() - mean
    truth = (about.T @ about)[None]
    # A shift rounded to float32 would not do: the test above can fail.
    rounded = x.double() - mean.float().double()
    assert float(scaled_error((rounded.T @ rounded)[None], truth).max()) > 2 * TOLERANCE


def test_rows_that_are_not_asked_for_do_not_leak(device: str) -> None:
    x, shift = problem(40, 20, torch.float16)
    z = targets(40, 2)
    x[[0, 5, 39]], z[[0, 5, 39]] = torch.nan, torch.nan  # 0 stands in for rows past a cell's end
    order = torch.tensor([3, 4, 6, 38, 3])
    check(device, [(x, shift)], z, order, torch.tensor([0, 3, 5]))


def test_nan_in_a_row_reaches_its_column(device: str) -> None:
    x, shift = problem(20, 70)
    x[4, 66] = torch.nan
    out = torch.zeros(1, 71, 71, dtype=torch.float64, device=device)
    order, offsets = torch.arange(20, device=device), torch.tensor([0, 20], device=device)
    z = targets(20, 1).to(device)
    kernels.grams([x.to(device)], [shift.to(device)], z, order, offsets, [out])
    hit = out[0].isnan().cpu()
    assert bool(hit[66, :67].all())
    assert bool(hit[66:, 66].all())
    assert int(hit.sum()) == 71


def test_offsets_beyond_two_to_the_31(device: str) -> None:
    # Memory that is not touched is not there: three rows are.
    far = 2**30 + 8
    memory = torch.empty(2 * far + 4, dtype=torch.bfloat16, device=device)
    x = memory.as_strided((3, 4), (far, 1))
    x.copy_(torch.arange(12.0).reshape(3, 4))
    out = torch.zeros(1, 4, 4, dtype=torch.float64, device=device)
    z, shift = torch.zeros(3, 0), torch.zeros(4)
    order, offsets = torch.tensor([2], device=device), torch.tensor([0, 1], device=device)
    double = torch.float64
    kernels.grams([x], [shift.to(device, double)], z.to(device, double), order, offsets, [out])
    assert out[0].diagonal().tolist() == [64, 81, 100, 121]


X, S, Z = torch.zeros(5, 8), torch.zeros(8, dtype=torch.float64), torch.zeros(5, 2).double()
ORDER, OFFSETS = torch.arange(5), torch.tensor([0, 2, 5])
OUT = torch.zeros(2, 10, 10, dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"xs": [X, X]}, "expected as many xs as shifts and outs; got 2 xs, 1 shifts and 1 outs"),
        ({"xs": [X.double()]}, r"x is float64 \[5, 8\] .* expected \[5, 8\] of float32, float16"),
        ({"xs": [X.T.contiguous().T]}, "with contiguous rows"),
        ({"shifts": [S.float()]}, r"shift is float32 \[8\] .* expected float64 \[8\]"),
        ({"z": Z[:4]}, r"z is float64 \[4, 2\] .* expected float64 \[5, 2\]"),
        ({"order": ORDER.int()}, r"order is int32 \[5\] .* expected int64 \[5\]"),
        (
            {"offsets": OFFSETS[:2]},
            r"out is float64 \[2, 10, 10\] .* expected float64 \[1, 10, 10\]",
        ),
        ({"outs": [OUT.mT]}, r"out is .* strides \[100, 1, 10\] .* contiguous, on cpu"),
        ({"outs": [OUT.to("meta")]}, "out is .* on meta; expected .* on cpu"),
    ],
)
def test_bad_arguments(device: str, change: dict[str, object], message: str) -> None:
    good = {"xs": [X], "shifts": [S], "z": Z, "order": ORDER, "offsets": OFFSETS, "outs": [OUT]}
    with pytest.raises(ValueError, match=message):
        kernels.grams(**(good | change))
