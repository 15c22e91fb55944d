"""Edits of the residual stream: as data, in a forward pass and while a model generates."""

from .apply import edited
from .edit import Edit, load_edits, save_edits
from .generation import States, generate, states
from .make import ablate, add, patch, set_to, swap, top_dims

__all__ = [
    "Edit",
    "States",
    "ablate",
    "add",
    "edited",
    "generate",
    "load_edits",
    "patch",
    "save_edits",
    "set_to",
    "states",
    "swap",
    "top_dims",
]
