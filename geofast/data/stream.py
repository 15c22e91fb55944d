"""Batches of decoded and prepared inputs, made in worker processes ahead of the model."""

from __future__ import annotations

import multiprocessing
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import DataLoader, Dataset

from .samples import SampleError, Samples, Skipped


@dataclass(frozen=True, eq=False)
class Batch:
    """Some inputs, in order."""

    index: NDArray[np.int64]
    """Position [b] of each input in the samples."""
    inputs: list[Any]
    """The b transformed inputs."""
    skipped: tuple[Skipped, ...]
    """What was left out of this batch."""


def batches(
    samples: Samples,
    indices: ArrayLike,
    batch_size: int | Sequence[int],
    *,
    transform: Callable[[Any], Any] | None = None,
    workers: int = 0,
    strict: bool = False,
) -> Generator[Batch]:
    """Load, transform and group samples, in order.

    Parameters
    ----------
    samples : Samples
        Where to load from.
    indices : array_like of int [m]
        Which samples, in which order.
    batch_size : int or sequence of int
        Samples per batch, or in each batch, one after the other. The last may be smaller, and so
        is one from which a sample was left out.
    transform : callable, optional
        From an RGB image or a string to what the model's batches are made of. With workers where
        processes cannot fork (macOS, Windows) it must be picklable.
    workers : int
        Processes that work ahead, two batches each; 0 does the work here.
    strict : bool
        Raise at the first sample that fails, instead of leaving it out and reporting it.

    Yields
    ------
    Batch
        A batch that lost all its samples comes with empty inputs, so that its skips are seen.

    Raises
    ------
    SampleError
        With `strict`, naming the sample and what the decoder or the transform said.
    ValueError
        When not one sample could be loaded, with the first reasons.
    """
    order = np.asarray(indices, dtype=np.int64)
    each = list(batch_size) if isinstance(batch_size, Sequence) else [batch_size]
    if min(each, default=1) < 1 or workers < 0:
        msg = f"batch_size must be at least 1 and workers at least 0, got {batch_size}, {workers}."
        raise ValueError(msg)
    ends = np.cumsum(each) if isinstance(batch_size, Sequence) else range(0, len(order), each[0])
    parts = [part for part in np.split(order, ends) if len(part)]
    return _stream(_Batches(samples, parts, transform), workers, strict)


def _stream(dataset: _Batches, workers: int, strict: bool) -> Generator[Batch]:
    loaded = 0
    first: tuple[Skipped, ...] = ()
    source = _ahead(dataset, workers) if workers else _here(dataset)
    try:
        for batch in source:
            if strict and batch.skipped:
                raise SampleError(batch.skipped[0].where, batch.skipped[0].reason)
            loaded += len(batch.inputs)
            first += batch.skipped[: 3 - len(first)]
            yield batch
    finally:
        source.close()
    if not loaded and first:
        reasons = "; ".join(map(str, first))
        msg = f"not one of the samples of {dataset.samples.source} could be loaded: {reasons}"
        raise ValueError(msg)


class _Batches(Dataset[Batch]):
    """The batches by number. One item is one batch, so workers need no collating."""

    def __init__(
        self,
        samples: Samples,
        parts: list[NDArray[np.int64]],
        transform: Callable[[Any], Any] | None,
    ) -> None:
        self.samples = samples
        self.parts = parts
        self.transform = transform

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> Batch:
        part = self.parts[number]
        items = [self._one(i) for i in part.tolist()]
        failed = np.array([isinstance(item, Skipped) for item in items], dtype=bool)
        inputs = [item for item in items if not isinstance(item, Skipped)]
        skipped = tuple(item for item in items if isinstance(item, Skipped))
        return Batch(part[~failed], inputs, skipped)

    def _one(self, i: int) -> Any:
        """Return a transformed input, or why there is none.

        An exception would reach the other process as another class, and end the batch.
        """
        try:
            item = self.samples.load(i)
        except SampleError as err:
            return Skipped(err.where, err.reason)
        try:
            return item if self.transform is None else self.transform(item)
        except Exception as err:
            reason = f"cannot be prepared: {type(err).__name__}: {err}"
            return Skipped(self.samples.where(i), reason)


def _here(dataset: _Batches) -> Generator[Batch]:
    for number in range(len(dataset)):
        yield dataset[number]


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in the packed ones."""

    dtype: torch.dtype
    start: int
    shape: torch.Size


class _Packed:
    """A batch on its way from a worker, its tensors laid end to end in one for each dtype.

    Every tensor that crosses processes holds a file descriptor until it is freed: 64 images in
    each of a few batches ahead would use up the usual limit of 1,024.
    """

    def __init__(self, batch: Batch) -> None:
        parts: dict[torch.dtype, list[torch.Tensor]] = {}
        filled: Counter[torch.dtype] = Counter()

        def pack(item: Any) -> Any:
            if not isinstance(item, torch.Tensor):
                return item
            place = _Place(item.dtype, filled[item.dtype], item.shape)
            parts.setdefault(item.dtype, []).append(item.detach().flatten())
            filled[item.dtype] += item.numel()
            return place

        self.batch = replace(batch, inputs=_inside(batch.inputs, pack))
        self.tensors = {dtype: torch.cat(some) for dtype, some in parts.items()}

    def open(self) -> Batch:
        def unpack(item: Any) -> Any:
            if not isinstance(item, _Place):
                return item
            whole = self.tensors[item.dtype]
            return whole[item.start : item.start + item.shape.numel()].view(item.shape)

        return replace(self.batch, inputs=_inside(self.batch.inputs, unpack))


def _inside(value: Any, change: Callable[[Any], Any]) -> Any:
    """Change what is inside of lists and dicts."""
    if type(value) is list:
        return [_inside(v, change) for v in value]
    if type(value) is dict:
        return {k: _inside(v, change) for k, v in value.items()}
    return change(value)


def _pack(batch: Any) -> _Packed:
    return _Packed(batch)


def _ahead(dataset: _Batches, workers: int) -> Generator[Batch]:
    # Forked workers start at once and share the samples in memory; torch gives each one thread.
    fork = sys.platform == "linux" and "fork" in multiprocessing.get_all_start_methods()
    loader = DataLoader(
        dataset,
        batch_size=None,
        collate_fn=_pack,
        num_workers=workers,
        multiprocessing_context="fork" if fork else None,
        generator=torch.Generator(),  # or it would draw from the caller's random numbers
    )
    with warnings.catch_warnings():
        # Python 3.12 warns of any fork in a process with threads; workers only use Pillow and
        # the transform, and start no thread pool of their own.
        warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
        stream = iter(loader)
    try:
        for packed in stream:
            yield packed.open()
    finally:
        stream._shutdown_workers()  # type: ignore[attr-defined]
