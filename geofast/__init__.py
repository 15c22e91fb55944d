"""Where does a model keep the place? Probing of every layer, in one forward pass."""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import data
    from ._core import __version__
    from .capture import capture
    from .doctor import doctor
    from .effects.experiment import steer
    from .effects.locate import Located, locate
    from .effects.outcome import Steered, open_steered
    from .effects.patching import Patched, patching
    from .estimator import RidgeCV
    from .forecast import Forecast, plan
    from .geo import Blocks, GroupKFold, KFold
    from .gram import Gram
    from .models.load import load
    from .models.model import Model
    from .pooling import Pool
    from .probe import probe
    from .ridge.solution import ALPHAS, Solution
    from .ridge.solve import cross_validate, fit, solve
    from .rows import Rows
    from .run import Probe, Run, open
    from .steering import (
        Edit,
        Scores,
        States,
        ablate,
        add,
        generate_arms,
        load_edits,
        patch,
        save_control_vector,
        save_edits,
        score,
        set_to,
        states,
        swap,
        top_dims,
    )
    from .subspace import Subspace
    from .tokens import tokens

__all__ = [
    "ALPHAS",
    "Blocks",
    "Edit",
    "Forecast",
    "Gram",
    "GroupKFold",
    "KFold",
    "Located",
    "Model",
    "Patched",
    "Pool",
    "Probe",
    "RidgeCV",
    "Rows",
    "Run",
    "Scores",
    "Solution",
    "States",
    "Steered",
    "Subspace",
    "__version__",
    "ablate",
    "add",
    "capture",
    "cross_validate",
    "data",
    "doctor",
    "fit",
    "generate_arms",
    "load",
    "load_edits",
    "locate",
    "open",
    "open_steered",
    "patch",
    "patching",
    "plan",
    "probe",
    "save_control_vector",
    "save_edits",
    "score",
    "set_to",
    "solve",
    "states",
    "steer",
    "swap",
    "tokens",
    "top_dims",
]

_OF_MODULE = {
    "_core": ["__version__"],
    "capture": ["capture"],
    "doctor": ["doctor"],
    "effects.experiment": ["steer"],
    "effects.locate": ["Located", "locate"],
    "effects.outcome": ["Steered", "open_steered"],
    "effects.patching": ["Patched", "patching"],
    "estimator": ["RidgeCV"],
    "forecast": ["Forecast", "plan"],
    "geo": ["Blocks", "GroupKFold", "KFold"],
    "gram": ["Gram"],
    "models": ["Model", "load"],
    "pooling": ["Pool"],
    "probe": ["probe"],
    "ridge": ["ALPHAS", "Solution", "cross_validate", "fit", "solve"],
    "rows": ["Rows"],
    "run": ["Probe", "Run", "open"],
    "steering": [
        "Edit",
        "Scores",
        "States",
        "ablate",
        "add",
        "generate_arms",
        "load_edits",
        "patch",
        "save_control_vector",
        "save_edits",
        "score",
        "set_to",
        "states",
        "swap",
        "top_dims",
    ],
    "subspace": ["Subspace"],
    "tokens": ["tokens"],
}
_MODULE_OF = {name: module for module, names in _OF_MODULE.items() for name in names}


def __getattr__(name: str) -> Any:
    # torch takes two seconds to import: `geofast --help` and a mistyped option need none of it.
    if name not in _MODULE_OF and (name.startswith("__") or not find_spec(f"{__name__}.{name}")):
        raise AttributeError(f"module 'geofast' has no attribute {name!r}")
    import_module("torch")  # before the core, so that both share one OpenMP runtime
    if name not in _MODULE_OF:
        return import_module(f".{name}", __name__)
    value = globals()[name] = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    """A package in which `probe` is the function, whoever imports the module of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
