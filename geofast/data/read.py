"""Read geotagged samples from tables, folders of photographs, HDF5 files and memory."""

from __future__ import annotations

import os
import shlex
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from .samples import Kind, Lazy, Samples, Skipped

LATITUDES = ("latitude", "lat")
LONGITUDES = ("longitude", "lon", "lng", "long")
IMAGES = ("image", "path", "file", "filename", "image_path")
TEXTS = ("text", "prompt", "city", "name", "caption")
TABLES = {".csv": ",", ".tsv": "\t"}
PARQUETS = (".parquet", ".pq")
HDF5S = (".h5", ".hdf5")
PHOTOS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp")

HEAD = ("id", "latitude", "longitude")


def read(
    source: str | os.PathLike[str],
    *,
    image: str | None = None,
    text: str | None = None,
    location: bool = False,
    latitude: str = "latitude",
    longitude: str = "longitude",
    id: str | None = None,
    strict: bool = False,
) -> Samples:
    """Read geotagged samples.

    Parameters
    ----------
    source : path
        A table (.csv, .tsv, .parquet), a folder of photographs with EXIF GPS, searched through,
        or an HDF5 file (.h5, .hdf5) with `images` (encoded bytes), `latitudes`, `longitudes` and
        optionally `clusters`, `countries` and `landmark_ids`, columns by these names.
    image, text : str, optional
        Column of a table with paths of images, relative to the table's folder, or with text. By
        default an image column named image, path, file, filename or image_path, or else a text
        column named text, prompt, city, name or caption, in any letter case.
    location : bool
        Take the places themselves as inputs, for a location encoder, whatever else there is.
    latitude, longitude : str
        Columns of a table. By default lat, lon, lng and long are taken too, in any letter case.
    id : str, optional
        Column of a table that names each sample; by default `id` if there is one, or else the
        number of the row.
    strict : bool
        Raise at the first sample that cannot be used, instead of skipping and counting it.

    Returns
    -------
    Samples
        What was left out, and why, is in its `skipped`.

    Raises
    ------
    FileNotFoundError
        When there is no such file or folder.
    ValueError
        When the source cannot be read, is empty, lacks a column, repeats an id, looks as if
        latitude and longitude were swapped or longitudes ran from 0 to 360, or holds no usable
        sample.
    """
    path = Path(source)
    if not path.exists():
        msg = f"no such file or folder: {path}"
        raise FileNotFoundError(msg)
    if location and (image or text):
        msg = (
            f"{path}: a location encoder is given the places: leave image= and text= out "
            "(--image, --text), or location=True"
        )
        raise ValueError(msg)
    suffix = path.suffix.lower()
    if path.is_dir():
        found = _read_folder(path, strict)
    elif suffix in HDF5S:
        found = _read_hdf5(path, strict)
    elif suffix in TABLES or suffix in PARQUETS:
        found = _read_table(path, image, text, location, latitude, longitude, id, strict)
    else:
        known = ", ".join([*TABLES, *PARQUETS, *HDF5S])
        msg = f"cannot tell what {path} is from its ending; geofast reads {known} and folders."
        raise ValueError(msg)
    found = replace(found, place=str(path.resolve()))
    return found.as_locations() if location else found


