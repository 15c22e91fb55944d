from __future__ import annotations

import math

import numpy as np
import pytest

from geofast.geo import EARTH_RADIUS_KM, great_circle_km

HALF_TURN = math.pi * EARTH_RADIUS_KM


def by_vectors(lat1, lon1, lat2, lon2):
    """The angle between unit vectors by atan2(|a x b|, a . b), in longdouble."""

    def unit(lat, lon):
        lat, lon = np.deg2rad(np.longdouble(lat)), np.deg2rad(np.longdouble(lon))
        return np.array([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)])

    a, b = unit(lat1, lon1), unit(lat2, lon2)
    return float(np.arctan2(np.linalg.norm(np.cross(a, b).astype(float)), (a * b).sum())) * (
        EARTH_RADIUS_KM
    )


def test_a_quarter_of_the_equator_and_a_pole():
    assert great_circle_km(0, 0, 0, 90) == pytest.approx(HALF_TURN / 2, rel=1e-15)
    assert great_circle_km(90, 12, -90, -70) == pytest.approx(HALF_TURN, rel=1e-15)
    assert great_circle_km(10, 20, 10, 20) == 0


def test_paris_to_new_york():
    # 5,837 km is the published great-circle distance of these city centres on this sphere.
    assert great_circle_km(48.8566, 2.3522, 40.7128, -74.0060) == pytest.approx(5837, abs=1)


def test_random_pairs_agree_with_vectors():
    rng = np.random.default_rng(0)
    lat1, lat2 = rng.uniform(-90, 90, (2, 200))
    lon1, lon2 = rng.uniform(-180, 180, (2, 200))
    expected = [by_vectors(*pair) for pair in zip(lat1, lon1, lat2, lon2, strict=True)]
    np.testing.assert_allclose(great_circle_km(lat1, lon1, lat2, lon2), expected, rtol=1e-12)


@pytest.mark.parametrize("step", [1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("lat", [0.0, 33.0])
def test_near_the_antipode_the_last_centimetre_is_right(lat, step):
    # Walking `step` degrees along the meridian from the antipode shortens the way by just that.
    gap = HALF_TURN - great_circle_km(lat, 20, -lat + step, -160)
    # Near 20,015 km one float64 spacing is 4e-12 km; the plain formula is off by 6e-5 km.
    assert gap == pytest.approx(math.radians(step) * EARTH_RADIUS_KM, abs=5e-11)


@pytest.mark.parametrize("step", [1e-3, 1e-6, 1e-9])
def test_tiny_distances_keep_their_digits(step):
    expected = math.radians(step) * EARTH_RADIUS_KM
    assert great_circle_km(0, 0, step, 0) == pytest.approx(expected, rel=1e-14)
    assert great_circle_km(60, 0, 60, step) == pytest.approx(expected / 2, rel=1e-9)


def test_longitude_wraps():
    assert great_circle_km(10, 179.5, 10, -179.5) == pytest.approx(
        great_circle_km(10, -0.5, 10, 0.5), rel=1e-12
    )
    assert great_circle_km(10, 190, 5, 0) == pytest.approx(great_circle_km(10, -170, 5, 0))


def test_broadcast_and_radius():
    out = great_circle_km(np.zeros((3, 1)), 0, 0, np.arange(4.0))
    assert out.shape == (3, 4)
    assert great_circle_km(0, 0, 0, 180, radius_km=1) == pytest.approx(math.pi)
