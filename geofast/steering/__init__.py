"""Edits of the residual stream: as data, in a forward pass and while a model generates."""

from .apply import edited
from .control_vector import save_control_vector
from .edit import Edit, load_edits, save_edits
from .generation import States, generate, generate_arms, states
from .make import ablate, add, patch, set_to, swap, top_dims
from .scoring import Scores, follow, score

__all__ = [
    "Edit",
    "Scores",
    "States",
    "ablate",
    "add",
    "edited",
    "follow",
    "generate",
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
]
