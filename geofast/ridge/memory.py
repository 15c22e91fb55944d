"""What layers take of a device's memory while they are solved, and how many are solved at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from .._device import BLOCK
from .loo import STEPS
from .solution import Solution

_SHARE = 0.7  # of a GPU's free memory, for layers that are solved at once
_VECTORS = 8  # for a right side: itself, its solution, and those of Lanczos
_PROBES = 6  # right sides beside the targets: the sign vectors that tell a trace

Item = TypeVar("Item")


def in_parts(
    layers: Sequence[Item],
    memory: tuple[torch.device, int] | None,
    solved: Callable[[Sequence[Item]], list[Solution | ValueError]],
) -> list[Solution | ValueError]:
    """Solve layers, so many at once as the device has memory for, by the bytes of each.

    One after the other where `memory` is None.
    """
    found, most = list[Solution | ValueError](), len(layers)
    while len(found) < len(layers):
        left = layers[len(found) :]
        most = 1 if memory is None else min(most, at_once(len(left), _free(memory[0]), memory[1]))
        try:
            found += solved(left[:most])
        except torch.OutOfMemoryError:
            if most == 1:
                raise
            most //= 2
    return found


def at_once(layers: int, free: int, each: int) -> int:
    """How many of so many layers are solved at once, in parts of about one size."""
    fit = max(1, int(_SHARE * free) // each)
    return -(-layers // -(-layers // fit))


def bytes_of_statistics(dim: int, targets: int, folds: int, alphas: int, select: str) -> int:
    """Bytes that a layer takes at most while it is solved from statistics.

    Statistics of every part, of all rows, and of the pair of folds whose turn it is. Of each
    training set two factors, at the start and the last, while one more is made; for a pair of folds
    one is made for every alpha. All in float64, where a layer may end that began in float32. What a
    library takes inside of an operation is not in it.
    """
    statistics = (folds + 2) * (dim + 1 + targets) ** 2
    factor = dim * (dim + min(dim, BLOCK))  # with the inverses of its blocks
    # Before there are inverses, two strips of the matrix; and vectors for every right side.
    made = dim * (dim + min(2 * dim, BLOCK) + _VECTORS * (targets + _PROBES))
    by_pairs = select == "folds"
    factors = max(alphas, folds) * made if by_pairs else folds * (2 * factor + made)
    return 8 * (statistics + factors)


def bytes_of_rows(
    n: int,
    dim: int,
    itemsize: int,
    targets: int,
    folds: int,
    alphas: int,
    select: str,
) -> int:
    """Bytes that a layer of rows [n, d] takes at most while it is solved from them.

    What its statistics take, the rows once more, and each row's predictions and errors in every
    fold. Leave-one-out also takes near-solutions, and those of each row, at every alpha.
    """
    found = bytes_of_statistics(dim, targets, folds, alphas, select)
    return found + n * dim * itemsize + _of_each_row(n, dim, targets, folds, alphas, select)


def _of_each_row(n: int, dim: int, targets: int, folds: int, alphas: int, select: str) -> int:
    found = n * (5 * targets + 3)
    if select == "loo":
        found += dim * targets * (4 * alphas + 2 * STEPS) + n * alphas * (2 * targets + 2)
    return 8 * folds * found


def bytes_of_wide_rows(
    n: int, dim: int, itemsize: int, targets: int, folds: int, alphas: int
) -> int:
    """Bytes that a layer of fewer rows than features [n, d] takes at most while it is solved.

    The rows once more, and in float64 about their mean; X X', that of every part twice, with the
    inverses of its blocks; and dual coefficients of every alpha, twice.
    """
    parts = folds * n * (2 * n + min(n, BLOCK) + 2 * alphas * targets)
    return n * dim * (itemsize + 8) + 8 * (n * n + parts)


def bytes_on_cpu(
    n: int, dim: int, targets: int, folds: int, alphas: int, select: str, *, rows: bool
) -> int:
    """Bytes that a layer takes at most while the CPU solves it, from `rows` or from statistics.

    Statistics of every part, of all rows, and of the pair of folds whose turn it is. A matrix of
    each training set and its eigenvectors, which is more than three factors in float32; or of a
    pair of folds a factor in float64 for every alpha. With fewer rows than features in a training
    part, `bytes_of_wide_rows`.
    """
    statistics = (folds + 2) * (dim + 1 + targets) ** 2
    vectors = dim * _VECTORS * (targets + _PROBES)
    by_pairs = select == "folds"
    sets, matrices = (max(alphas, folds), 1) if by_pairs else (folds, 2)
    found = 8 * (statistics + sets * (matrices * dim**2 + vectors))
    return found + (_of_each_row(n, dim, targets, folds, alphas, select) if rows else 0)


def _free(device: torch.device) -> int:
    if device.type != "cuda":
        return 1 << 30
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + reserved
