"""The embedded demos: real weights and real data from the package index."""

from .probing import cities, satellite
from .steering import steer_cities, steer_images

__all__ = ["cities", "satellite", "steer_cities", "steer_images"]