def from_arrays(
    inputs: Iterable[Any] | None,
    latitude: ArrayLike,
    longitude: ArrayLike,
    *,
    ids: Iterable[Any] | None = None,
    strict: bool = False,
    **columns: Any,
) -> Samples:
    """Take samples that are in memory.

    Parameters
    ----------
    inputs : iterable, optional
        Strings for a text model; for an image model PIL images, uint8 arrays
        [height, width, 3], encoded bytes, or `pathlib.Path`s. One array [n, height, width, 3] will
        do. None takes the places themselves, for a location encoder.
    latitude, longitude : array_like [n]
        Degrees.
    ids : iterable, optional
        Name of each sample; its position, from 0, by default.
    strict : bool
        Raise at the first sample without a valid place, instead of skipping and counting it.
    **columns : array_like [n]
        Further columns of the table.

    Returns
    -------
    Samples

    Raises
    ------
    ValueError
        When lengths differ, there is no sample, an id is repeated, or no sample is usable.
    TypeError
        When strings and images are mixed.
    """
    items = [None] * len(np.asarray(latitude)) if inputs is None else list(inputs)
    texts = sum(isinstance(item, str) for item in items)
    if texts not in (0, len(items)):
        msg = f"inputs are all strings or all images, got {texts} strings among {len(items)}."
        raise TypeError(msg)
    index = [str(i) for i in range(len(items))]
    table: dict[str, Any] = {
        "id": index if ids is None else list(ids),
        "latitude": np.asarray(latitude),
        "longitude": np.asarray(longitude),
        **columns,
    }
    for name, values in table.items():
        if len(values) != len(items):
            msg = f"{name} has {len(values)} values for {len(items)} inputs."
            raise ValueError(msg)
    rows = pd.DataFrame({name: list(values) for name, values in table.items()})
    where = [f"arrays, index {i}" for i in index]
    kind: Kind = "text" if texts else "image"
    found = _samples(rows, items, kind, "arrays", where, {}, strict)
    return found.as_locations() if inputs is None else found


# ---------------------------------------------------------------------------- tables


def _read_table(
    path: Path,
    image: str | None,
    text: str | None,
    location: bool,
    latitude: str,
    longitude: str,
    id_column: str | None,
    strict: bool,
) -> Samples:
    if image and text:
        msg = f"{path}: give image= or text=, not both (--image, --text)."
        raise ValueError(msg)
    names = _load_table(path, header_only=True).columns.tolist()
    lat = _find(path, names, latitude, "latitude", LATITUDES)
    lon = _find(path, names, longitude, "longitude", LONGITUDES)
    if lat.lower() in LONGITUDES and lon.lower() in LATITUDES:
        raise _swapped(str(path), lat, lon)
    found_input: tuple[str, Kind] = ("", "location")
    if not location:
        found_input = _find_input(path, names, image, text)
    column, kind = found_input
    if id_column:
        _find(path, names, id_column, "id", ())
    else:
        id_column = _guess(names, ("id",))
    words = [name for name in (id_column, column) if name]
    rows = _load_table(path, text_columns=words)
    where = [f"{path} row {n}" for n in range(1, len(rows) + 1)]
    ids = rows[id_column] if id_column else _numbers(len(rows), 1)
    # A column that already has one of our names but was not chosen gives way.
    rest = rows.drop(columns={lat, lon, id_column or "id", *HEAD} & set(names))
    table = pd.DataFrame({"id": ids, "latitude": rows[lat], "longitude": rows[lon]})
    table = pd.concat([table, rest], axis=1)
    found: dict[int, str] = {}
    items: list[Any] = [None] * len(rows)
    for row, value in enumerate(() if location else rows[column]):
        items[row], reason = _input(path, value, kind, column)
        if reason:
            found[row] = reason
    return _samples(table, items, kind, str(path), where, found, strict, (lat, lon))


def _input(path: Path, value: Any, kind: Kind, column: str) -> tuple[Any, str]:
    """Return the input of one row of a table and, when it is no good, why."""
    if pd.isna(value) or not str(value).strip():
        return None, f"no {kind} in column {column!r}"
    if kind == "text":
        return str(value), ""
    file = path.parent / str(value)
    return file, "" if file.is_file() else f"the image file does not exist: {file}"


def _load_table(
    path: Path, *, header_only: bool = False, text_columns: Sequence[str] = ()
) -> pd.DataFrame:
    try:
        if path.suffix.lower() in PARQUETS:
            return _load_parquet(path, header_only, text_columns)
        with warnings.catch_warnings():
            # pandas only warns when rows are longer than the header, and cuts them.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            return pd.read_csv(
                path,
                sep=TABLES[path.suffix.lower()],
                encoding="utf-8-sig",
                nrows=0 if header_only else None,
                dtype=dict.fromkeys(text_columns, str),
                index_col=False,
                low_memory=False,  # types from whole columns, not from chunks of them
                # An empty field is missing; NA is Namibia, and Nan is a city in Thailand.
                keep_default_na=False,
                na_values=[""],
            )
    except pd.errors.EmptyDataError as err:
        msg = f"{path} is empty; it needs a header with coordinates and rows."
        raise ValueError(msg) from err
    except (ValueError, OSError, pd.errors.ParserWarning) as err:  # also ParserError, Arrow's
        kind = path.suffix[1:].upper() if path.suffix.lower() in TABLES else "Parquet"
        msg = f"cannot read {path} as a {kind} table: {str(err).strip()}"
        if isinstance(err, UnicodeDecodeError):
            msg += "; save it as UTF-8"
        raise ValueError(msg) from err


