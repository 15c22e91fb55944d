"""What layers take of a device's memory while they are solved, against what is said of it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from pretend import Pretend
from synthetic import rows
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import geofast as gf
from geofast import _device, _ops
from geofast.ridge import (
    Select,
    Solution,
    cross_validate_many,
    fit_many,
    memory,
    solve_many,
    training,
)

WIDTH, TARGETS, LAYERS, ALPHAS = 264, 2, 2, len(gf.ALPHAS)
ONCE = 1 << 19  # bytes of what is taken some rows at a time, however many the layers


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretend]:
    monkeypatch.setattr(_device, "_BYTES", ONCE)
    monkeypatch.setattr(memory, "_free", lambda _: 1 << 40)  # all layers at once
    # Where float32 is tried first, any layer may have to go on in float64.
    solve = import_module("geofast.ridge.solve")
    monkeypatch.setattr(solve, "_precisions", lambda *_: [torch.float64])
    with Pretend() as gpu:
        yield gpu


@pytest.fixture
def many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if features were many: blocks and strips are a small part of a factor."""
    for name, size in (("_PANEL", 16), ("_STRIP", 24), ("BLOCK", 48)):
        monkeypatch.setattr(_device, name, size)
    monkeypatch.setattr(memory, "BLOCK", 48)


def layers(gpu: Pretend, n: int, *, noise: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Rows of every layer, there, and targets; of noise, the minimum lies far from where it is
    looked for first, and elsewhere in every fold."""
    x, y = rows(n, WIDTH, TARGETS)
    if noise:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(n, WIDTH, generator=generator)
        y = x[:, :TARGETS] + torch.randn(n, TARGETS, generator=generator, dtype=torch.float64)
    return [(x * (1 + i)).to(gpu.device) for i in range(LAYERS)], y


def check(gpu: Pretend, before: int, found: list[Solution | ValueError], each: int) -> None:
    """Have taken no more than `each` layer may, and no less than half of that."""
    assert all(isinstance(one, Solution) for one in found)
    taken = gpu.peak - before
    assert LAYERS * each / 2 < taken < LAYERS * each + 2 * ONCE


def of_statistics(gpu: Pretend, n: int, select: str, *, inner: bool) -> None:
    xs, y = layers(gpu, n, noise=True)
    grams = [gf.Gram(WIDTH, TARGETS, 6, device=gpu.device) for _ in xs]
    for gram, x in zip(grams, xs, strict=True):
        gram.update(x, y, torch.arange(n) % 6)
    gpu.reset_peak()
    before = gpu.allocated
    found = solve_many(grams, folds=torch.arange(6) % 3, select=select, inner=inner)
    each = memory.bytes_of_statistics(WIDTH, TARGETS, 3, ALPHAS, select)
    check(gpu, before, found, each)


def of_rows(gpu: Pretend, n: int, select: Select, *, inner: bool) -> None:
    xs, y = layers(gpu, n, noise=select != "loo")
    gpu.reset_peak()
    before = gpu.allocated
    found = cross_validate_many(xs, y, torch.arange(n) % 3, select=select, inner=inner)
    each = memory.bytes_of_rows(n, WIDTH, 4, TARGETS, 3, ALPHAS, select)
    check(gpu, before, found, each)


# 400 rows train on hardly more than there are features: whole spectra.
@pytest.mark.parametrize(("n", "select"), [(400, "gcv"), (450, "gcv"), (450, "folds")])
def test_statistics(gpu: Pretend, n: int, select: str) -> None:
    of_statistics(gpu, n, select, inner=True)


@pytest.mark.usefixtures("many_blocks")
@pytest.mark.parametrize("select", ["gcv", "folds"])
def test_statistics_of_many_features(gpu: Pretend, select: str) -> None:
    of_statistics(gpu, 450, select, inner=False)


@pytest.mark.parametrize(
    ("n", "select", "inner"),
    [(400, "loo", True), (450, "gcv", True), (450, "folds", False)],
)
def test_rows(gpu: Pretend, n: int, select: Select, inner: bool) -> None:
    of_rows(gpu, n, select, inner=inner)


@pytest.mark.parametrize("select", ["gcv", "loo"])
def test_many_rows(gpu: Pretend, monkeypatch: pytest.MonkeyPatch, select: Select) -> None:
    """Of so many rows of few features, what each row takes is most of it."""
    monkeypatch.setattr(training, "_SMALL", 0)
    n, width = 20_000, 40
    x, y = rows(n, width, TARGETS)
    xs = [(x * (1 + i)).to(gpu.device) for i in range(LAYERS)]
    gpu.reset_peak()
    before = gpu.allocated
    found = cross_validate_many(xs, y, torch.arange(n) % 3, select=select)
    each = memory.bytes_of_rows(n, width, 4, TARGETS, 3, ALPHAS, select)
    check(gpu, before, found, each)


def test_rows_of_a_group(gpu: Pretend) -> None:
    n = 1500
    xs, y = layers(gpu, n, noise=False)
    fold = torch.where(torch.arange(n) % 2 == 0, torch.arange(n) % 3, -1)
    gpu.reset_peak()
    before = gpu.allocated
    found = cross_validate_many(xs, y, fold, select="gcv")
    each = memory.bytes_of_rows(n // 2, WIDTH, 4, TARGETS, 3, ALPHAS, "gcv")
    check(gpu, before, found, each)


def test_all_rows(gpu: Pretend) -> None:
    xs, y = layers(gpu, 450, noise=False)
    gpu.reset_peak()
    before = gpu.allocated
    found = fit_many(xs, y, select="loo")
    each = memory.bytes_of_rows(450, WIDTH, 4, TARGETS, 1, ALPHAS, "loo")
    check(gpu, before, found, each)


class Held(TorchDispatchMode):
    """Counts bytes on the CPU as the pretended GPU does its own; views tell of what was there."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Pretend()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.count._allocate(x.untyped_storage())
        return out


@pytest.mark.parametrize(
    ("n", "select"), [(450, "gcv"), (400, "gcv"), (450, "folds"), (450, "loo"), (200, "loo")]
)
def test_on_the_cpu(n: int, select: Select, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ops, "kept", _ops._Kept())  # others may have left more than is asked for
    (x, y), fold = rows(n, WIDTH, TARGETS), torch.arange(n) % 3
    with Held() as held:
        gf.cross_validate(x, y, fold, select=select, inner=True)
    most = memory.bytes_on_cpu(n, WIDTH, TARGETS, 3, ALPHAS, select, rows=True)
    if n - n // 3 < WIDTH:
        most = memory.bytes_of_wide_rows(n, WIDTH, 4, TARGETS, 3, ALPHAS)
    assert 0.4 * most < held.count.peak - x.nbytes < most


def test_two_strips_are_a_block() -> None:
    """So that the bytes of a factor that is made count them as one."""
    assert 2 * _device._STRIP == _device.BLOCK


@pytest.mark.parametrize("select", ["loo", "gcv", "folds"])
def test_fewer_rows_than_features(gpu: Pretend, select: Select) -> None:
    n = 200
    xs, y = layers(gpu, n, noise=True)
    gpu.reset_peak()
    before = gpu.allocated
    found = cross_validate_many(xs, y, torch.arange(n) % 3, select=select, inner=True)
    each = memory.bytes_of_wide_rows(n, WIDTH, 4, TARGETS, 3, ALPHAS)
    check(gpu, before, found, each)
