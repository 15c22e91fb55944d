"""Maps: the land, the part of it that is shown, and kilometres as colours."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .canvas import GREY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[np.float64]

LAND = Path(__file__).parent / "land.png"
_KM_EDGES = (0, 250, 1000, 2500, 5000, 20040)  # the last one is half the Earth's circumference


def on_map(latitude: Array, longitude: Array) -> tuple[Array, Array]:
    """Bring predicted places onto the map: latitude clipped to -90..90, longitude wrapped."""
    return np.clip(latitude, -90, 90), (longitude + 180) % 360 - 180


def land(axes: Axes) -> None:
    """Draw all land, pale."""
    from PIL import Image

    with Image.open(LAND) as image:
        pale = np.asarray(image.convert("L"), dtype=np.float64) / 255
    axes.imshow(
        1 - 0.14 * pale,
        extent=(-180, 180, -90, 90),
        cmap="gray",
        vmin=0,
        vmax=1,
        interpolation="bilinear",
    )


def short_way(start: Array, end: Array) -> Array:
    """Segments [3 n, 2, 2] between places [n, 2], longitude first, that cross no whole map.

    Across the date line the short way is drawn, once from either edge of the map.
    """
    step = (end[:, 0] - start[:, 0] + 180) % 360 - 180
    lines = np.stack([start, np.stack([start[:, 0] + step, end[:, 1]], axis=1)], axis=1)
    return np.concatenate([lines + np.array([shift, 0]) for shift in (-360, 0, 360)])


def crop(axes: Axes, longitude: pd.Series[float], latitude: pd.Series[float]) -> None:
    """Show the part of the world where samples are, with degrees at its edges."""
    west, south, width = window(longitude, latitude)
    axes.set_xlim(west, west + width)
    axes.set_ylim(south, south + width / 2)
    axes.set_aspect("equal")
    step = next(s for s in (5, 10, 20, 30, 60) if width / s <= 7)
    degrees = np.arange(-180, 181, step)
    across = degrees[(degrees > west) & (degrees < west + width)]
    up = degrees[(degrees > south) & (degrees < south + width / 2)]
    axes.set_xticks(across, [_degrees(v, "EW") for v in across])
    axes.set_yticks(up, [_degrees(v, "NS") for v in up])
    axes.tick_params(labelsize=9, color="#a0a0a0", labelcolor=GREY)
    axes.spines[:].set_color("#c0c0c0")


def window(longitude: pd.Series[float], latitude: pd.Series[float]) -> tuple[float, float, float]:
    """West edge, south edge and width of the map; it is half as high as wide.

    The whole world, unless the samples with a margin around them fill less than half of it.
    """
    spans = np.ptp(longitude.to_numpy()), np.ptp(latitude.to_numpy())
    width = max(30.0, 1.5 * max(spans[0], 2 * spans[1]))
    if width > 180:
        return -180.0, -90.0, 360.0
    west = float(longitude.max() + longitude.min() - width) / 2
    south = float(latitude.max() + latitude.min() - width / 2) / 2
    west, south = np.clip(west, -180, 180 - width), np.clip(south, -90, 90 - width / 2)
    return float(west), float(south), width


def _degrees(value: float, letters: str) -> str:
    letter = "" if value == 0 else f" {letters[int(value < 0)]}"
    return f"{abs(value):.0f}°{letter}"


def km_colours() -> tuple[Any, Any]:
    """Return how kilometres become colours: a norm and a colour map."""
    import matplotlib
    from matplotlib.colors import BoundaryNorm, ListedColormap

    ramp = matplotlib.colormaps["viridis_r"]  # dark is wrong; its pale end is lost on light land
    colours = ListedColormap([ramp(v) for v in (0.12, 0.35, 0.55, 0.78, 1.0)])
    return BoundaryNorm(_KM_EDGES, colours.N), colours


def km_legend(figure: Figure, panels: Any, norm: Any, colours: Any, label: str) -> None:
    """Put a bar of the colours below maps."""
    from matplotlib.cm import ScalarMappable

    bar = figure.colorbar(
        ScalarMappable(norm, colours),
        ax=list(panels),
        orientation="horizontal",
        spacing="uniform",
        shrink=0.6,
        aspect=40,
        pad=0.02,
    )
    *edges, _ = _KM_EDGES
    bar.set_ticks(_KM_EDGES, labels=[*(f"{v:,}" for v in edges), f"over {edges[-1]:,}"])
    bar.ax.tick_params(labelsize=10)
    bar.outline.set_visible(False)
    bar.set_label(label, fontsize=10)