def _load_parquet(path: Path, header_only: bool, text_columns: Sequence[str]) -> pd.DataFrame:
    try:
        import pyarrow.parquet as parquet
    except ImportError as err:
        msg = f"reading {path} needs pyarrow: pip install pyarrow"
        raise RuntimeError(msg) from err
    if header_only:
        return pd.DataFrame(columns=parquet.read_schema(path).names)
    table = pd.DataFrame(pd.read_parquet(path)).reset_index(drop=True)
    return table.astype(dict.fromkeys(text_columns, "string"))


def _guess(names: Iterable[str], wanted: Iterable[str]) -> str | None:
    """Return the first wanted name that is there, in any letter case; exact ones first."""
    exact = set(names)
    by_lower = {str(name).lower().strip(): name for name in reversed(list(names))}
    return next((n if n in exact else by_lower[n] for n in wanted if n in by_lower), None)


def _find(path: Path, names: list[str], name: str, what: str, aliases: tuple[str, ...]) -> str:
    if name in names:
        return name
    # Other spellings are looked for only where the caller left the default.
    found = _guess(names, aliases) if name == what else None
    if found is None:
        columns = ", ".join(map(str, names)) or "none"
        msg = f"{path} has no column {name!r}; its columns are: {columns}. "
        if len(names) == 1 and ";" in str(names[0]):
            msg += "They seem to be separated by semicolons: write commas, or save it as .tsv"
        else:
            msg += f"Name the right one with {what}= (--{what})"
        raise ValueError(msg)
    return found


def _find_input(
    path: Path, names: list[str], image: str | None, text: str | None
) -> tuple[str, Kind]:
    if image:
        return _find(path, names, image, "image", ()), "image"
    if text:
        return _find(path, names, text, "text", ()), "text"
    if found := _guess(names, IMAGES):
        return found, "image"
    if found := _guess(names, TEXTS):
        return found, "text"
    columns = ", ".join(map(str, names))
    msg = (
        f"{path} has no column of images ({', '.join(IMAGES)}) or text ({', '.join(TEXTS)}); "
        f"its columns are: {columns}. Name one with image= or text= (--image, --text); only a "
        "location encoder does without (location=True)"
    )
    raise ValueError(msg)


# ---------------------------------------------------------------------------- photographs


def _read_folder(folder: Path, strict: bool) -> Samples:
    files = sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in PHOTOS and path.is_file()
    )
    if not files:
        msg = f"{folder} holds no images; geofast looks for {', '.join(PHOTOS)} in it and below."
        raise ValueError(msg)
    found: dict[int, str] = {}
    places = np.full((len(files), 2), np.nan)
    for i, file in enumerate(files):
        place = _place(file)
        if isinstance(place, str):
            found[i] = place
        else:
            places[i] = place
    table = pd.DataFrame(
        {
            "id": [file.relative_to(folder).as_posix() for file in files],
            "latitude": places[:, 0],
            "longitude": places[:, 1],
        }
    )
    where = [str(file) for file in files]
    return _samples(table, files, "image", str(folder), where, found, strict)


def _place(file: Path) -> tuple[float, float] | str:
    """Return where a photograph was taken, or why that is not known."""
    try:
        return _gps(file)
    except UnidentifiedImageError:
        return "not an image that Pillow can read"
    except Exception as err:  # broken EXIF makes Pillow raise nearly anything
        return str(err) or type(err).__name__


