"""What people read of a run: text, figures and pages. Importing it does not load matplotlib."""

from .figures import layer_curve, map_of_predictions
from .page import write_report

__all__ = ["layer_curve", "map_of_predictions", "write_report"]


def __dir__() -> list[str]:
    return __all__
