"""The figures themselves: made without pyplot, titled by a sentence, written with few colours.

Nothing here touches the caller's backend or open figures. matplotlib is loaded by the first figure,
not by the import.
"""

from __future__ import annotations

import io
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 160

# Okabe and Ito's palette (2008), told apart with any colour vision; yellow left out on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#6e6e6e"
PAPER = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 2}  # behind words on lines


def blank(width: float, height: float) -> Figure:
    """Return an empty figure, its size in inches."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as err:
        msg = "figures need matplotlib: pip install matplotlib"
        raise ImportError(msg) from err
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a picture as PNG with 256 colours: a third of the size, and looks the same."""
    from PIL import Image

    pixels = io.BytesIO()
    figure.savefig(pixels, format="rgba", dpi=DPI)
    size = figure.canvas.get_width_height()
    picture = Image.frombytes("RGBA", size, pixels.getvalue()).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True, dpi=(DPI, DPI))


def title(figure: Figure, sentence: str) -> None:
    """Put a finding above a figure."""
    lines = textwrap.fill(sentence.rstrip("."), 94)
    figure.suptitle(lines, fontsize=12, x=0.012, ha="left", fontweight="bold")
