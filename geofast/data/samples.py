"""Geotagged samples: a table of places and, beside it, what a model is shown."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

Kind = Literal["image", "text", "location"]


class SampleError(ValueError):
    """One sample cannot be used. `where` names its file or row, `reason` says why."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(where, reason)  # both arguments, so that it can be pickled
        self.where = where
        self.reason = reason

    def __str__(self) -> str:
        """Return one sentence."""
        return f"{self.where}: {self.reason}"


@dataclass(frozen=True)
class Skipped:
    """One sample that was left out."""

    where: str
    """The file, and the row where there are rows."""
    reason: str
    """What is wrong with it."""

    def __str__(self) -> str:
        """Return one sentence."""
        return f"{self.where}: {self.reason}"


class Lazy(Sequence[Any]):
    """A sequence whose items are made when they are asked for.

    Parameters
    ----------
    make : callable
        From a position in the whole to the item. Pickled when worker processes are spawned.
    indices : iterable of int
        The positions that are in this sequence, in order.
    """

    def __init__(self, make: Callable[[int], Any], indices: Iterable[int]) -> None:
        self.make = make
        self.indices = np.fromiter(indices, dtype=np.int64)

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Lazy: ...
    def __getitem__(self, index: int | slice) -> Any:
        """Make one item, or another lazy sequence from a slice."""
        if isinstance(index, slice):
            return self.take(self.indices[index])
        return self.make(int(self.indices[index]))

    def take(self, positions: Iterable[int]) -> Lazy:
        """Keep some items, by their positions in the whole."""
        return Lazy(self.make, positions)

    def __iter__(self) -> Iterator[Any]:
        """Make every item in order."""
        return map(self.make, self.indices.tolist())


@dataclass(frozen=True, eq=False)
class Samples:
    """Geotagged samples, in order.

    Made by `geofast.data.read` and `geofast.data.from_arrays`, which check the places.
    """

    table: pd.DataFrame
    """`id` (str, each once), `latitude` and `longitude` (float64, degrees), then other columns."""
    kind: Kind
    """What one input is."""
    inputs: Sequence[Any]
    """One per row: a path, encoded bytes, a PIL image, a uint8 array [height, width, 3], a str, or
    (latitude, longitude) in degrees."""
    source: str
    """What the samples came from, as reports call it."""
    skipped: tuple[Skipped, ...] = ()
    """What was read and left out, in order."""
    place: str = ""
    """The absolute path that was read; empty for what was in memory."""

    def __post_init__(self) -> None:
        head = tuple(self.table.columns[:3])
        if head != ("id", "latitude", "longitude") or len(self.table) != len(self.inputs):
            msg = (
                "a table of samples starts with id, latitude, longitude and has a row for each "
                f"input, got {head} and {len(self.table)} rows for {len(self.inputs)} inputs."
            )
            raise ValueError(msg)

    def __repr__(self) -> str:
        more = ", ".join(self.table.columns[3:])
        return (
            f"Samples({len(self)} of kind {self.kind} from {self.source}"
            f"{f'; also {more}' if more else ''}; {len(self.skipped)} skipped)"
        )

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.table)

    def where(self, index: int) -> str:
        """Name a sample for people: its file, or the source and its id."""
        if self.kind == "image" and not isinstance(self.inputs, Lazy):
            item = self.inputs[index]
            if isinstance(item, str | Path):
                return str(item)
        return f"{self.source}, id {self.table['id'].iloc[index]}"

    def load(self, index: int) -> Image.Image | str | tuple[float, float]:
        """Read one input.

        Returns
        -------
        PIL.Image.Image, str or tuple of two floats
            Images are RGB, turned upright by their EXIF orientation; places are latitude and
            longitude in degrees.

        Raises
        ------
        SampleError
            When the image is missing, truncated or cannot be decoded; it names the file or row.
        """
        try:
            item: Any = self.inputs[index]
            if self.kind == "image":
                return decode(item)
            return str(item) if self.kind == "text" else (float(item[0]), float(item[1]))
        # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, EOFError and more.
        except Exception as err:
            raise SampleError(self.where(index), reason_of(err)) from err

    def take(self, indices: ArrayLike) -> Samples:
        """Return the samples at `indices`, in that order; `skipped` stays.

        Parameters
        ----------
        indices : array_like of int [m]
            Positions in the table.
        """
        chosen: NDArray[np.int64] = np.asarray(indices, dtype=np.int64)
        inputs = (
            self.inputs.take(self.inputs.indices[chosen])
            if isinstance(self.inputs, Lazy)
            else [self.inputs[i] for i in chosen]
        )
        table = self.table.iloc[chosen].reset_index(drop=True)
        return replace(self, table=table, inputs=inputs)

    def as_locations(self) -> Samples:
        """Return the same samples with their places as inputs, as location encoders take them."""
        places = self.table[["latitude", "longitude"]].to_numpy()
        return replace(self, kind="location", inputs=[(a, b) for a, b in places.tolist()])

    def skipping(self, more: Iterable[Skipped]) -> Samples:
        """Return the same samples with `more` in `skipped`."""
        return replace(self, skipped=(*self.skipped, *more))


def decode(item: Any) -> Image.Image:
    """Make an upright RGB image of a path, encoded bytes, a PIL image or a uint8 array.

    Raises
    ------
    TypeError
        For anything else.
    """
    if isinstance(item, str | Path):
        with Image.open(item) as image:
            return _upright(image)
    if isinstance(item, bytes | bytearray | memoryview):
        if not len(item):
            msg = "the image is empty, 0 bytes."
            raise ValueError(msg)
        with Image.open(io.BytesIO(item)) as image:
            return _upright(image)
    if isinstance(item, Image.Image):
        return _upright(item)
    if isinstance(item, np.ndarray) and item.dtype == np.uint8 and item.ndim == 3:
        return Image.fromarray(item).convert("RGB")
    got = f"{item.dtype} array {item.shape}" if isinstance(item, np.ndarray) else repr(type(item))
    msg = f"an image is a path, bytes, a PIL image or a uint8 array [height, width, 3], got {got}."
    raise TypeError(msg)


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    return image.convert("RGB")


def reason_of(err: Exception) -> str:
    """Say why an image could not be read."""
    if isinstance(err, FileNotFoundError):
        return "the image file does not exist."
    if isinstance(err, UnidentifiedImageError):
        return "not an image that Pillow can read."
    return f"cannot be decoded: {err}" if str(err) else f"cannot be decoded: {type(err).__name__}"
