"""Which kernels serve a GPU, and what does where there are none."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

from geofast import _gpu, _reference

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


def test_an_old_gpu_is_served_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    pooled()
    assert "8.0 and newer; this is 7.5" in _gpu.lacking(DEVICE)[0]


def test_without_triton_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "geofast.kernels", None)
    pooled()
    assert "Triton cannot be imported" in _gpu.lacking(DEVICE)[0]


def test_without_the_extension_torch_serves_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "geofast._cuda", None)
    monkeypatch.delattr("geofast._cuda", raising=False)
    x = torch.randn(20, 4, device=DEVICE)
    shift, z = x.double().mean(0), torch.ones(20, 1, dtype=torch.float64, device=DEVICE)
    order, offsets = torch.arange(20, device=DEVICE), torch.tensor([0, 20])
    out, want = (torch.zeros(1, 5, 5, dtype=torch.float64, device=DEVICE) for _ in range(2))
    _gpu.grams([x], [shift], z, order, offsets, [out], products="float64")
    _reference.gram(x, shift, z, order, offsets, want)
    torch.testing.assert_close(out, want)
    assert any("built without CUDA C++" in why for why in _gpu.lacking(DEVICE))