def _gps(file: Path) -> tuple[float, float]:
    """Latitude and longitude in degrees from a photograph's EXIF."""
    with Image.open(file) as image:
        gps = image.getexif().get_ifd(ExifTags.IFD.GPSInfo)
    if ExifTags.GPS.GPSLatitude not in gps or ExifTags.GPS.GPSLongitude not in gps:
        msg = "no GPS position in its EXIF"
        raise ValueError(msg)
    return (
        _degrees(gps[ExifTags.GPS.GPSLatitude], gps.get(ExifTags.GPS.GPSLatitudeRef), "NS"),
        _degrees(gps[ExifTags.GPS.GPSLongitude], gps.get(ExifTags.GPS.GPSLongitudeRef), "EW"),
    )


def _degrees(parts: Sequence[Any], reference: Any, signs: str) -> float:
    """Degrees, minutes and seconds with their hemisphere, as one signed number."""
    letter = str(reference or "").strip("\0 ").upper()
    if letter not in tuple(signs):
        msg = f"its EXIF GPS position does not say {signs[0]} or {signs[1]}"
        raise ValueError(msg)
    degrees, minutes, seconds = (float(part) for part in parts)
    return (degrees + minutes / 60 + seconds / 3600) * (1 if letter == signs[0] else -1)


# ---------------------------------------------------------------------------- HDF5

HDF5_COLUMNS = ("clusters", "countries", "landmark_ids")


