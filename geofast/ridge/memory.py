"""What layers take of a device's memory while they are solved, and how many are solved at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from .._device import BLOCK
from .loo import STEPS
from .solution import Solution

_SHARE = 0.7  # of a GPU's free memory, for layers that are solved at once

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
        fit = 1 if memory is None else max(1, int(_SHARE * _free(memory[0])) // memory[1])
        most = min(most, -(-len(left) // -(-len(left) // fit)))  # parts of about one size
        try:
            found += solved(left[:most])
        except torch.OutOfMemoryError:
            if most == 1:
                raise
            most //= 2
    return found


def bytes_of_statistics(
    dim: int, targets: int, folds: int, alphas: int, select: str, inner: bool
) -> int:
    """Bytes that a layer takes while it is solved from statistics.

    Each part's statistics, and its factor with the inverses of its blocks, twice; of a pair of
    folds the factors, once.
    """
    factor = 8 * dim * (dim + min(dim, BLOCK))
    pair = alphas if select == "folds" else 2 * inner  # so many of its factors at once
    return folds * (8 * (dim + 1 + targets) ** 2 + 2 * factor) + pair * factor


def bytes_of_rows(
    n: int,
    dim: int,
    itemsize: int,
    targets: int,
    folds: int,
    alphas: int,
    select: str,
    inner: bool,
) -> int:
    """Bytes that a layer of rows [n, d] takes while it is solved from them.

    What its statistics take, the rows once more, errors and predictions of every alpha, and
    near-solutions.
    """
    found = bytes_of_statistics(dim, targets, folds, alphas, select, inner)
    found += n * (dim * itemsize + 8 * folds * alphas * (4 * targets + 3))
    return found + 8 * folds * targets * dim * (8 * alphas + STEPS + 4)


def _free(device: torch.device) -> int:
    if device.type != "cuda":
        return 1 << 30
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + reserved
