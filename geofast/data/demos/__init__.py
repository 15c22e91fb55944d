"""The embedded demos: real weights and real geotagged data from the package index."""

from .cities import cities
from .dinov2 import dinov2_small
from .geoclip import geoclip_gallery, geoclip_weights
from .satellite import satellite
from .smollm2 import smollm2

__all__ = [
    "cities",
    "dinov2_small",
    "geoclip_gallery",
    "geoclip_weights",
    "satellite",
    "smollm2",
]


def __dir__() -> list[str]:
    return __all__
