"""How fast this machine is at what a probe does, measured in a few seconds at most."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from .gram import Gram, update
from .pooling import parse_pools, pool
from .ridge import Select, cross_validate

_WORK = {"cpu": 4e9, "cuda": 4e12}  # operations of the matrix product that is timed
_ROOM = 1 << 22  # numbers that are pooled at once
_WIDEST = 2048  # of the product: wider ones run as fast, and take longer to set up
_ROWS = 1024  # of the first regression that is timed
_ENOUGH = 0.25  # seconds after which nothing is repeated once more or enlarged
_FOLDS = 5


def multiply_rate(device: torch.device, dtype: torch.dtype, tokens: int, width: int) -> float:
    """Return operations a second of products like those of a block's feed-forward part."""
    width = max(64, min(width, _WIDEST))
    most = _WORK.get(device.type, _WORK["cuda"]) / (8 * width**2)
    rows = max(16, min(tokens, int(most)))
    x = torch.ones(rows, width, device=device, dtype=dtype)
    w = torch.ones(4 * width, width, device=device, dtype=dtype)
    return 8.0 * rows * width**2 / _least(device, lambda: torch.nn.functional.linear(x, w))


def pool_seconds(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], pools: Sequence[str]
) -> float:
    """Return the time that pooling one site of one batch [batch, tokens, width] takes.

    Of the pool `each`, that is the time to add every token to statistics of one cell.
    """
    batch, tokens, width = shape
    fits = max(1, min(batch, _ROOM // (tokens * width)))
    hidden = torch.ones(fits, tokens, width, device=device, dtype=dtype)
    roles = torch.full((fits, tokens), 255, dtype=torch.uint8, device=device)
    parsed = parse_pools(pools)
    each, pooled = ([p for p in parsed if (p.each is None) is one] for one in (False, True))
    # The tokens that each takes are also pooled, to be looked into.
    pooled += parse_pools("mean") * len(each)
    out = [torch.empty(fits, p.width(width), device=device) for p in pooled]
    rows, y = hidden.view(-1, width), torch.ones(fits * tokens, 2)
    grams = [Gram(width, 2, device=device) for _ in each]

    def run() -> None:
        pool(hidden, roles, pooled, out)
        if grams:
            update(grams, [rows] * len(grams), y)

    return _least(device, run) * batch / fits


def solve_rate(
    samples: int, width: int, targets: int, folds: int, alphas: Sequence[float], select: Select
) -> float:
    """Return the work a second, as `solve_work` counts it, of such a cross-validation.

    Rows and widths are made smaller in proportion, and grow until a run takes a quarter of a
    second or nothing is left out: a small regression is mostly overhead.
    """
    folds, scale = min(folds, _FOLDS), min(1.0, _ROWS / samples)
    while True:
        n, d = max(round(scale * samples), 4 * folds), max(round(scale * width), 1)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(n, d, generator=generator)
        y = x[:, :8] @ torch.randn(min(d, 8), targets, generator=generator)
        y = (y + torch.randn(y.shape, generator=generator)).double()
        fold = torch.arange(n) % folds

        def solve(x: torch.Tensor = x, y: torch.Tensor = y, fold: torch.Tensor = fold) -> None:
            cross_validate(x, y, fold, alphas, select=select, inner=folds >= 3)

        seconds = _least(torch.device("cpu"), solve, times=2)
        if scale == 1 or seconds > _ENOUGH:
            return solve_work(n, d, folds) / seconds
        scale = min(1.0, 1.5 * scale)


def solve_work(samples: int, width: int, folds: int) -> float:
    """Return how much there is to do in one cross-validation.

    With n rows of width d and m the smaller of both, it is taken as n d m + 5 m^3 for every five
    folds, and 5 m^3 for every ten pairs of them: inner folds leave two out.
    """
    n, d, m = float(samples), float(width), float(min(samples, width))
    pairs = folds * (folds - 1) / 2
    return folds / 5 * (n * d * m + 5 * m**3) + pairs / 10 * 5 * m**3


def _least(device: torch.device, run: Callable[[], object], times: int = 4) -> float:
    """Return the least time of a few runs; two at least, as the first also warms up."""
    least, began = float("inf"), time.perf_counter()
    for i in range(times):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        least = min(least, now - start)
        if i and now - began > _ENOUGH:
            break
    return least
