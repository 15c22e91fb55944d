"""Distances on the sphere."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

EARTH_RADIUS_KM = 6371.0088
"""Mean radius (2a + b) / 3 of the Earth (Moritz, Geodetic Reference System 1980)."""


def great_circle_km(
    lat1: ArrayLike,
    lon1: ArrayLike,
    lat2: ArrayLike,
    lon2: ArrayLike,
    radius_km: float = EARTH_RADIUS_KM,
) -> NDArray[np.float64]:
    """Great-circle distance by the haversine formula.

    Parameters
    ----------
    lat1, lon1, lat2, lon2 : array_like
        Degrees; the four broadcast against each other. Longitude is periodic: 190 is 170 W.
    radius_km : float
        Radius of the sphere. The default is the Earth's mean radius.

    Returns
    -------
    ndarray of float64, the broadcast shape
        Kilometres along the sphere, from 0 to pi * radius_km.

    Notes
    -----
    With c the angle between the points, the usual haversine gives sin^2(c/2). Taking its
    complement 1 - sin^2(c/2) near the antipode loses half of the digits (6 cm on the Earth), so
    cos^2(c/2) = sin^2((lat1 + lat2)/2) + cos lat1 cos lat2 cos^2((lon2 - lon1)/2), which follows
    from the same identity, is computed beside it.
    """
    phi1 = np.deg2rad(np.asarray(lat1, dtype=np.float64))
    phi2 = np.deg2rad(np.asarray(lat2, dtype=np.float64))
    # Subtract in degrees: 179.9999 - 179.9998 keeps its digits there, not after the conversion.
    half_lat = np.deg2rad(np.subtract(lat2, lat1, dtype=np.float64)) / 2
    half_lon = np.deg2rad(np.subtract(lon2, lon1, dtype=np.float64)) / 2
    cosines = np.cos(phi1) * np.cos(phi2)
    sine2 = np.sin(half_lat) ** 2 + cosines * np.sin(half_lon) ** 2
    cosine2 = np.sin((phi1 + phi2) / 2) ** 2 + cosines * np.cos(half_lon) ** 2
    distance: NDArray[np.float64] = (2 * radius_km) * np.arctan2(np.sqrt(sine2), np.sqrt(cosine2))
    return distance


def error_km(
    latitude: ArrayLike,
    longitude: ArrayLike,
    predicted_latitude: ArrayLike,
    predicted_longitude: ArrayLike,
) -> NDArray[np.float64]:
    """Great-circle error of predictions, in kilometres; arguments as for `great_circle_km`.

    A ridge may predict places that do not exist: predicted latitudes are first clipped to -90..90,
    and longitudes wrap (190 is 170 W).
    """
    there = np.clip(predicted_latitude, -90, 90)
    return great_circle_km(latitude, longitude, there, predicted_longitude)
