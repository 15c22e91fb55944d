"""Where does a model keep the place? Probing of every layer, in one forward pass."""

from typing import TYPE_CHECKING, Any

import torch  # noqa: F401 - before the core, so that both share one OpenMP runtime

from . import data
from ._core import __version__
from .capture import capture
from .doctor import doctor
from .forecast import Forecast, plan
from .geo import Blocks, GroupKFold, KFold
from .gram import Gram
from .models import Model, load
from .pooling import Pool
from .probe import probe
from .ridge import ALPHAS, Solution, cross_validate, fit, solve
from .rows import Rows
from .run import Probe, Run, open
from .tokens import tokens

if TYPE_CHECKING:
    from .estimator import RidgeCV

__all__ = [
    "ALPHAS",
    "Blocks",
    "Forecast",
    "Gram",
    "GroupKFold",
    "KFold",
    "Model",
    "Pool",
    "Probe",
    "RidgeCV",
    "Rows",
    "Run",
    "Solution",
    "__version__",
    "capture",
    "cross_validate",
    "data",
    "doctor",
    "fit",
    "load",
    "open",
    "plan",
    "probe",
    "solve",
    "tokens",
]


def __getattr__(name: str) -> Any:
    # scikit-learn takes two seconds to import; only the estimator needs it.
    if name == "RidgeCV":
        from .estimator import RidgeCV

        return RidgeCV
    raise AttributeError(f"module 'geofast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
