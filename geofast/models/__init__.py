"""What a model is to the engine: loading, batches, sites and token roles."""

from .checkpoint import DeviceMap
from .describe import describe
from .load import load
from .model import Batch, Model, Stage
from .structure import Site, Tower, find_towers, match_sites

__all__ = [
    "Batch",
    "DeviceMap",
    "Model",
    "Site",
    "Stage",
    "Tower",
    "describe",
    "find_towers",
    "load",
    "match_sites",
]
