"""Pooled rows: one vector per sample, for every site and pool, in memory or on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from . import _ops


class Rows(Mapping[str, torch.Tensor]):
    """Float32 rows that grow as batches come; `rows[key]` is [n, d].

    Parameters
    ----------
    capacity
        How many rows to make room for at first; the room doubles when it is full.
    folder
        Keep the rows in memory-mapped files of this folder instead of in memory. They need
        `capacity`, and cannot grow beyond it.
    """

    def __init__(self, capacity: int = 256, folder: Path | None = None) -> None:
        self._capacity = capacity
        self._folder = folder
        self._store: dict[str, torch.Tensor] = {}
        self.n = 0

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._store[key][: self.n]

    def __iter__(self) -> Iterator[str]:
        return iter(self._store)

    def __len__(self) -> int:
        return len(self._store)

    def reserve(self, key: str, dim: int, batch: int) -> torch.Tensor:
        """Return the room [batch, dim] for the next rows of `key`; `commit` makes them count."""
        store = self._store.get(key)
        need = self.n + batch
        if store is None:
            store = self._store[key] = self._allocate(key, max(self._capacity, need), dim)
        elif store.shape[1] != dim:
            msg = f"rows of {key!r} have width {store.shape[1]}; a batch came with width {dim}"
            raise ValueError(msg)
        elif need > len(store):
            if self._folder is not None:
                msg = f"rows on disk cannot grow: {need} rows came where {len(store)} fit"
                raise ValueError(msg)
            grown = self._allocate(key, max(2 * len(store), need), dim)
            grown[: self.n] = store[: self.n]
            store = self._store[key] = grown
        return store[self.n : need]

    def commit(self, batch: int) -> None:
        """Count the last `batch` reserved rows of every key."""
        self.n += batch

    def clear(self) -> None:
        """Forget the rows and keep their room."""
        self.n = 0

    def reorder(self, order: torch.Tensor) -> None:
        """Put row `order[i]` at place i, for every key; `order` is int64 [n]."""
        for store in self._store.values():
            store[: self.n] = store[order]

    def nbytes(self) -> int:
        """Bytes that the stored rows take."""
        return sum(4 * self.n * store.shape[1] for store in self._store.values())

    # Rows made inside a forward pass are written to after it, which inference tensors forbid.
    @torch.inference_mode(False)
    def _allocate(self, key: str, n: int, dim: int) -> torch.Tensor:
        if self._folder is None:
            return _ops.empty(n, dim, dtype=torch.float32)
        path = self._folder / f"{key.replace('/', '_')}.rows"
        return torch.from_file(str(path), shared=True, size=n * dim).view(n, dim)