class _Encoded:
    """Encoded images of an HDF5 file, one read at a time; every process opens it for itself."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.owner = -1
        self.file: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "owner": -1, "file": None}

    def __call__(self, index: int) -> bytes:
        # A handle that crossed a fork shares its file position with the parent.
        if self.owner != os.getpid():
            import h5py

            self.file, self.owner = h5py.File(self.path, "r"), os.getpid()
        value = self.file["images"][index]
        # Of an `S` string NumPy drops the NULs at the end; a JPEG or PNG ends in none.
        if isinstance(value, bytes):
            return value
        opaque = isinstance(value, np.void)
        return (value if opaque else np.asarray(value, dtype=np.uint8)).tobytes()


def _read_hdf5(path: Path, strict: bool) -> Samples:
    try:
        import h5py
    except ImportError as err:
        msg = f"reading {path} needs h5py: pip install h5py"
        raise RuntimeError(msg) from err
    try:
        with h5py.File(path, "r") as file:
            table, n = _hdf5_table(path, file)
    except OSError as err:
        msg = f"cannot read {path} as HDF5: {err}"
        raise ValueError(msg) from err
    where = [f"{path} index {i}" for i in range(n)]
    inputs = Lazy(_Encoded(path), range(n))
    return _samples(table, inputs, "image", str(path), where, {}, strict)


def _hdf5_table(path: Path, file: Any) -> tuple[pd.DataFrame, int]:
    missing = [name for name in ("images", "latitudes", "longitudes") if name not in file]
    if missing:
        msg = f"{path} has no dataset {', '.join(missing)}; it holds: {', '.join(file) or 'none'}."
        raise ValueError(msg)
    n = len(file["images"])
    columns = {"latitude": file["latitudes"][:], "longitude": file["longitudes"][:]}
    for name in HDF5_COLUMNS:
        if name in file:
            columns[name] = np.array([_word(value) for value in file[name][:]], dtype=object)
    for column, values in columns.items():
        if len(values) != n:
            msg = f"{path} holds {n} images but {len(values)} values of {column}."
            raise ValueError(msg)
    return pd.DataFrame({"id": _numbers(n, 0), **columns}), n


def _word(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


# ---------------------------------------------------------------------------- validation


def _numbers(n: int, first: int) -> pd.Series[str]:
    return pd.Series([str(i) for i in range(first, first + n)], dtype="str")


def _samples(
    table: pd.DataFrame,
    inputs: Sequence[Any],
    kind: Kind,
    source: str,
    where: Sequence[str],
    found: dict[int, str],
    strict: bool,
    names: tuple[str, str] = ("latitude", "longitude"),
) -> Samples:
    """Check every row and keep the good ones; `found` is what is known to be wrong already."""
    if not len(table):
        msg = f"{source} holds no samples."
        raise ValueError(msg)
    degrees = {axis: _as_numbers(table[axis]) for axis in ("latitude", "longitude")}
    _check_swapped(source, degrees["latitude"], degrees["longitude"], names)
    _check_east(source, degrees["longitude"], names[1])
    reasons = {
        **_bad_degrees(table["longitude"], degrees["longitude"], 180),
        **_bad_degrees(table["latitude"], degrees["latitude"], 90),
        **dict.fromkeys(np.flatnonzero(_empty(table["id"])).tolist(), "no id"),
        **found,
    }
    bad = sorted(reasons)
    if bad and strict:
        msg = f"{where[bad[0]]}: {reasons[bad[0]]}; correct or remove it, or leave strict=True out "
        msg += "(--strict)."
        raise ValueError(msg)
    table = table.assign(id=table["id"].astype(str), **degrees)
    skipped = tuple(Skipped(where[row], reasons[row]) for row in bad)
    if len(bad) == len(table):
        first = "; ".join(str(skip) for skip in skipped[:3])
        msg = f"none of the {len(table)} samples of {source} can be used: {first}"
        raise ValueError(msg)
    good = np.setdiff1d(np.arange(len(table)), bad)
    _check_unique(source, table["id"].iloc[good])
    everything = Samples(table, kind, inputs, source, skipped)
    return everything.take(good)


def _as_numbers(column: pd.Series[Any]) -> NDArray[np.float64]:
    numbers = pd.to_numeric(column, errors="coerce")
    degrees: NDArray[np.float64] = numbers.to_numpy(dtype=np.float64, na_value=np.nan)
    return degrees


def _empty(column: pd.Series[Any]) -> NDArray[np.bool_]:
    blank = column.astype(str).str.strip() == ""
    empty: NDArray[np.bool_] = (column.isna() | blank).to_numpy(dtype=bool)
    return empty


def _bad_degrees(
    column: pd.Series[Any], degrees: NDArray[np.float64], limit: int
) -> dict[int, str]:
    """Return what is wrong, by row, with a column of degrees."""
    name, empty = column.name, _empty(column)
    reasons = {}
    for row in np.flatnonzero(~(np.abs(degrees) <= limit)).tolist():
        if empty[row]:
            reasons[row] = f"no {name}"
        elif np.isnan(degrees[row]):
            reasons[row] = f"{name} {column.iloc[row]!r} is not a number"
        else:
            reasons[row] = f"{name} {degrees[row]:g} is outside -{limit} to {limit} degrees"
    return reasons


def _check_swapped(
    source: str,
    latitude: NDArray[np.float64],
    longitude: NDArray[np.float64],
    names: tuple[str, str],
) -> None:
    """Refuse a whole column that holds the other axis.

    A tenth of the latitudes, and two at least, beyond 90 while no longitude is: in a table of
    places from all over the world far more than that would be, in a right one none.
    """
    beyond = (np.abs(latitude) > 90) & (np.abs(latitude) <= 180)
    within = np.abs(longitude[~np.isnan(longitude)]) <= 90
    if beyond.sum() >= max(2, len(latitude) / 10) and within.all():
        raise _swapped(source, *names)


def _check_east(source: str, longitude: NDArray[np.float64], name: str) -> None:
    """Refuse a whole column of longitudes that runs from 0 to 360 instead of -180 to 180."""
    beyond = (longitude > 180) & (longitude <= 360)
    if beyond.sum() >= max(2, len(longitude) / 10) and not (longitude < 0).any():
        msg = (
            f"the longitudes of {source} (column {name!r}) look as if they ran from 0 to 360; "
            "subtract 360 from those above 180"
        )
        raise ValueError(msg)


def _swapped(source: str, latitude: str, longitude: str) -> ValueError:
    return ValueError(
        f"latitude and longitude look swapped in {source}: column {latitude!r} was read as "
        f"latitude and {longitude!r} as longitude; correct the file, or for a table pass "
        f"latitude={longitude!r}, longitude={latitude!r} "
        f"(--latitude {shlex.quote(longitude)} --longitude {shlex.quote(latitude)})."
    )


def _check_unique(source: str, ids: pd.Series[Any]) -> None:
    repeated = ids[ids.duplicated()]
    if len(repeated):
        examples = ", ".join(repeated.unique()[:3])
        msg = (
            f"{source} repeats {len(repeated)} ids, such as {examples}; make them unique or "
            "choose another column with id=... (--id)"
        )
        raise ValueError(msg)
