"""pool of the compiled core against its float64 reference."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geofast import _core, _reference

ISAS = sorted({"baseline", _core.detected_isa()})
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPS = ["first", "last", "mean", "max", "min"]
SENTINEL = 12345.0
# Sums are float32 over at most 64 tokens, as a tree of 4 and a chain of 16: 18 roundings of 2^-24,
# one more for the result. As a share of the mean of |x|.
MEAN_TOLERANCE = 19 * 2.0**-24

Job = tuple[str, int]


@pytest.fixture
def many_threads() -> Iterator[None]:
    """More threads than samples, so that every sample is put together from parts."""
    before = torch.get_num_threads()
    torch.set_num_threads(7)
    yield
    torch.set_num_threads(before)


def tokens(
    shape: tuple[int, int, int], dtype: torch.dtype, kind: str = "plain", seed: int = 0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    pick = torch.rand(shape, generator=generator) < 0.05
    if kind == "outliers":
        x[pick] *= 1e4
    elif kind == "large mean":
        x += 3e3
    elif kind == "infinite":
        x[pick] = torch.inf
        x[torch.rand(shape, generator=generator) < 0.02] = -torch.inf
    elif kind == "nan":
        x[pick] = torch.nan
    elif kind == "subnormal":
        x *= torch.finfo(dtype).smallest_normal / 4
    return x.to(dtype)


def outputs(jobs: list[Job], batch: int, dim: int) -> list[torch.Tensor]:
    """Column slices of one buffer, with columns between them that nobody may touch."""
    buffer = torch.full((batch, len(jobs) * (dim + 1) + 1), SENTINEL)
    return [buffer[:, j * (dim + 1) + 1 : (j + 1) * (dim + 1)] for j in range(len(jobs))]


def check(x: torch.Tensor, roles: torch.Tensor, jobs: list[Job], isa: str | None = None) -> None:
    batch, _, dim = x.shape
    outs = outputs(jobs, batch, dim)
    _core.pool(
        x, roles, [(op, bit, out) for (op, bit), out in zip(jobs, outs, strict=True)], isa=isa
    )
    for (op, bit), got in zip(jobs, outs, strict=True):
        want = torch.empty(batch, dim, dtype=torch.float64)
        _reference.pool(x, roles, [(op, bit, want)])
        if op == "mean":
            size = torch.empty(batch, dim, dtype=torch.float64)
            _reference.pool(x.abs(), roles, [("mean", bit, size)])
            same = (got == want) | (got.isnan() & want.isnan())
            bound = MEAN_TOLERANCE * size + 2.0**-149  # the step of subnormal results
            assert bool((same | ((got - want).abs() <= bound)).all()), (op, bit)
        else:
            torch.testing.assert_close(got.double(), want, rtol=0, atol=0, equal_nan=True)
    buffer = outs[0]._base if outs else None
    if buffer is not None:
        assert bool((buffer[:, :: dim + 1] == SENTINEL).all())


def strided(x: torch.Tensor, layout: str) -> torch.Tensor:
    """Return the same tokens in other memory, NaN wherever nobody may look."""
    batch, length, dim = x.shape
    if layout == "skipped tokens":
        whole = x.new_full((batch, 3 * length + 1, dim), torch.nan)
        whole[:, 1::3] = x
        return whole[:, 1::3]
    if layout == "padded rows":
        whole = x.new_full((batch, length, dim + 5), torch.nan)
        whole[..., 3 : 3 + dim] = x
        return whole[..., 3 : 3 + dim]
    if layout == "tokens first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    return x


@settings(max_examples=250, deadline=None)
@given(
    batch=st.integers(1, 5),
    length=st.one_of(st.integers(0, 20), st.integers(60, 70), st.integers(125, 200)),
    dim=st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 130])),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["plain", "outliers", "large mean", "infinite", "nan", "subnormal"]),
    layout=st.sampled_from(["plain", "skipped tokens", "padded rows", "tokens first"]),
    density=st.sampled_from([0.05, 0.5, 0.95, 1.0]),
    jobs=st.lists(st.tuples(st.sampled_from(OPS), st.integers(0, 7)), min_size=1, max_size=9),
    isa=st.sampled_from(ISAS),
    seed=st.integers(0, 1000),
)
def test_matches_the_reference(
    batch: int,
    length: int,
    dim: int,
    dtype: torch.dtype,
    kind: str,
    layout: str,
    density: float,
    jobs: list[Job],
    isa: str,
    seed: int,
) -> None:
    x = strided(tokens((batch, length, dim), dtype, kind, seed), layout)
    generator = torch.Generator().manual_seed(seed)
    has = torch.rand(batch, length, 8, generator=generator) < density
    roles = (has * 2 ** torch.arange(8)).sum(-1).byte()
    check(x, roles, jobs, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3001, 101), (2, 2000, 64), (5, 701, 130), (16, 197, 192)])
def test_samples_split_over_threads(
    many_threads: None, shape: tuple[int, int, int], dtype: torch.dtype, isa: str
) -> None:
    x = tokens(shape, dtype, "outliers")
    x[:, :: shape[1] // 9, ::7] = torch.nan
    roles = torch.full(shape[:2], 1, dtype=torch.uint8)
    roles[:, 0] |= 2
    roles[:, shape[1] // 2 :] |= 4
    roles[-1] &= ~4  # one sample without that role
    check(x, roles, [(op, bit) for bit in (0, 1, 2) for op in OPS], isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("op", ["max", "min"])
def test_nan_in_any_token_reaches_the_extreme(op: str, isa: str) -> None:
    length, dim = 23, 13
    for at in range(length):
        x = tokens((1, length, dim), torch.float32, seed=at)
        x[0, at, 5] = torch.nan
        out = torch.empty(1, dim)
        _core.pool(x, torch.ones(1, length, dtype=torch.uint8), [(op, 0, out)], isa=isa)
        assert bool(out[0, 5].isnan())
        assert int(out.isnan().sum()) == 1


@pytest.mark.parametrize("isa", ISAS)
def test_extremes_of_infinite_tokens(isa: str) -> None:
    x = torch.tensor([[[-torch.inf, torch.inf, 1.0], [-torch.inf, torch.inf, 2.0]]])
    low, high = torch.empty(1, 3), torch.empty(1, 3)
    _core.pool(x, torch.ones(1, 2, dtype=torch.uint8), [("max", 0, high), ("min", 0, low)], isa=isa)
    assert high.tolist() == [[-torch.inf, torch.inf, 2.0]]
    assert low.tolist() == [[-torch.inf, torch.inf, 1.0]]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_precision_number_is_widened_exactly(dtype: torch.dtype, isa: str) -> None:
    x = torch.arange(2**16).short().view(dtype).reshape(64, 1, 1024)
    roles = torch.ones(64, 1, dtype=torch.uint8)
    first, top = torch.empty(64, 1024), torch.empty(64, 1024)
    _core.pool(x, roles, [("first", 0, first), ("max", 0, top)], isa=isa)
    for got in (first, top):
        torch.testing.assert_close(got, x[:, 0].float(), rtol=0, atol=0, equal_nan=True)


def test_widening_holds_when_denormals_are_flushed() -> None:
    x = torch.arange(1, 1025).short().view(torch.float16).reshape(1, 1, 1024)
    want, got = x[:, 0].float(), torch.empty(1, 1024)
    assert torch.set_flush_denormal(True)
    try:
        _core.pool(x, torch.ones(1, 1, dtype=torch.uint8), [("first", 0, got)], isa="baseline")
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(got, want)


@pytest.mark.parametrize("isa", ISAS)
def test_mean_of_many_equal_tokens(isa: str) -> None:
    """Every token is the same, so that all roundings of a long sum err to the same side."""
    x = torch.linspace(0.1, 1000, 64).expand(1, 10_000, 64).contiguous()
    got, roles = torch.empty(1, 64), torch.ones(1, 10_000, dtype=torch.uint8)
    _core.pool(x, roles, [("mean", 0, got)], isa=isa)
    groups = torch.zeros(64)
    for token in x[0, ::4]:
        groups += 4 * token
    bound = MEAN_TOLERANCE * x[0, 0]
    assert bool(((got - x[0, 0]).abs() <= bound).all())
    assert bool(((groups / 10_000 - x[0, 0]).abs() > bound).any())  # so the bound can be missed


def test_a_job_does_not_depend_on_the_others_nor_on_padding() -> None:
    x, roles = tokens((2, 77, 33), torch.bfloat16), torch.ones(2, 77, dtype=torch.uint8)
    alone, together = torch.empty(2, 33), torch.empty(2, 33)
    _core.pool(x, roles, [("mean", 0, alone)])
    padded = torch.nn.functional.pad(x, (0, 0, 5, 3), value=torch.nan)
    padded_roles = torch.nn.functional.pad(roles, (5, 3)) * 3
    rest = torch.empty(2, 33)
    jobs = [("max", 1, rest), ("mean", 0, together), ("mean", 1, rest), ("min", 0, rest)]
    _core.pool(padded, padded_roles, jobs)
    assert torch.equal(alone, together)


def test_samples_without_tokens_are_nan_and_an_empty_batch_is_fine() -> None:
    jobs: list[Job] = [(op, 0) for op in OPS]
    for x in (torch.zeros(3, 0, 5), torch.zeros(3, 4, 5)):
        outs = outputs(jobs, 3, 5)
        roles = torch.zeros(x.shape[:2], dtype=torch.uint8)
        _core.pool(x, roles, [(op, bit, out) for (op, bit), out in zip(jobs, outs, strict=True)])
        assert all(bool(out.isnan().all()) for out in outs)
    _core.pool(
        torch.zeros(0, 4, 5), torch.zeros(0, 4, dtype=torch.uint8), [("mean", 0, torch.zeros(0, 5))]
    )
    _core.pool(
        torch.zeros(2, 4, 0), torch.zeros(2, 4, dtype=torch.uint8), [("mean", 0, torch.zeros(2, 0))]
    )
    _core.pool(torch.zeros(2, 4, 5), torch.zeros(2, 4, dtype=torch.uint8), [])


READS_ONE_PAGE = """
import ctypes, mmap, sys, torch
from geofast import _core
page = mmap.PAGESIZE
memory = mmap.mmap(-1, 6 * page)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
x = torch.frombuffer(memory, dtype=torch.float32).reshape(1, 6, page // 4)
x[0, 2], x[0, 4] = 2, 4
libc = ctypes.CDLL(None, use_errno=True)
for token in (0, 1, 3, 5):
    assert libc.mprotect(ctypes.c_void_p(start + token * page), ctypes.c_size_t(page), 0) == 0
roles = torch.tensor([[0, 0, 1, int(sys.argv[1]), 1, 0]], dtype=torch.uint8)
jobs = [(op, 0, torch.empty(1, page // 4)) for op in ("first", "last")]
if sys.argv[1] == "1":
    jobs.append(("mean", 0, torch.empty(1, page // 4)))
_core.pool(x, roles, jobs)
assert (jobs[0][2] == 2).all() and (jobs[1][2] == 4).all()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect is called by its Linux name")
@pytest.mark.parametrize(("middle", "dies"), [("0", False), ("1", True)])
def test_first_and_last_read_no_other_token(tmp_path: Path, middle: str, dies: bool) -> None:
    command = [sys.executable, "-c", READS_ONE_PAGE, middle]
    # Away from the source tree, which holds no compiled core.
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    # The address sanitizer reports the fault and exits where the kernel would kill.
    died = done.returncode == -signal.SIGSEGV or "AddressSanitizer: SEGV" in done.stderr
    assert died if dies else done.returncode == 0, done.stderr


def test_concurrent_calls() -> None:
    x, roles = tokens((4, 300, 200), torch.float32), torch.ones(4, 300, dtype=torch.uint8)

    def once(_: int) -> torch.Tensor:
        out = torch.empty(4, 200)
        _core.pool(x, roles, [("mean", 0, out)])
        return out

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(once, range(40)))
    for out in results:
        torch.testing.assert_close(out, x.mean(1))


X, ROLES, OUT = torch.zeros(2, 3, 8), torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("x", "roles", "jobs", "error", "message"),
    [
        ([1.0], ROLES, [], TypeError, "x must be a torch.Tensor"),
        (X.double(), ROLES, [], ValueError, "x is float64; expected one of float32, float16, bf"),
        (X[0], ROLES, [], ValueError, r"x has shape \[3, 8\]; expected \[any, any, any\]"),
        (X.mT.contiguous().mT, ROLES, [], ValueError, "x must be contiguous in dimension 2"),
        (X, ROLES.bool(), [], ValueError, "roles is bool; expected uint8"),
        (X, ROLES[:, :2], [], ValueError, r"roles has shape \[2, 2\]; expected \[2, 3\]"),
        (X, ROLES.T.contiguous().T, [], ValueError, "roles must be contiguous"),
        (X, ROLES, [("mean", 0)], TypeError, r"jobs\[0\] must be a tuple \(op, bit, out\)"),
        (X, ROLES, [(1, 0, OUT)], TypeError, r"jobs\[0\] must begin with the op"),
        (X, ROLES, [("mean", "0", OUT)], TypeError, r"jobs\[0\] must have the bit"),
        (X, ROLES, [("sum", 0, OUT)], ValueError, r"jobs\[0\] has op 'sum'; expected first, last"),
        (X, ROLES, [("mean", 8, OUT)], ValueError, r"jobs\[0\] has bit 8; a role byte has bits 0"),
        (X, ROLES, [("mean", -1, OUT)], ValueError, r"jobs\[0\] has bit -1"),
        (X, ROLES, [("mean", 0, OUT), ("max", 0, 3)], TypeError, r"jobs\[1\] out must be a torch"),
        (X, ROLES, [("mean", 0, OUT.double())], ValueError, r"jobs\[0\] out is float64; expected"),
        (X, ROLES, [("mean", 0, OUT[:, :7])], ValueError, r"out has shape \[2, 7\]; expected \[2"),
        (X, ROLES, [("mean", 0, OUT.T.contiguous().T)], ValueError, "out must be contiguous in di"),
        (X, ROLES, [("mean", 0, OUT[:1].expand(2, 8))], ValueError, "out has rows that overlap"),
    ],
)
def test_bad_arguments(
    x: object, roles: object, jobs: list[object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        _core.pool(x, roles, jobs)  # type: ignore[arg-type]


def test_unknown_isa() -> None:
    with pytest.raises(ValueError, match="unknown isa 'sse'; expected 'baseline' or 'avx2'"):
        _core.pool(X, ROLES, [], isa="sse")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 3e38])
def test_whether_all_that_was_written_is_finite(value: float, isa: str) -> None:
    for place in ((0, 0), (1, 6)):
        x, outs = torch.ones(2, 3, 7), [torch.empty(2, 7), torch.empty(2, 9)[:, 1:8]]
        roles = torch.ones(2, 3, dtype=torch.uint8)
        jobs = [("mean", 0, outs[0]), ("last", 0, outs[1])]
        assert _core.pool(x, roles, jobs, isa=isa) is True
        x[place[0], 2, place[1]] = value
        assert _core.pool(x, roles, jobs, isa=isa) is (value == 3e38)
        assert all(bool(out.isfinite().all()) for out in outs) == (value == 3e38)
    assert _core.pool(x, torch.zeros_like(roles), jobs, isa=isa) is False  # no token: NaN
