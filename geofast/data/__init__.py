"""Geotagged samples: tables, folders of photographs, HDF5 files, arrays in memory."""

from .read import from_arrays, read
from .samples import SampleError, Samples, Skipped

__all__ = ["SampleError", "Samples", "Skipped", "from_arrays", "read"]


def __dir__() -> list[str]:
    return __all__
