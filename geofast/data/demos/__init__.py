"""The embedded demos: real weights and real geotagged data from the package index."""

from .cities import cities
from .dinov2 import dinov2_small
from .gazetteer import gazetteer
from .geoclip import geoclip_gallery, geoclip_weights
from .satellite import places_seen, satellite
from .seeing import seeing
from .smollm2 import smollm2

__all__ = [
    "cities",
    "dinov2_small",
    "gazetteer",
    "geoclip_gallery",
    "geoclip_weights",
    "places_seen",
    "satellite",
    "seeing",
    "smollm2",
]


def __dir__() -> list[str]:
    return __all__
