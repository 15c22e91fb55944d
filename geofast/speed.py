"""How fast this machine is at what a probe does, measured in a fraction of a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from .pooling import parse_pools, pool
from .ridge import Select, cross_validate

_WORK = {"cpu": 4e9, "cuda": 4e12}  # operations of the matrix product that is timed
_ROOM = 1 << 24  # numbers that are pooled at once
_ROWS, _WIDTH = 1024, 384  # of the regression that is timed


def multiply_rate(device: torch.device, dtype: torch.dtype, tokens: int, width: int) -> float:
    """Return operations a second of products like those of a block's feed-forward part."""
    width = max(64, min(width, 8192))
    most = _WORK.get(device.type, _WORK["cuda"]) / (8 * width**2)
    rows = max(16, min(tokens, int(most)))
    x = torch.randn(rows, width, device=device).to(dtype)
    w = torch.randn(4 * width, width, device=device).to(dtype)
    return 8.0 * rows * width**2 / _least(device, lambda: torch.nn.functional.linear(x, w))


def pool_seconds(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], pools: Sequence[str]
) -> float:
    """Return the time that pooling one site of one batch [batch, tokens, width] takes."""
    batch, tokens, width = shape
    fits = max(1, min(batch, _ROOM // (tokens * width)))
    hidden = torch.randn(fits, tokens, width, device=device).to(dtype)
    roles = torch.full((fits, tokens), 255, dtype=torch.uint8, device=device)
    parsed = parse_pools(pools)
    out = [torch.empty(fits, p.width(width), device=device) for p in parsed]
    return _least(device, lambda: pool(hidden, roles, parsed, out)) * batch / fits


def solve_seconds(
    samples: int, width: int, targets: int, folds: int, alphas: Sequence[float], select: Select
) -> float:
    """Return the time that one cross-validation takes, scaled from a smaller one that is run.

    With n rows of width d and m the smaller of both, the work is taken as n d m + 10 m^3.
    """
    n, d = max(min(samples, _ROWS), 4 * folds), min(width, _WIDTH)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator)
    y = x[:, :8] @ torch.randn(min(d, 8), targets, generator=generator)
    y = (y + torch.randn(y.shape, generator=generator)).double()
    fold = torch.arange(n) % folds

    def solve() -> None:
        cross_validate(x, y, fold, alphas, select=select, inner=folds >= 3)

    ratio = _regression_work(samples, width) / _regression_work(n, d)
    return _least(torch.device("cpu"), solve, times=2) * ratio


def _regression_work(n: int, d: int) -> float:
    m = min(n, d)
    return float(n) * d * m + 10.0 * m**3


def _least(device: torch.device, run: Callable[[], object], times: int = 4) -> float:
    """Return the least time of a few runs; the first also warms up."""
    least = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        least = min(least, time.perf_counter() - start)
    return least
