"""The checks that `doctor` makes of a model, each against the model itself."""

from __future__ import annotations

from collections.abc import Callable

from ..models import Model
from .compare import Check, Given, Known, with_float32
from .hooks import check_hidden_states
from .passes import check_batch, check_padding, check_repeats
from .roles import check_roles
from .weights import check_dtype, check_weights

__all__ = ["CHECKS", "OF_DTYPE", "Check", "Given", "Known", "with_float32"]

CHECKS: dict[str, Callable[[Model, Given], Check]] = {
    "repeats": check_repeats,
    "batch": check_batch,
    "padding": check_padding,
    "hidden_states": check_hidden_states,
    "roles": check_roles,
    "dtype": check_dtype,
    "weights": check_weights,
}
OF_DTYPE = {"repeats", "batch", "padding", "dtype"}
"""The checks that ask what a coarser dtype does."""
