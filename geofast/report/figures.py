"""The two pictures of a run: R2 by layer, and a map of held-out predictions.

Figures are made without pyplot, so nothing here touches the caller's backend or open figures.
matplotlib is loaded by the first figure, not by the import.
"""

from __future__ import annotations

import io
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from . import text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..run import Run

Array = NDArray[np.float64]

DPI = 160
LAND = Path(__file__).parent / "land.png"
MAP_SAMPLES = 400  # more lines than this hide each other

# Okabe and Ito's palette (2008), told apart with any colour vision; yellow left out on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_TARGET_LINES = ("--", ":", "-.")
_GREY = "#6e6e6e"
_FLOOR = -0.5  # R2 below 0 is worse than the mean; how much worse would squash the rest
_KM_EDGES = (0, 250, 1000, 2500, 5000, 20040)  # the last one is half the Earth's circumference


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as err:
        msg = "figures need matplotlib: pip install 'geofast[plot]'"
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


# ---------------------------------------------------------------- R2 by layer


def layer_curve(run: Run) -> Figure:
    """Draw R2 against depth: a panel per split, a line per pool and prompt.

    Bands are 1.96 standard errors over folds. A control that has the model's sites is a line of
    crosses for each of the model's, in its colour; another is a grey level. The star is the layer
    chosen on inner folds and scored on outer ones. The title is the finding.

    Parameters
    ----------
    run : Run

    Returns
    -------
    matplotlib.figure.Figure
    """
    columns = min(len(run.splits), 2)
    lines = -(-len(run.splits) // columns)
    figure = _figure(10, 1.7 + 3.9 * lines)
    panels = figure.subplots(lines, columns, sharey=True, sharex=True, squeeze=False).flatten()
    places = _depths(run)
    for split, axes in zip(run.splits, panels, strict=False):
        _draw_split(axes, run, split, places)
        _mark_honest(axes, run, split, places, 94 // columns)
        _label_depths(axes, places)
        _say_what_is_cut(axes, run, split)
    for axes in panels[len(run.splits) :]:
        axes.set_visible(False)
    low, high = panels[0].get_ylim()
    panels[0].set_ylim(max(low, _FLOOR), min(high, 1.02))
    for axes in panels[::columns]:
        axes.set_ylabel(_r2_label(run), fontsize=11)
    for axes in panels[: len(run.splits)][-columns:]:
        axes.tick_params(labelbottom=True)
        axes.set_xlabel(_depth_label(places), fontsize=11)
    _title(figure, text.finding(run)[0])
    handles = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    # Legends fill column by column: one column per pool when its targets have lines of their own.
    rows = 1 + len(run.targets) if any(", mean" in label for label in handles) else 2
    widest = max(map(len, handles)) + 8  # with its line, in characters
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=max(1, min(-(-len(handles) // rows), 130 // widest)),
        frameon=False,
        fontsize=10,
    )
    return figure


def _depths(run: Run) -> dict[str, int]:
    """Give every site a place on the depth axis, in the order of the table.

    A branch (`.attn`, `.mlp`) stands where its block does.
    """
    sites = run.layers.loc[run.layers["control"] == "", "site"]
    return {site: i for i, site in enumerate(dict.fromkeys(_trunk(s)[0] for s in sites))}


def _trunk(site: str) -> tuple[str, str]:
    """Split a site into its block and its branch, which is empty for the residual stream."""
    found = re.fullmatch(r"(.+\.layers\.\d+)\.(\w+)", site)
    return (found[1], found[2]) if found else (site, "")


def _series(rows: pd.DataFrame) -> dict[tuple[str, str, str], pd.DataFrame]:
    """Rows of every pool, prompt and branch, in the order of the table."""
    branch = rows["site"].map(lambda s: _trunk(s)[1])
    return dict(iter(rows.groupby([rows["pool"], rows["prompt"], branch], sort=False)))


def _label_of(run: Run, name: tuple[str, str, str]) -> str:
    pool, prompt, branch = name
    return " ".join(p for p in (pool, branch, text.prompt_name(run, prompt, 80, ": ")) if p)


def _draw_split(axes: Axes, run: Run, split: str, places: dict[str, int]) -> None:
    rows = run.rows_of(split)
    targets = [t for t in run.targets if f"r2_{t}" in rows.columns]
    series = _series(rows)
    thin = len(series) <= 2 and 2 <= len(targets) <= 3
    for i, (name, part) in enumerate(series.items()):
        x = part["site"].map(lambda s: places[_trunk(s)[0]]).to_numpy(np.float64)
        r2 = part["r2"].to_numpy(np.float64)
        colour = COLOURS[i % len(COLOURS)]
        style = "-" if i < len(COLOURS) else "--"
        if "r2_se" in part.columns:
            margin = 1.96 * part["r2_se"].to_numpy(np.float64)
            axes.fill_between(x, r2 - margin, r2 + margin, color=colour, alpha=0.18, linewidth=0)
        mean = ", mean" if thin else ""
        axes.plot(
            x,
            r2,
            style,
            color=colour,
            lw=2.2,
            marker="o",
            ms=3.5,
            label=_label_of(run, name) + mean,
        )
        for target, dashes in zip(targets if thin else (), _TARGET_LINES, strict=False):
            label = f"{_label_of(run, name)}, {target}"
            axes.plot(x, part[f"r2_{target}"], dashes, color=colour, lw=1.2, label=label)
    _draw_controls(axes, run, split, places)
    axes.axhline(0, color="#b0b0b0", lw=0.8, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=10)


def _draw_controls(axes: Axes, run: Run, split: str, places: dict[str, int]) -> None:
    """Crosses for a control that has layers, in the colour of its pool; a grey level for others."""
    own = {name: i for i, name in enumerate(_series(run.rows_of(split)))}
    styles = ((0, (6, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1)))
    for i, (control, rows) in enumerate(run.controls_of(split).groupby("control", sort=False)):
        label = f"control: {control}"
        if not text.has_sites(run, rows):
            ends = [0, max(len(places) - 1, 1)]
            style = styles[i % len(styles)]
            highest = [rows["r2"].max()] * 2
            axes.plot(ends, highest, linestyle=style, color=_GREY, lw=1.6, label=label)
            continue
        for name, part in _series(rows).items():
            x = part["site"].map(lambda s: places[_trunk(s)[0]])
            colour = COLOURS[own[name] % len(COLOURS)]
            axes.plot(x, part["r2"], color=colour, lw=0.8, marker="x", ms=4.5)
        axes.plot([], [], color=_GREY, lw=0.8, marker="x", ms=4.5, label=label)


def _mark_honest(axes: Axes, run: Run, split: str, places: dict[str, int], width: int) -> None:
    """Title the panel, and put the star; one below the axis stands at its edge with its value."""
    honest = run.best_layer(split).honest
    heading = text.split_words(split).capitalize()
    if honest is not None and _trunk(honest.site)[0] in places:
        x, y = places[_trunk(honest.site)[0]], max(honest.r2, _FLOOR)
        if y > honest.r2:
            side = "left" if x < len(places) / 2 else "right"
            axes.annotate(
                f"R² {text.number(honest.r2)}",
                (x, y),
                (11 if side == "left" else -11, 4),
                textcoords="offset points",
                ha=side,
                fontsize=10,
            )
        axes.plot(
            x,
            y,
            "*",
            clip_on=False,
            ms=15,
            mfc="white",
            mec="black",
            mew=1.2,
            zorder=5,
            label="honest best: chosen on inner folds",
        )
        heading += f": honest best R² {text.with_error(honest.r2, honest.r2_se)}\n"
        heading += _wrapped(text.honest_place(run, split), width)
    axes.set_title(heading, fontsize=11, loc="left")


def _say_what_is_cut(axes: Axes, run: Run, split: str) -> None:
    if axes.dataLim.y0 >= _FLOOR:
        return
    words = f"cut at {_FLOOR}"
    best = run.best_layer(split).optimistic.r2
    if best < _FLOOR:
        words += f"; all sites are below, the highest R² is {text.number(best)}"
    axes.text(
        0.99, 0.12, words, transform=axes.transAxes, ha="right", fontsize=10, color=_GREY,
        bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 2},
    )  # fmt: skip


def _label_depths(axes: Axes, places: dict[str, int]) -> None:
    """Tick as many sites as there is room for; towers are set apart by a line."""
    sites = list(places)
    step = max(1, -(-len(sites) // 12))
    shown: list[int] = []
    for i, site in enumerate(sites):
        layer = re.search(r"\.layers\.(\d+)$", site)
        if not layer or int(layer[1]) % step == 0:
            shown.append(i)
    axes.set_xticks(shown, [_tick(sites[i]) for i in shown])
    for i in range(1, len(sites)):
        if _tower(sites[i]) != _tower(sites[i - 1]):
            axes.axvline(i - 0.5, color="#d0d0d0", lw=1)
    axes.set_xlim(-0.5, max(len(sites) - 0.5, 0.5))


def _tick(site: str) -> str:
    name = site.rpartition(".")[2]
    return name if name.isdigit() else f"\n{name}"  # wide, so it stands below the numbers


def _tower(site: str) -> str:
    return site.partition(".")[0]


def _depth_label(places: dict[str, int]) -> str:
    towers = dict.fromkeys(_tower(site) for site in places)
    return f"layer ({', then '.join(towers)})"


def _r2_label(run: Run) -> str:
    if len(run.targets) > 3:
        return f"held-out R², mean of {len(run.targets)} targets"
    if len(run.targets) > 1:
        return f"held-out R², mean of {' and '.join(run.targets)}"
    return f"held-out R² of {run.targets[0]}" if run.targets else "held-out R²"


def _wrapped(words: str, width: int) -> str:
    return textwrap.fill(words.replace("prompt ", "prompt\u00a0"), width)


def _title(figure: Figure, sentence: str) -> None:
    lines = textwrap.fill(sentence.rstrip("."), 94)
    figure.suptitle(lines, fontsize=12, x=0.012, ha="left", fontweight="bold")


# ---------------------------------------------------------------- map


def map_of_predictions(run: Run) -> Figure:
    """Draw true places and where the best probe put them, held out; a map per split, at most 2.

    At most 400 samples, evenly chosen. A ridge may predict places that do not exist: latitudes
    are clipped to -90..90 and longitudes wrap, as in `geofast.geo.fold_scores`.

    Parameters
    ----------
    run : Run

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        When the run has no held-out predictions of latitude and longitude.
    """
    if not has_map(run):
        msg = "the run has no held-out predictions of latitude and longitude to draw"
        raise ValueError(msg)
    table = run.predictions
    splits = list(dict.fromkeys(table["split"]))[:2]
    figure = _figure(10, 1.4 + 4.9 * len(splits))
    panels = figure.subplots(len(splits), 1, squeeze=False).flatten()
    norm, colours = _km_colours()
    for split, axes in zip(splits, panels, strict=True):
        best, held = text.top(run, split), table[table["split"] == split]
        some = len(held) > MAP_SAMPLES
        drawn = f"{MAP_SAMPLES} of {len(held):,} samples drawn" if some else f"{len(held)} samples"
        heading = f"{text.split_words(split).capitalize()}: {drawn}"
        if pd.notna(best.get("median_km")):
            heading += f", median error{' of all' * some} {text.km(best['median_km'])} km"
        heading += f" ({text.place(run, best['site'], best['pool'], best['prompt'])})"
        axes.set_title(_wrapped(heading, 104), fontsize=11, loc="left")
        _draw_map(axes, held, norm, colours)
    _km_legend(figure, panels, norm, colours)
    _title(figure, f"Where {text.model_name(run)} puts the samples it was not fitted on")
    return figure


def has_map(run: Run) -> bool:
    """Tell whether there are held-out predictions of places to draw."""
    places = ("latitude", "longitude")
    needed = {"split", "error_km", *places, *(f"{c}_predicted" for c in places)}
    return needed <= set(run.predictions.columns) and len(run.predictions) > 0


def on_map(latitude: Array, longitude: Array) -> tuple[Array, Array]:
    """Bring predicted places onto the map: latitude clipped to -90..90, longitude wrapped."""
    return np.clip(latitude, -90, 90), (longitude + 180) % 360 - 180


def _draw_map(axes: Axes, table: pd.DataFrame, norm: Any, colours: Any) -> None:
    from matplotlib.collections import LineCollection
    from PIL import Image

    with Image.open(LAND) as image:
        land = np.asarray(image.convert("L"), dtype=np.float64) / 255
    grey = 1 - 0.14 * land
    axes.imshow(
        grey, extent=(-180, 180, -90, 90), cmap="gray", vmin=0, vmax=1, interpolation="bilinear"
    )
    chosen = table.iloc[np.unique(np.linspace(0, len(table) - 1, MAP_SAMPLES).astype(int))]
    # The worst are drawn first, so that long lines do not hide what is right.
    chosen = chosen.sort_values("error_km", ascending=False, kind="stable")
    latitude, longitude = (chosen[c].to_numpy(np.float64) for c in ("latitude", "longitude"))
    to_latitude, to_longitude = on_map(
        *(chosen[f"{c}_predicted"].to_numpy(np.float64) for c in ("latitude", "longitude"))
    )
    error = chosen["error_km"].to_numpy(np.float64)
    # Across the date line the short way is drawn, once from either edge of the map.
    step = (to_longitude - longitude + 180) % 360 - 180
    start = np.stack([longitude, latitude], axis=1)
    end = np.stack([longitude + step, to_latitude], axis=1)
    for shift in (-360, 0, 360):
        lines = np.stack([start, end], axis=1) + np.array([shift, 0])
        segments = LineCollection(list(lines), lw=0.6, alpha=0.55, cmap=colours, norm=norm)
        segments.set_array(error)
        axes.add_collection(segments, autolim=False)
    axes.scatter(longitude, latitude, c=error, s=11, cmap=colours, norm=norm, lw=0, zorder=3)
    west, south, width = _window(table["longitude"], table["latitude"])
    axes.set_xlim(west, west + width)
    axes.set_ylim(south, south + width / 2)
    axes.set_aspect("equal")
    step = next(s for s in (5, 10, 20, 30, 60) if width / s <= 7)
    degrees = np.arange(-180, 181, step)
    across = degrees[(degrees > west) & (degrees < west + width)]
    up = degrees[(degrees > south) & (degrees < south + width / 2)]
    axes.set_xticks(across, [_degrees(v, "EW") for v in across])
    axes.set_yticks(up, [_degrees(v, "NS") for v in up])
    axes.tick_params(labelsize=9, color="#a0a0a0", labelcolor=_GREY)
    axes.spines[:].set_color("#c0c0c0")


def _window(longitude: pd.Series[float], latitude: pd.Series[float]) -> tuple[float, float, float]:
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


def _km_colours() -> tuple[Any, Any]:
    import matplotlib
    from matplotlib.colors import BoundaryNorm, ListedColormap

    ramp = matplotlib.colormaps["viridis_r"]  # dark is wrong; its pale end is lost on light land
    colours = ListedColormap([ramp(v) for v in (0.12, 0.35, 0.55, 0.78, 1.0)])
    return BoundaryNorm(_KM_EDGES, colours.N), colours


def _km_legend(figure: Figure, panels: Any, norm: Any, colours: Any) -> None:
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
    bar.set_label("error in km; dot: true place, end of the line: predicted place", fontsize=10)
