"""GeoCLIP's location encoder and its gallery of places."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .assets import asset

WHEEL = "geoclip"
WEIGHTS = "geoclip/model/weights/location_encoder_weights.pth"
GALLERY = "geoclip/model/gps_gallery/coordinates_100K.csv"


def geoclip_weights(cache: Path | None = None) -> Path:
    """Return the file of the trained location encoder, for `torch.load(weights_only=True)`.

    A state dict in float32, 9.4 million numbers, of Vivanco Cepeda, Nayak and Shah (NeurIPS 2023);
    MIT. `geofast.models.location.geoclip` loads it.

    Parameters
    ----------
    cache : Path, optional
        Cache folder; `assets.cache_dir()` by default.

    Raises
    ------
    RuntimeError
        When the wheel cannot be fetched.
    """
    return asset(WHEEL, WEIGHTS, cache)


def geoclip_gallery(cache: Path | None = None) -> NDArray[np.float64]:
    """Return the 100,000 places among which GeoCLIP looks for a photograph's.

    Parameters
    ----------
    cache : Path, optional
        Cache folder; `assets.cache_dir()` by default.

    Returns
    -------
    ndarray of float64 [100000, 2]
        Latitude and longitude in degrees.

    Raises
    ------
    RuntimeError
        When the wheel cannot be fetched.
    """
    return np.loadtxt(asset(WHEEL, GALLERY, cache), delimiter=",", skiprows=1)
