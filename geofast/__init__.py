"""Where does a model keep the place? Probing of every layer, in one forward pass."""

from ._core import __version__

__all__ = ["__version__"]
