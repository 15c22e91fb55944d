"""Which kernels serve a GPU, and what does where there are none."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace

import pytest
import torch

import geofast
from geofast import _gpu, _ops, _reference
from geofast.models.load import default_device

pytest.importorskip("triton")

from geofast.kernels import pool as kernels

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ask again what there is, of a GPU that is recent enough."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    for ask in (_gpu._triton, _gpu._cuda):
        ask.cache_clear()
    yield
    for ask in (_gpu._triton, _gpu._cuda):
        ask.cache_clear()


def pooled() -> torch.Tensor:
    x = torch.arange(48.0, device=DEVICE).view(2, 3, 8)
    roles = torch.ones(2, 3, dtype=torch.uint8, device=DEVICE)
    out, want = (torch.empty(2, 8, device=DEVICE) for _ in range(2))
    _gpu.pool(x, roles, [("mean", 0, out)])
    _reference.pool(x, roles, [("mean", 0, want)])
    torch.testing.assert_close(out, want)
    return out


def summed() -> None:
    x = torch.randn(20, 4, device=DEVICE)
    shift, z = x.double().mean(0), torch.ones(20, 1, dtype=torch.float64, device=DEVICE)
    order, offsets = torch.arange(20, device=DEVICE), torch.tensor([0, 20])
    out, want = (torch.zeros(1, 5, 5, dtype=torch.float64, device=DEVICE) for _ in range(2))
    _gpu.grams([x], [shift], z, order, offsets, [out], products="float64")
    _reference.gram(x, shift, z, order, offsets, want)
    torch.testing.assert_close(out, want)


def test_triton_serves_where_it_can() -> None:
    pooled()
    assert not isinstance(_gpu._triton(DEVICE), str)
    assert not any("pooling" in why for why in _gpu.lacking(DEVICE))


def test_what_triton_lacks_is_told_and_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC.")

    monkeypatch.setattr(kernels, "launch", no_compiler)
    pooled()
    (why,) = (why for why in _gpu.lacking(DEVICE) if "pooling" in why)
    assert why == (
        "torch serves pooling: Triton cannot make a kernel here (RuntimeError: Failed to find C "
        "compiler.)"
    )


@pytest.mark.parametrize("capability", [(6, 1), (7, 5)])
def test_an_old_gpu_is_served_by_torch(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    pooled()
    told = "8.0 and newer; this is {}.{}".format(*capability)
    assert told in _gpu.lacking(DEVICE)[0]


OLD = "the NVIDIA driver is for CUDA 11.4, and geofast was built with CUDA 13.0: update the driver"
OTHERS = (
    "cuda:0 has compute capability 12.0, and geofast._cuda was built for 80-real: no kernel image "
    "is available for execution on the device (cudaErrorNoKernelImageForDevice)"
)


def test_a_gpu_that_the_build_has_no_code_for_is_served_by_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    extension = SimpleNamespace(unavailable=lambda _: OTHERS)
    monkeypatch.setattr(geofast, "_cuda", extension, raising=False)
    monkeypatch.setitem(sys.modules, "geofast._cuda", extension)
    summed()
    assert f"torch serves statistics: {OTHERS}" in _gpu.lacking(DEVICE)


def test_without_triton_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "geofast.kernels", None)
    pooled()
    assert "Triton cannot be imported (ModuleNotFoundError: " in _gpu.lacking(DEVICE)[0]


def test_a_broken_triton_is_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(ModuleType):
        def __getattr__(self, name: str) -> object:
            raise RuntimeError("0 active drivers ([]). There should only be one.")

    monkeypatch.setitem(sys.modules, "geofast.kernels", Broken("geofast.kernels"))
    pooled()
    told = "torch serves pooling: Triton cannot be imported (RuntimeError: 0 active drivers ([])."
    assert told in _gpu.lacking(DEVICE)[0]


def test_without_the_extension_torch_serves_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "geofast._cuda", None)
    monkeypatch.delattr("geofast._cuda", raising=False)
    summed()
    assert any("built without CUDA C++" in why for why in _gpu.lacking(DEVICE))


@pytest.mark.parametrize(
    ("cuda", "extension", "why"),
    [
        (None, None, "is built without CUDA"),
        ("13.0", "no NVIDIA driver", "no NVIDIA driver"),
        ("13.0", OLD, OLD),
        ("13.0", None, "for CUDA 13.0, finds none"),
    ],
)
def test_why_no_gpu_serves_is_told(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, extension: str | None, why: str
) -> None:
    found = SimpleNamespace(unavailable=lambda: extension)
    monkeypatch.setattr(geofast, "_cuda", found, raising=False)
    monkeypatch.setitem(sys.modules, "geofast._cuda", found)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told = _ops.describe(torch.device("cpu"))
    assert told.startswith("C++ core (")
    assert "; no GPU: " in told
    assert told.endswith(why)
    with pytest.raises(RuntimeError, match=rf"no GPU for device='cuda': .*{re.escape(why)}; leave"):
        default_device("cuda")


@pytest.fixture
def chip(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Exception | None], None]]:
    """Have torch see a GPU, on which it can do what `chip` is told."""

    def serve(error: Exception | None) -> None:
        def zeros(*_: object, device: torch.device) -> torch.Tensor:
            if error is not None:
                raise error
            return torch.empty(1).zero_()

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch, "zeros", zeros)

    _ops._unusable.cache_clear()
    yield serve
    _ops._unusable.cache_clear()


def test_a_gpu_that_torch_has_kernels_for_is_used(chip: Callable[[None], None]) -> None:
    chip(None)
    assert "no GPU" not in _ops.describe(torch.device("cpu"))
    assert default_device(None) == torch.device("cuda")
    assert default_device("cuda:0") == torch.device("cuda:0")


def test_a_gpu_that_torch_lacks_kernels_for_is_left_alone(
    chip: Callable[[Exception], None],
) -> None:
    chip(RuntimeError("CUDA error: no kernel image is available for this device\nCompile with"))
    assert default_device(None) == torch.device("cpu")
    why = f"torch {torch.__version__} cannot use cuda (CUDA error: no kernel image is available"
    assert f"; no GPU: {why}" in _ops.describe(torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"no GPU for device='cuda:0': .* cannot use cuda:0 \("):
        default_device("cuda:0")
