"""The Earth: distances, folds on the sphere, scores. Depends on NumPy alone."""

from .distance import EARTH_RADIUS_KM, error_km, great_circle_km
from .folds import Blocks, GroupKFold, KFold, Split, as_split, parse_split
from .metrics import FoldScores, fold_scores

__all__ = [
    "EARTH_RADIUS_KM",
    "Blocks",
    "FoldScores",
    "GroupKFold",
    "KFold",
    "Split",
    "as_split",
    "error_km",
    "fold_scores",
    "great_circle_km",
    "parse_split",
]


def __dir__() -> list[str]:
    return __all__
