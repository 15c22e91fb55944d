"""The pooling kernel against the float64 reference: on a GPU if there is one, else interpreted."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

NATIVE = torch.cuda.is_available()
if not NATIVE:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported

pytest.importorskip("triton")

from geofast.kernels import pool as kernels  # noqa: E402

from geofast import _reference  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SENTINEL = 12345.0
JOBS = [("first", 1), ("mean", 0), ("max", 0), ("min", 2), ("last", 0), ("mean", 2), ("max", 7)]
pytestmark = pytest.mark.parametrize(
    "device", ["cuda" if NATIVE else "cpu"], ids=["native" if NATIVE else "interpreted"]
)


def test_the_kernel_runs_as_the_id_says(device: str) -> None:
    for function in (kernels.pool_kernel, kernels.tl.zeros):
        interpreted = type(function).__name__ == "InterpretedFunction"
        assert interpreted == (device == "cpu"), "triton was imported before TRITON_INTERPRET"


def tokens(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x[torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.05] *= 1e3
    return x.to(dtype)


def some_roles(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    # Bit 7 is nobody's.
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 128, (batch, length), generator=generator).byte()


def bound(x: torch.Tensor, roles: torch.Tensor, bit: int) -> torch.Tensor:
    """What float32 sums may err by: a rounding a token, as a share of the mean of |x|."""
    size = torch.empty(x.shape[0], x.shape[2], dtype=torch.float64)
    _reference.pool(x.abs(), roles, [("mean", bit, size)])
    return (x.shape[1] + 2) * 2.0**-24 * size + 2.0**-149


def check(
    device: str,
    x: torch.Tensor,
    roles: torch.Tensor,
    jobs: list[tuple[str, int]],
    starts: list[int] | None = None,
) -> None:
    samples, dim = (len(x) if starts is None else len(starts) - 1), x.shape[2]
    pieces = [(x, roles)]
    if starts is not None:
        pieces = [(x[:, a:b], roles[:, a:b]) for a, b in itertools.pairwise(starts)]
    # Slices of one buffer, with columns between them that nobody may touch.
    buffer = torch.full((samples, len(jobs) * (dim + 1) + 1), SENTINEL).to(device)
    outs = [buffer[:, j * (dim + 1) + 1 : (j + 1) * (dim + 1)] for j in range(len(jobs))]
    kernels.pool(
        x.to(device) if device != "cpu" else x,
        roles.to(device),
        [(op, bit, out) for (op, bit), out in zip(jobs, outs, strict=True)],
        None if starts is None else torch.tensor(starts, device=device),
    )
    assert bool((buffer[:, :: dim + 1] == SENTINEL).all())
    for (op, bit), got in zip(jobs, outs, strict=True):
        want = torch.empty(samples, dim, dtype=torch.float64)
        slack = torch.zeros(samples, dim, dtype=torch.float64)
        for i, (part, part_roles) in enumerate(pieces):
            to = slice(None) if starts is None else slice(i, i + 1)
            _reference.pool(part, part_roles, [(op, bit, want[to])])
            if op == "mean":
                slack[to] = bound(part, part_roles, bit)
        have = got.double().cpu()
        same = (have == want) | (have.isnan() & want.isnan())
        assert bool((same | ((have - want).abs() <= slack)).all()), (op, bit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 0, 5),
        (0, 3, 5),
        (3, 4, 0),
        (5, 1, 1),
        (1, 3, 17),
        (2, 65, 64),
        (1, 65, 130),
        (1, 3, 257),
    ],
    ids=str,
)
def test_matches_the_reference(
    device: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    check(device, tokens(shape, dtype), some_roles(*shape[:2]), JOBS)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_leak(device: str, side: str) -> None:
    x, roles = tokens((3, 70, 33), torch.float16), some_roles(3, 70) | 1
    for sample, length in enumerate([70, 9, 0]):
        pad = slice(length, 70) if side == "right" else slice(0, 70 - length)
        x[sample, pad] = torch.nan
        roles[sample, pad] = 0
    check(device, x, roles, JOBS)
    # Tokens of another role are read beside those of one's own, and do not leak either.
    x[:, ::2], roles[:, ::2] = torch.nan, 2
    check(device, x, roles, [("mean", 0), ("max", 0), ("min", 0), ("max", 1)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["skipped tokens", "padded rows", "tokens first"])
def test_strided_tokens(device: str, layout: str, dtype: torch.dtype) -> None:
    x = tokens((2, 7, 24), dtype).to(device)
    if layout == "tokens first":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "skipped tokens":
        whole = x.new_full((2, 22, 24), torch.nan)
        whole[:, 1::3] = x
        x = whole[:, 1::3]
    else:
        whole = x.new_full((2, 7, 29), torch.nan)
        whole[..., 3:27] = x
        x = whole[..., 3:27]
    assert not x.is_contiguous()
    roles = torch.ones(2, 7, dtype=torch.uint8, device=device)
    outs = [torch.empty(2, 24, device=device) for _ in kernels.OPS]
    kernels.pool(x, roles, [(op, 0, out) for op, out in zip(kernels.OPS, outs, strict=True)])
    for op, out in zip(kernels.OPS, outs, strict=True):
        want = torch.empty(2, 24, dtype=torch.float64)
        _reference.pool(x.cpu(), roles.cpu(), [(op, 0, want)])
        torch.testing.assert_close(out.double().cpu(), want, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_samples(device: str, dtype: torch.dtype) -> None:
    starts = [2, 2, 3, 70, 70, 75, 80]  # two of them empty; tokens before and behind are nobody's
    x = tokens((1, 85, 20), dtype)
    x[:, [0, 1, *range(80, 85)]] = torch.nan
    check(device, x, some_roles(1, 85) | 1, JOBS, starts)


@pytest.mark.parametrize("op", ["max", "min", "mean"])
def test_nan_in_any_token_reaches_the_row(device: str, op: str) -> None:
    # The samples are one another's opposite: each has the NaN in another token.
    length, dim = 12, 13
    x = tokens((1, length, dim), torch.float32).repeat(length, 1, 1)
    x[torch.arange(length), torch.arange(length), 5] = torch.nan
    out = torch.empty(length, dim, device=device)
    roles = torch.ones(length, length, dtype=torch.uint8, device=device)
    kernels.pool(x.to(device), roles, [(op, 0, out)])
    assert bool(out[:, 5].isnan().all())
    assert int(out.isnan().sum()) == length


def test_extremes_of_infinite_tokens(device: str) -> None:
    x = torch.tensor([[[-torch.inf, torch.inf, 1.0], [-torch.inf, torch.inf, 2.0]]], device=device)
    low, high = torch.empty(1, 3, device=device), torch.empty(1, 3, device=device)
    roles = torch.ones(1, 2, dtype=torch.uint8, device=device)
    kernels.pool(x, roles, [("max", 0, high), ("min", 0, low)])
    assert high.tolist() == [[-torch.inf, torch.inf, 2.0]]
    assert low.tolist() == [[-torch.inf, torch.inf, 1.0]]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_half_precision_number_is_widened_exactly(device: str, dtype: torch.dtype) -> None:
    x = torch.arange(2**16).short().view(dtype).reshape(64, 1, 1024)[::8]
    if not NATIVE and dtype == torch.bfloat16:  # whose subnormal numbers the interpreter misreads
        x = torch.where(x.abs() < torch.finfo(dtype).smallest_normal, 0, x)
    x = x.to(device)
    first, top = torch.empty(8, 1024, device=device), torch.empty(8, 1024, device=device)
    roles = torch.ones(8, 1, dtype=torch.uint8, device=device)
    kernels.pool(x, roles, [("first", 0, first)])
    torch.testing.assert_close(first, x[:, 0].float(), rtol=0, atol=0, equal_nan=True)
    kernels.pool(x[:1], roles[:1], [("max", 0, top[:1])])
    torch.testing.assert_close(top[:1], x[:1, 0].float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_samples(device: str, dtype: torch.dtype) -> None:
    check(device, tokens((1, 1500, 40), dtype), some_roles(1, 1500), [("mean", 0), ("last", 3)])
    check(device, tokens((2, 2500, 4), dtype), some_roles(2, 2500), [("last", 3), ("first", 6)])


def test_a_job_does_not_depend_on_the_others(device: str) -> None:
    x, roles = tokens((2, 77, 33), torch.bfloat16).to(device), some_roles(2, 77).to(device)
    alone, together, rest = (torch.empty(2, 33, device=device) for _ in range(3))
    kernels.pool(x, roles, [("mean", 0, alone)])
    kernels.pool(x, roles, [("max", 1, rest), ("mean", 0, together)])
    assert torch.equal(alone, together)


@pytest.mark.parametrize("axis", ["tokens", "samples"])
def test_offsets_beyond_two_to_the_31(device: str, axis: str) -> None:
    # Memory that is not touched is not there: three rows are.
    far = 2**30 + 8
    memory = torch.empty(2 * far + 4, dtype=torch.bfloat16, device=device)
    shape, stride = ((1, 3, 4), (0, far, 1)) if axis == "tokens" else ((3, 1, 4), (far, 4, 1))
    x = memory.as_strided(shape, stride)
    x.copy_(torch.arange(12.0).reshape(shape))
    roles = torch.ones(shape[:2], dtype=torch.uint8, device=device)
    top, last = torch.empty(shape[0], 4, device=device), torch.empty(shape[0], 4, device=device)
    kernels.pool(x, roles, [("max", 0, top), ("last", 0, last)])
    assert top[-1].tolist() == last[-1].tolist() == [8, 9, 10, 11]


@pytest.mark.parametrize(("ops", "streams"), [(["first", "last"], False), (["last", "max"], True)])
def test_first_and_last_alone_do_not_stream_the_tokens(
    device: str, ops: list[str], streams: bool
) -> None:
    x, out = torch.zeros(4, 50, 8, device=device), torch.zeros(4, 8, device=device)
    roles = torch.ones(4, 50, dtype=torch.uint8, device=device)
    _, arguments = kernels.launch(x, roles, [(op, 2, out) for op in ops])
    assert arguments["READ"] == (4 if streams else 0)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(("samples", "dim"), [(8, 3584), (64, 1024), (1024, 4096), (1, 64)])
def test_tiles(device: str, samples: int, dim: int, itemsize: int) -> None:
    choice = kernels.blocks(itemsize, samples, dim, 132, True)
    assert choice["BLOCK_D"] * itemsize >= 128
    # Sixteen bytes a thread at least, and no thread without a column of its own.
    assert choice["BLOCK_T"] * choice["BLOCK_D"] * itemsize >= 32 * choice["num_warps"] * 16
    if samples * dim * itemsize >= 3 * 132 * 128:
        assert samples * dim / choice["BLOCK_D"] >= 3 * 132


class Compiling:
    """Stands for the kernel on a GPU: its interpreter, compiled for what Triton asks of arguments.

    A launch returns what was made for its arguments, and that refuses arguments for which Triton
    would have made another.
    """

    def __init__(self, interpreted: Any) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend
        from triton.runtime.jit import JITFunction, create_function_from_signature

        self.interpreted, self.arg_names = interpreted, interpreted.arg_names
        unspecialized = interpreted.kwargs["do_not_specialize"]
        jit = JITFunction(interpreted.fn, do_not_specialize=unspecialized)
        backend = make_backend(GPUTarget("cuda", 90, 32))
        self.bind = create_function_from_signature(jit.signature, jit.params, backend)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
        def launch(**arguments: Any) -> Compiled:
            self.interpreted[grid](**arguments)
            return Compiled(self, self.bind(**arguments)[1])

        return launch


class Compiled:
    def __init__(self, kernel: Compiling, made_for: list[Any]) -> None:
        self.kernel, self.made_for = kernel, made_for

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            assert self.kernel.bind(*arguments)[1] == self.made_for
            self.kernel.interpreted[grid](*arguments)

        return run


@pytest.fixture
def launchers(device: str, monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    """What is kept of launches: nothing yet."""
    kept: dict[Any, Any] = {}
    monkeypatch.setattr(kernels, "_launchers", kept)
    if device == "cpu":
        monkeypatch.setattr(kernels, "pool_kernel", Compiling(kernels.pool_kernel))
    return kept


def pool_part(
    device: str,
    *,
    batch: int = 2,
    length: int = 5,
    dim: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    x: tuple[int, int] = (64, 0),
    roles: tuple[int, int] = (16, 0),
    out: tuple[int, int] = (48, 0),
    jobs: tuple[tuple[str, int], ...] = (("mean", 0), ("max", 1)),
    starts: tuple[int, ...] | None = None,
    starts_at: int = 0,
) -> None:
    """Pool parts of aligned memory, given as (width of a row, first column); hold it to the
    reference."""
    (x_wide, x_at), (roles_wide, roles_at), (out_wide, out_at) = x, roles, out
    samples = batch if starts is None else len(starts) - 1
    hidden = tokens((3, 6, x_wide), dtype).to(device)[:batch, :length, x_at : x_at + dim]
    role = some_roles(3, roles_wide).to(device)[:batch, roles_at : roles_at + length]
    memory = [torch.full((3, out_wide), SENTINEL, device=device) for _ in jobs]
    outs = [whole[:samples, out_at : out_at + dim] for whole in memory]
    ends = None
    if starts is not None:
        ends = torch.tensor([0] * starts_at + [*starts], device=device)[starts_at:]
    kernels.pool(hidden, role, [(*job, o) for job, o in zip(jobs, outs, strict=True)], ends)
    hidden, role = hidden.cpu(), role.cpu()
    for (op, bit), got in zip(jobs, outs, strict=True):
        want = torch.empty(samples, dim, dtype=torch.float64)
        for i in range(samples):
            line, own = (i, slice(None)) if starts is None else (0, slice(*starts[i : i + 2]))
            one = hidden[line : line + 1, own], role[line : line + 1, own]
            _reference.pool(*one, [(op, bit, want[i : i + 1])])
        torch.testing.assert_close(got.double().cpu(), want, rtol=1e-5, atol=1e-3, equal_nan=True)


PACKED = {"batch": 1, "starts": (0, 2, 5)}


@pytest.mark.parametrize(
    ("base", "change"),
    [
        ({}, {"batch": 3}),
        ({}, {"batch": 1}),
        ({}, {"length": 4}),
        ({}, {"dim": 31}),
        ({}, {"dtype": torch.float16}),
        ({}, {"x": (80, 0)}),
        ({}, {"x": (65, 0)}),
        ({}, {"x": (64, 1)}),
        ({}, {"roles": (32, 0)}),
        ({}, {"roles": (16, 1)}),
        ({}, {"out": (64, 0)}),
        ({}, {"out": (49, 0)}),
        ({}, {"out": (48, 1)}),
        ({}, {"jobs": (("min", 0), ("max", 1))}),
        ({}, {"jobs": (("mean", 2), ("max", 1))}),
        ({}, {"jobs": (("max", 1), ("mean", 0))}),
        ({}, {"jobs": (("mean", 0),)}),
        ({"batch": 1}, {"starts": (0, 5)}),
        (PACKED, {"starts": (0, 1, 3, 5)}),
        (PACKED, {"starts_at": 1}),
    ],
    ids=str,
)
def test_another_form_gets_another_launch(
    device: str, launchers: dict[Any, Any], base: dict[str, Any], change: dict[str, Any]
) -> None:
    for case in (base, base | change) * 2:
        pool_part(device, **case)
    assert len(launchers) == 2


def test_a_form_is_checked_and_chosen_for_once(
    device: str, launchers: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool_part(device)
    monkeypatch.setattr(kernels, "_check", None)
    pool_part(device)
    with pytest.raises(TypeError):
        pool_part(device, length=4)


def test_tiles_and_launches_put_in_the_place_of_others_are_taken(
    device: str, launchers: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool_part(device)
    tile = {"BLOCK_T": 16, "BLOCK_D": 16, "STAGES": 2, "num_warps": 4}
    monkeypatch.setattr(kernels, "blocks", lambda *_: tile)
    pool_part(device)
    assert len(launchers) == 2
    monkeypatch.setattr(kernels, "launch", None)
    with pytest.raises(TypeError):
        pool_part(device)


def test_nothing_is_kept_where_more_decides(
    device: str, launchers: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    pool_part(device)
    assert not launchers


def test_forms_are_not_kept_without_end(
    device: str, launchers: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_FORMS", 2)
    for length in (1, 2, 3, 4, 3):
        pool_part(device, length=length)
        assert 0 < len(launchers) <= 2


X, ROLES, OUT = torch.zeros(2, 3, 8), torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(2, 8)
ENDS = torch.tensor([0, 3])


@pytest.mark.parametrize(
    ("x", "roles", "job", "starts", "message"),
    [
        (X.double(), ROLES, ("mean", 0, OUT), None, r"x is float64 \[2, 3, 8\] with strides"),
        (X[0], ROLES, ("mean", 0, OUT), None, r"expected float32, float16 or bfloat16 \[batch"),
        (X.mT.contiguous().mT, ROLES, ("mean", 0, OUT), None, "contiguous in dim"),
        (X, ROLES.bool(), ("mean", 0, OUT), None, r"roles is bool .* expected uint8 \[2, 3\]"),
        (X, ROLES[:, :2], ("mean", 0, OUT), None, r"roles is uint8 \[2, 2\]"),
        (X, ROLES, ("sum", 0, OUT), None, r"job \('sum', 0\): expected first, last, mean"),
        (X, ROLES, ("mean", 8, OUT), None, r"job \('mean', 8\): .* a bit from 0 to 7"),
        (X, ROLES, ("mean", 0, OUT[:, :7]), None, r"the out of mean is float32 \[2, 7\]"),
        (X, ROLES, ("mean", 0, OUT.double()), None, r"expected float32 \[2, 8\]"),
        (X, ROLES, ("mean", 0, OUT), torch.tensor([0, 1]), "starts is .* one sequence; x has 2"),
        (X[:1], ROLES[:1], ("mean", 0, OUT[:1]), ENDS.int(), r"starts is int32 .* expected int64"),
        (X[:1], ROLES[:1], ("mean", 0, OUT), ENDS, r"the out of mean is .* float32 \[1, 8\]"),
        (X, ROLES, ("mean", 0, OUT.to("meta")), None, "x is on cpu and a tensor beside it on meta"),
    ],
)
def test_bad_arguments(
    device: str,
    launchers: dict[Any, Any],
    x: torch.Tensor,
    roles: torch.Tensor,
    job: tuple[str, int, torch.Tensor],
    starts: torch.Tensor | None,
    message: str,
) -> None:
    if device == "cpu":  # what is refused is so beside launches that are kept
        kernels.pool(X, ROLES, [("mean", 0, OUT)])
        kernels.pool(X[:1], ROLES[:1], [("mean", 0, OUT[:1])], ENDS)
        assert len(launchers) == 2
    with pytest.raises(ValueError, match=message):
        kernels.pool(x, roles, [job], starts)
