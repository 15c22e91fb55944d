"""The float64 Gram kernel in CUDA C++: emulated on the CPU, and on a GPU where there is one."""

from __future__ import annotations

import ctypes
import importlib
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch

from geofast import _reference

ROOT = Path(__file__).parents[1]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]  # in RowType's order
SENTINEL = 12345.0
TOLERANCE = 1e-13  # of sqrt(G_ii G_jj), as the core's float64 products
IMPLEMENTATIONS = ["emulated 80", "emulated 90", "native"]  # 80 and 90 have products of their own

Tensors = Sequence[torch.Tensor]
Grams = Callable[[Tensors, Tensors, torch.Tensor, torch.Tensor, torch.Tensor, Tensors], None]


class Problem(ctypes.Structure):
    """GramProblem of kernels/cuda/gram_cuda.h."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("x", "shift", "out")],
        ("stride", ctypes.c_int),
    ]


class Shape(ctypes.Structure):
    """GramShape of kernels/cuda/gram_cuda.h."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("z", "order", "offsets")],
        *[(name, ctypes.c_int) for name in ("z_stride", "dim", "q", "cells")],
    ]


def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    assert found, "the emulator needs the C++ compiler that built geofast: set CXX"
    return found


def emulator(capability: str, folder: Path) -> ctypes.CDLL:
    library = folder / f"gram_{capability}.so"
    command = [compiler(), "-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    command += ["-Wno-unknown-pragmas", f"-D__CUDA_ARCH__={capability}0"]
    command += [f"-I{ROOT / room}" for room in ("tests/cuda_emulator", "kernels/cuda", "csrc")]
    command += [str(ROOT / "tests/cuda_emulator/gram.cpp"), "-o", str(library)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return ctypes.CDLL(str(library))


def emulate(library: ctypes.CDLL) -> Grams:
    library.gram.restype = ctypes.c_char_p

    def grams(
        xs: Tensors,
        shifts: Tensors,
        z: torch.Tensor,
        order: torch.Tensor,
        offsets: torch.Tensor,
        outs: Tensors,
    ) -> None:
        given = zip(xs, shifts, outs, strict=True)
        problems = (Problem * len(xs))(
            *[
                Problem(x.data_ptr(), c.data_ptr(), out.data_ptr(), x.stride(0))
                for x, c, out in given
            ]
        )
        memory = z.data_ptr(), order.data_ptr(), offsets.data_ptr()
        shape = Shape(*memory, z.stride(0), xs[0].shape[1], z.shape[1], len(offsets) - 1)
        reads = [*xs, *shifts, z, order, offsets]
        ranges = (ctypes.c_void_p * (2 * len(reads)))(*[at for t in reads for at in extent(t)])
        kind = DTYPES.index(xs[0].dtype)
        count = ctypes.c_int64(len(xs))
        error = library.gram(
            problems, count, ctypes.byref(shape), kind, ranges, ctypes.c_int64(len(reads))
        )
        assert error == b"", error.decode()

    return grams


def extent(t: torch.Tensor) -> tuple[int, int]:
    if not t.numel():
        return t.data_ptr(), t.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.itemsize


def on_gpu(t: torch.Tensor) -> torch.Tensor:
    """Return the same tensor on the GPU, with its strides and what lies around it."""
    copy = torch.empty(0, dtype=t.dtype, device="cuda")
    return copy.set_(t.untyped_storage().cuda(), t.storage_offset(), t.shape, t.stride())


def native(
    xs: Tensors,
    shifts: Tensors,
    z: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    outs: Tensors,
) -> None:
    from geofast import _cuda

    assert _cuda.unavailable(torch.cuda.current_device()) is None
    there = [on_gpu(out) for out in outs]
    _cuda.gram(
        [on_gpu(x) for x in xs],
        [on_gpu(c) for c in shifts],
        *[on_gpu(t) for t in (z, order, offsets)],
        there,
    )
    for out, result in zip(outs, there, strict=True):
        out.copy_(result)


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def grams(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Grams:
    if request.param == "native":
        if not torch.cuda.is_available():
            pytest.skip("no GPU: torch.cuda.is_available() is False")
        return native
    capability = request.param.split()[1]
    return emulate(emulator(capability, tmp_path_factory.mktemp("emulator")))


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """Return the same rows in other memory, NaN wherever nobody may look."""
    n, d = x.shape
    if layout == "contiguous":
        return x
    width, first = {"aligned": ((d + 7) // 8 * 8, 0), "odd": (d + 3, 0), "shifted": (d + 8, 1)}[
        layout
    ]
    whole = x.new_full((2 * n, width), torch.nan)
    return whole[::2, first : first + d].copy_(x)


def check(
    grams: Grams,
    *,
    dim: int,
    q: int = 3,
    counts: Sequence[int] = (33,),
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    problems: int = 1,
    n: int = 40,
) -> None:
    generator = torch.Generator().manual_seed(dim)
    z = torch.randn(n, q, generator=generator, dtype=torch.float64)
    z[:, :1] = 1
    z = laid_out(z, "odd")
    # Rows of cells in any order, with repeats; some belong to no cell.
    order = torch.randint(n, (sum(counts) + 5,), generator=generator)
    offsets = torch.tensor([2, *counts]).cumsum(0)
    xs, shifts, outs, wants = [], [], [], []
    above = torch.ones(dim + q, dim + q, dtype=torch.bool).triu(1)
    for _ in range(problems):
        x = (
            9 * torch.rand(dim, generator=generator) * torch.randn(n, dim, generator=generator) + 3
        ).to(dtype)
        xs.append(laid_out(x, layout))
        shifts.append(3 + torch.randn(dim, generator=generator, dtype=torch.float64))
        before = torch.randn(
            len(counts), dim + q, dim + q, generator=generator, dtype=torch.float64
        )
        wants.append(before.clone())
        _reference.gram(xs[-1], shifts[-1], z, order, offsets, wants[-1])
        outs.append(before.masked_fill(above, SENTINEL))
    grams(xs, shifts, z, order, offsets, outs)
    for out, want in zip(outs, wants, strict=True):
        assert (out[:, above] == SENTINEL).all()
        # A sum about as large as what was there: sums of a cell without rows are as before.
        scale = want.diagonal(dim1=-2, dim2=-1).abs().clamp_min(1).sqrt()
        error = (out - want).nan_to_num(torch.inf).tril().abs()
        error /= scale[:, :, None] * scale[:, None]
        assert (error < TOLERANCE).all()


@pytest.mark.parametrize("dim", [1, 5, 63, 64, 65, 96, 130, 200])
def test_any_width(grams: Grams, dim: int) -> None:
    check(grams, dim=dim, counts=[1, 0, 8, 21], dtype=DTYPES[dim % 4])


@pytest.mark.parametrize("q", [0, 1, 3, 9, 16, 17, 33])
def test_any_number_of_targets(grams: Grams, q: int) -> None:
    check(grams, dim=70, q=q, counts=[19])


def test_more_targets_than_a_tile_has_rows(grams: Grams) -> None:
    check(grams, dim=3, q=130, counts=[9])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "aligned", "odd", "shifted"])
def test_any_memory(grams: Grams, dtype: torch.dtype, layout: str) -> None:
    for dim in (68, 135):
        check(grams, dim=dim, dtype=dtype, layout=layout)


def test_cells(grams: Grams) -> None:
    check(grams, dim=40, counts=[0, 1, 7, 8, 9, 16, 0, 100, 0], n=30)


def test_several_problems(grams: Grams) -> None:
    check(grams, dim=66, counts=[12, 5], problems=3)


def test_more_problems_than_a_launch_takes(grams: Grams) -> None:
    check(grams, dim=2, q=1, counts=[3], problems=123)


def test_no_problems_and_no_cells(grams: Grams) -> None:
    check(grams, dim=5, counts=[])
    check(grams, dim=5, counts=[0, 0])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_column(grams: Grams, bad: float) -> None:
    x = torch.randn(20, 70)
    x[7, 66] = bad
    z = torch.ones(20, 2, dtype=torch.float64)
    shift = torch.zeros(70, dtype=torch.float64)
    out = torch.zeros(1, 72, 72, dtype=torch.float64)
    grams([x], [shift], z, torch.arange(20), torch.tensor([0, 20]), [out])
    column = torch.arange(72) == 66
    touched = (column[:, None] | column).tril()
    assert torch.equal(out[0].isfinite(), ~touched)


def test_every_half_widens_exactly(grams: Grams) -> None:
    bits = torch.arange(-(2**15), 2**15, 97, dtype=torch.int32).to(torch.int16)
    halves = bits.view(torch.float16)
    halves = halves[halves.isfinite()]
    n = len(halves)
    x, z = halves[:, None].contiguous(), torch.zeros(n, 0, dtype=torch.float64)
    out = torch.zeros(n, 1, 1, dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    grams([x], [zero], z, torch.arange(n), torch.arange(n + 1), [out])
    assert torch.equal(out[:, 0, 0], halves.double().square())


@pytest.fixture
def module() -> ModuleType:
    try:
        return importlib.import_module("geofast._cuda")
    except ModuleNotFoundError:
        if shutil.which("nvcc"):
            raise
        pytest.skip("geofast was built without a CUDA compiler")


def test_the_module_says_what_it_is_of_use_for(module: ModuleType) -> None:
    assert "90" in module.architectures
    reason = module.unavailable()
    assert reason is None if torch.cuda.is_available() else isinstance(reason, str)
    assert module.unavailable(99)  # there are not that many


def test_the_module_needs_no_cuda_library(module: ModuleType) -> None:
    needed = subprocess.run(
        ["ldd", str(module.__file__)], capture_output=True, text=True, check=True
    )
    assert "libc.so" in needed.stdout
    assert "cuda" not in needed.stdout.replace(str(module.__file__), "")


def test_bad_arguments_are_named(module: ModuleType) -> None:
    """All but the device is checked before it, so that the CPU's tensors are enough here."""
    x = torch.zeros(10, 5)
    good = {
        "xs": [x, x],
        "shifts": [torch.zeros(5).double()] * 2,
        "z": torch.zeros(10, 2).double(),
        "order": torch.arange(10),
        "offsets": torch.tensor([0, 4, 10]),
        "outs": [torch.zeros(2, 7, 7).double()] * 2,
    }
    z, out, shift = good["z"], good["outs"][0], good["shifts"][0]
    bad = [
        ("xs", [x], "must be of one length; got 1, 2 and 2"),
        ("xs", [x.int(), x], r"xs\[0\] is int32; expected one of float32"),
        ("xs", [x, x.half()], r"xs\[1\] is float16; expected float32"),
        ("xs", [x, x[:, :4]], r"xs\[1\] has shape \[10, 4\]; expected \[10, 5\]"),
        ("xs", [x.T.contiguous().T, x], r"xs\[0\] must be contiguous"),
        ("xs", [x[:, :0], x], r"xs\[0\] has no columns"),
        ("xs", [x[0], x], r"xs\[0\] has shape"),
        ("shifts", [shift, shift[:4]], r"shifts\[1\] has shape"),
        ("shifts", [shift.float(), shift], r"shifts\[0\] is float32"),
        ("z", z[:9], "z has shape"),
        ("z", z.T.contiguous().T, "z must be contiguous"),
        ("order", torch.arange(10).int(), "order is int32"),
        ("offsets", torch.tensor([]).long(), "offsets must hold"),
        (
            "offsets",
            torch.zeros(65537).long(),
            "offsets has size 65537 in dimension 0; at most 65536",
        ),
        ("outs", [out, out[:1]], r"outs\[1\] has shape"),
        ("outs", [out, out.mT], r"outs\[1\] must be contiguous"),
        ("outs", [out.float(), out], r"outs\[0\] is float32"),
        ("z", z, r"xs\[0\] is on the CPU; this kernel needs all on one GPU"),
    ]
    for name, value, message in bad:
        with pytest.raises(ValueError, match=message):
            module.gram(**{**good, name: value})
    with pytest.raises(TypeError, match=r"xs\[1\] must be a torch\.Tensor"):
        module.gram(**{**good, "xs": [x, x.numpy()]})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_devices_must_agree(module: ModuleType) -> None:
    x, z = torch.zeros(3, 2, device="cuda"), torch.zeros(3, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"z is on the CPU, and xs\[0\] on cuda:0"):
        module.gram([x], [x[0].double()], z, torch.arange(3), torch.arange(2), [z])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_graph_replays_it_on_its_stream(module: ModuleType) -> None:
    x = torch.randn(50, 70, device="cuda")
    z = torch.ones(50, 1, dtype=torch.float64, device="cuda")
    shift = torch.zeros(70, dtype=torch.float64, device="cuda")
    order, offsets = torch.arange(50, device="cuda"), torch.tensor([0, 50], device="cuda")
    out = torch.zeros(1, 71, 71, dtype=torch.float64, device="cuda")

    def add() -> None:
        module.gram([x], [shift], z, order, offsets, [out])

    add()  # CUDA loads a kernel when it is first used, which is not allowed in a graph
    out.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add()
    assert not out.any()
    x.copy_(torch.randn_like(x))
    graph.replay()
    graph.replay()
    want = torch.zeros_like(out)
    for _ in range(2):
        _reference.gram(x, shift, z, order, offsets, want)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
