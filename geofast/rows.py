"""Pooled rows: one vector per sample, for every site and pool, in memory or on disk."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from . import _ops
from .streams import Aside, capturing

if TYPE_CHECKING:
    from .models.layout import Layout

Blame = Callable[[int, int | None], Exception]
"""Says what is wrong with a sample, by its place in the batch and the number of the batch's first
sample, None while that batch is under way."""

TakeTokens = Callable[[str, torch.Tensor, "Layout", str], None]
"""Is given the key, hidden states [tokens, dim], their layout, and the role that is asked for."""

_CPU = torch.device("cpu")
_BLOCK = 1 << 24  # bytes written at once where space cannot be reserved by a call


class Rows(Mapping[str, torch.Tensor]):
    """Rows that grow as batches come; `rows[key]` is [n, d].

    Parameters
    ----------
    capacity
        How many rows to make room for at first; the room doubles when it is full.
    room
        Float32 [m], of `on_disk`: keep the rows there instead of in memory. They need `capacity`,
        and cannot grow beyond it.
    dtype
        float32, or float64 for rows that are pooled in it throughout.
    stay
        Keep rows on the device where they are pooled, instead of on the CPU.

    Rows that are pooled on a GPU and kept on the CPU travel while the model goes on: they are there
    when `verify` returns, which `capture` calls at its end.
    """

    def __init__(
        self,
        capacity: int = 256,
        room: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        *,
        stay: bool = False,
    ) -> None:
        self._capacity = capacity
        self._stay = stay
        self._pins = True
        self._dtype = dtype
        self._room = room
        self._store: dict[str, torch.Tensor] = {}
        self._count: dict[str, int] = {}
        self._samples: dict[str, int] = {}
        self._watched: list[_Watched] = []
        self.take_tokens: TakeTokens | None = None
        """Takes what the pool `each` makes rows of, where nothing with a token axis is kept."""
        self.aside = Aside()
        """Where rows are pooled and used on a GPU; joined when a batch is committed."""
        self.crowded = ""
        """What had no room for more rows, which are kept on the CPU, or there in memory that is not
        pinned, since."""
        self.label = ""
        """Ends the keys of what is captured from now on: which prompt it was."""

    @property
    def n(self) -> int:
        """Samples of the key that has most; but for the pool `each`, it has as many rows."""
        return max(self._samples.values(), default=0)

    def __getitem__(self, key: str) -> torch.Tensor:
        if key not in self._store:
            like = [k for k in self._store if k.startswith(key)] or [*self._store]
            raise KeyError(f"{key}; there is {', '.join(like[:5]) or 'nothing yet'}")
        if self._watched:
            self.verify()
        return self._store[key][: self._count[key]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._store)

    def __len__(self) -> int:
        return len(self._store)

    def key(self, site: str, pool: str) -> str:
        """Return "site/pool", or "site/pool/label"."""
        return "/".join(filter(None, (site, pool, self.label)))

    def reserve(self, key: str, dim: int, batch: int, device: torch.device = _CPU) -> torch.Tensor:
        """Return the room [batch, dim] for the next rows of `key`; `commit` makes them count.

        `device` is where they are pooled.
        """
        store = self._store.get(key)
        n = self._count.setdefault(key, 0)
        need = n + batch
        if store is None:
            store = self._store[key] = self._allocate(max(self._capacity, need), dim, device)
            return store[n:need]
        fit, width = store.shape  # len() of a tensor is slow: it is Python, in every hook
        if width != dim:
            msg = f"rows of {key!r} have width {width}; a batch came with width {dim}"
            raise ValueError(msg)
        if need > fit:
            if self._room is not None:
                msg = f"rows on disk cannot grow: {need} rows came where {fit} fit"
                raise ValueError(msg)
            grown = self._allocate(max(2 * fit, need), dim, device)
            self.aside.join()
            if store.is_cpu:
                self.aside.wait()  # rows may be on their way to it
            grown[:n] = store[:n]
            store = self._store[key] = grown
        return store[n:need]

    def commit(self, counts: Mapping[str, int], samples: int) -> None:
        """Count the rows of each key that were reserved last, which are of so many samples."""
        self.aside.join()
        for key, count in counts.items():
            self._count[key] = self._count.get(key, 0) + count
            self._samples[key] = self._samples.get(key, 0) + samples

    def mark(self) -> Mark:
        """Return how far each key is, for `rewind`."""
        return Mark(dict(self._count), dict(self._samples))

    def rewind(self, mark: Mark) -> None:
        """Forget what was committed since `mark`, and keep its room."""
        self._count = {key: mark.rows.get(key, 0) for key in self._count}
        self._samples = {key: mark.samples.get(key, 0) for key in self._samples}
        self._watched = [w for w in self._watched if w.first < self._samples.get(w.key, 0)]

    def watch(self, key: str, signs: torch.Tensor, blame: Blame) -> None:
        """Have `verify` raise what `blame` says of samples of the batch under way.

        `signs` [samples] lie on a GPU, which nobody waits for here, and are finite where all is
        well with a sample at `key`.
        """
        self._watched.append(_Watched(key, self._samples.get(key, 0), signs, blame))

    @property
    def unverified(self) -> int:
        """How many samples came since the first that `verify` would look into."""
        return self.n - self._watched[0].first if self._watched else 0

    def verify(self) -> None:
        """Wait for the rows that are on their way, and raise for the first sample that is unsound.

        What is raised has the number of the sample, counted from the first row that is kept.
        """
        watched, self._watched = self._watched, []
        for device in dict.fromkeys(w.signs.device for w in watched):  # as the model meets them
            here = [w for w in watched if w.signs.device == device]
            sound = torch.cat([w.signs for w in here]).isfinite().cpu()
            if sound.all():
                continue
            parts = sound.split([len(w.signs) for w in here])
            w, part = next((w, part) for w, part in zip(here, parts, strict=True) if not part.all())
            raise w.blame(int((~part).nonzero()[0]), w.first)

    def clear(self) -> None:
        """Forget all rows and keep their room."""
        self.rewind(Mark({}, {}))

    def reorder(self, order: torch.Tensor) -> None:
        """Put row `order[i]` at place i, for every key; `order` is int64 [n]."""
        for key, store in self._store.items():
            store[: self._count[key]] = store[order]

    # Rows made inside a forward pass are written to after it, which inference tensors forbid.
    @torch.inference_mode(False)
    def _allocate(self, n: int, dim: int, device: torch.device) -> torch.Tensor:
        if capturing(device):
            msg = f"there is no room for {n} rows of width {dim}, and inside a CUDA graph none can "
            msg += "be made: run the model once before, and let "
            raise RuntimeError(f"{msg}rows=gf.Rows(capacity=...) have room for that pass and this")
        if self._stay and device.type != "cpu":
            try:
                return torch.empty(n, dim, dtype=self._dtype, device=device)
            except torch.OutOfMemoryError:
                self._stay, self.crowded = False, str(device)
        if self._room is None and device.type == "cuda" and self._pins:
            # Only to pinned memory does a copy not wait.
            try:
                return torch.empty(n, dim, dtype=self._dtype, pin_memory=True)
            except RuntimeError:  # CUDA's own: it is no OutOfMemoryError
                self._pins = False
                self.crowded = " and ".join(filter(None, (self.crowded, "pinned memory")))
        if self._room is None:
            return _ops.empty(n, dim, dtype=self._dtype)
        part, self._room = self._room.tensor_split([n * dim])
        return part.view(n, dim)


class Mark(NamedTuple):
    """Rows and samples of each key at some moment."""

    rows: dict[str, int]
    samples: dict[str, int]


class _Watched(NamedTuple):
    key: str
    first: int
    signs: torch.Tensor
    blame: Blame


def on_disk(folder: Path, count: int) -> torch.Tensor:
    """Map `count` float32 numbers to a file in `folder`; the file goes when the tensor does.

    All of its space is taken at once: a disk that fills up under a mapped file would end the
    process without a word.

    Raises
    ------
    OSError
        When the folder cannot take them; nothing is left behind.
    """
    path = None
    try:
        handle, path = tempfile.mkstemp(prefix=".geofast-rows-", dir=folder)
        try:
            _take_space(handle, 4 * count)
        finally:
            os.close(handle)
        return torch.from_file(path, shared=True, size=count)
    except OSError as error:
        msg = (
            f"cannot keep {4 * count:,} bytes of pooled rows in {folder}: "
            f"{os.strerror(error.errno or 0)}. Nothing was left behind; make room, write the run "
            "to another disk, or keep statistics instead (storage='gram')"
        )
        raise OSError(error.errno, msg) from error
    finally:
        # What is mapped stays; without a name it cannot outlive the process.
        if path is not None:
            os.unlink(path)


def _take_space(handle: int, nbytes: int) -> None:
    if sys.platform == "linux":
        os.posix_fallocate(handle, 0, nbytes)
    else:
        for start in range(0, nbytes, _BLOCK):
            os.write(handle, bytes(min(_BLOCK, nbytes - start)))
