"""The two pictures of a run: R2 by layer, and a map of held-out predictions."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from . import text, world
from .canvas import COLOURS, GREY, PAPER, blank, title
from .numbers import km, number, with_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..run import Run

Array = NDArray[np.float64]

MAP_SAMPLES = 400  # more lines than this hide each other

_TARGET_LINES = ("--", ":", "-.")
_TARGET_MARKS = ("^", ">", "v")
# A marker for each control: dashes and dots are of targets. Some have sites, raw inputs have none.
_SITE_MARKS = {
    "crosses in the colour of the same pool": "x",
    "plus signs in the colour of the same pool": "+",
}
_INPUT_MARKS = {
    "grey squares": "s",
    "grey diamonds": "D",
    "grey triangles": "^",
    "grey circles": "o",
}
_CHARACTER = 0.085  # inches, of a label
_FLOOR = -0.5  # R2 below 0 is worse than the mean; how much worse would squash the rest


# ---------------------------------------------------------------- R2 by layer


def layer_curve(run: Run) -> Figure:
    """Draw R2 against depth: a panel per split, a line per pool and prompt.

    Bands are 1.96 standard errors over folds. A control that has the model's sites is a line of
    crosses for each of the model's, in its colour; another is a grey level with marks of its own.
    The star is the layer chosen on inner folds and scored on outer ones, a black line its R2 where
    no layer was chosen by most folds. The title is the finding.

    Parameters
    ----------
    run : Run

    Returns
    -------
    matplotlib.figure.Figure
    """
    columns = min(len(run.splits), 2)
    lines = -(-len(run.splits) // columns)
    figure = blank(10, 1.7 + 3.9 * lines)
    panels = figure.subplots(lines, columns, sharey=True, sharex=True, squeeze=False).flatten()
    places = _depths(run)
    for split, axes in zip(run.splits, panels, strict=False):
        _draw_split(axes, run, split, places)
        _mark_honest(axes, run, split, places, 94 // columns)
        _label_depths(axes, places, 9.2 / columns)
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
    title(figure, text.finding(run)[0])
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
        part = _apart(part)
        x, r2 = _across(part, places), part["r2"].to_numpy(np.float64)
        colour = COLOURS[i % len(COLOURS)]
        style = "-" if i < len(COLOURS) else "--"
        if "r2_se" in part.columns:
            low, high = _band(part)
            shown = ~_too_wide(part)
            axes.fill_between(x, low, high, where=shown, color=colour, alpha=0.18, linewidth=0)
        label = _label_of(run, name)
        mean = ", mean" if thin else ""
        axes.plot(x, r2, style, color=colour, lw=2.2, marker="o", ms=3.5, label=label + mean)
        lined = targets if thin else ()
        for target, dashes, mark in zip(lined, _TARGET_LINES, _TARGET_MARKS, strict=False):
            of_target = f"{label}, {target}"
            axes.plot(
                x, part[f"r2_{target}"], dashes, color=colour, lw=1.2,
                marker=mark, ms=3, label=of_target,  # a site that stands alone has no line
            )  # fmt: skip
    _draw_controls(axes, run, split, places)
    axes.axhline(0, color="#b0b0b0", lw=0.8, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=10)


def _apart(rows: pd.DataFrame) -> pd.DataFrame:
    """Put an empty row where a segment ends: what does not follow on is not joined by a line."""
    segment = rows["site"].map(lambda s: _segment(_trunk(s)[0]))
    first = np.flatnonzero(segment.to_numpy()[1:] != segment.to_numpy()[:-1]) + 1
    order = np.insert(np.arange(len(rows)), first, -1)
    return rows.reset_index(drop=True).reindex(order)


def _across(rows: pd.DataFrame, places: dict[str, int]) -> Array:
    """Places on the depth axis; none for an empty row."""
    sites = rows["site"].map(lambda s: places[_trunk(s)[0]], na_action="ignore")
    return np.asarray(sites, dtype=np.float64)


def _band(rows: pd.DataFrame) -> tuple[Array, Array]:
    r2, margin = rows["r2"].to_numpy(np.float64), 1.96 * rows["r2_se"].to_numpy(np.float64)
    return r2 - margin, r2 + margin


def _too_wide(rows: pd.DataFrame) -> NDArray[np.bool_]:
    """Tell which bands cover all of the axis, where they would hide the rest and say nothing."""
    low, high = _band(rows)
    return (low < _FLOOR) & (high > 1)


def leaves_bands_out(run: Run) -> bool:
    """Tell whether a band is wider than the axis, and not drawn."""
    rows = pd.concat([run.rows_of(split) for split in run.splits])
    return "r2_se" in rows.columns and bool(_too_wide(rows).any())


def control_marks(run: Run, split: str) -> dict[str, str]:
    """Return what marks the line of every control of a split, in the words of a caption."""
    marks = {True: iter(_SITE_MARKS), False: iter(_INPUT_MARKS)}
    by_control = run.controls_of(split).groupby("control", sort=False)
    return {
        str(control): next(marks[text.has_sites(run, rows)], "no marks")
        for control, rows in by_control
    }


def _draw_controls(axes: Axes, run: Run, split: str, places: dict[str, int]) -> None:
    """Draw a control that has layers in the colours of its pools, another in grey."""
    own = {name: i for i, name in enumerate(_series(run.rows_of(split)))}
    marks = {"no marks": "", **_SITE_MARKS, **_INPUT_MARKS}
    kinds = control_marks(run, split)
    for control, rows in run.controls_of(split).groupby("control", sort=False):
        style: dict[str, Any] = {"marker": marks[kinds[str(control)]], "lw": 0.8, "ms": 4.5}
        label = f"control: {control}"
        if not text.has_sites(run, rows):
            x = [*places.values()] if len(places) > 1 else [0, 1]
            style |= {"color": GREY, "mfc": "white", "label": label}
            axes.plot(x, [rows["r2"].max()] * len(x), **style)
            continue
        for name, part in _series(rows).items():
            part = _apart(part)
            colour = COLOURS[own[name] % len(COLOURS)]
            axes.plot(_across(part, places), part["r2"], color=colour, **style)
        axes.plot([], [], color=GREY, label=label, **style)


def _mark_honest(axes: Axes, run: Run, split: str, places: dict[str, int], width: int) -> None:
    """Title the panel, and put the star; one below the axis stands at its edge with its value.

    Where the folds did not agree on a layer, there is a line at the R2 and no star.
    """
    honest = run.best_layer(split).honest
    heading = text.split_words(split).capitalize()
    if honest is not None and _trunk(honest.site)[0] in places:
        if text.majority(run, split):
            _star(axes, places[_trunk(honest.site)[0]], honest.r2, len(places))
        else:
            ends, y = [-0.5, max(len(places) - 0.5, 0.5)], max(honest.r2, _FLOOR)
            label = "honest best: folds chose several places"
            axes.plot(ends, [y, y], color="black", lw=1, clip_on=False, label=label)
            if y > honest.r2:
                _at_the_edge(axes, -0.5, f"honest best R² {number(honest.r2)}", "left")
        heading += f": honest best R² {with_error(honest.r2, honest.r2_se)}\n"
        heading += _wrapped(text.honest_place(run, split), width)
    above = 20 if len(_segments(list(places))) > 1 else None  # room for their titles
    axes.set_title(heading, fontsize=11, loc="left", pad=above)


def _star(axes: Axes, x: int, r2: float, sites: int) -> None:
    y = max(r2, _FLOOR)
    if y > r2:
        _at_the_edge(axes, x, f"R² {number(r2)}", "left" if x < sites / 2 else "right")
    axes.plot(
        x,
        y,
        "*",
        clip_on=False,
        ms=15,
        mfc="none",  # what it marks is seen inside
        mec="black",
        mew=1.2,
        zorder=5,
        label="honest best: chosen on inner folds",
    )


def _at_the_edge(axes: Axes, x: float, words: str, side: Literal["left", "right"]) -> None:
    """Tell what lies below the axis."""
    shift = (11 if side == "left" else -11, 4)
    axes.annotate(
        words, (x, _FLOOR), shift, textcoords="offset points", ha=side, fontsize=10, bbox=PAPER
    )


def _say_what_is_cut(axes: Axes, run: Run, split: str) -> None:
    if axes.dataLim.y0 >= _FLOOR:
        return
    words = f"cut at {_FLOOR}"
    best = run.best_layer(split).optimistic.r2
    if best < _FLOOR:
        words += f"; all sites are below, the highest R² is {number(best)}"
    axes.text(
        0.99, 0.12, words, transform=axes.transAxes, ha="right", fontsize=10, color=GREY,
        bbox=PAPER,
    )  # fmt: skip


def _label_depths(axes: Axes, places: dict[str, int], width: float) -> None:
    """Tick as many sites as there is room for; segments are set apart by lines, and have titles.

    `width` is of the panel, in inches.
    """
    sites = list(places)
    step = max(1, -(-len(sites) // 12))
    ticks: dict[float, str] = {}
    for i, site in enumerate(sites):
        layer = re.search(r"\.layers\.(\d+)$", site)
        if not layer or int(layer[1]) % step == 0:
            ticks[i] = site.rpartition(".")[2]
    words = {x: tick for x, tick in ticks.items() if not tick.isdigit()}
    kept = _apart_from_each_other(words, width / len(sites))
    # Words are wide, so they stand below the numbers.
    labels = [t if t.isdigit() else f"\n{t}" if x in kept else "" for x, t in ticks.items()]
    axes.set_xticks(list(ticks), labels)
    segments = _segments(sites)
    for _, first, _ in segments[1:]:
        axes.axvline(first - 0.5, color="#d0d0d0", lw=1)
    titles = {(first + last) / 2: title for title, first, last in segments}
    if len(titles) > 1:
        for x, title in _apart_from_each_other(titles, width / len(sites)).items():
            axes.text(
                x, 1.02, title, transform=axes.get_xaxis_transform(), ha="center", fontsize=10,
                color=GREY,
            )  # fmt: skip
    axes.set_xlim(-0.5, max(len(sites) - 0.5, 0.5))


def _apart_from_each_other(labels: Mapping[float, str], inches: float) -> dict[float, str]:
    """Leave out labels that would touch the one before; a site is so many `inches` wide."""
    kept: dict[float, str] = {}
    end = -math.inf
    for x, label in labels.items():
        half = len(label) * _CHARACTER / 2
        if x * inches - half > end:
            kept[x] = label
            end = x * inches + half + _CHARACTER
    return kept


def _segments(sites: Sequence[str]) -> list[tuple[str, int, int]]:
    """Title, first and last place of what is one after the other: a tower, or a part beside others.

    GeoCLIP's location encoder, for one, has three capsules that read the same input.
    """
    parts = [list(part) for _, part in groupby(enumerate(sites), lambda one: _segment(one[1]))]
    towers = {_tower(site) for site in sites}
    titles = []
    for part in parts:
        (first, site), (last, _) = part[0], part[-1]
        title = _segment(site) if last > first else site.rpartition(".")[2]
        if len(towers) == 1:
            title = title.removeprefix(f"{_tower(site)}.")
        titles.append((title, first, last))
    return titles


def _segment(site: str) -> str:
    layer = re.fullmatch(r"(.+)\.layers\.\d+", site)
    return layer[1] if layer else site.rpartition(".")[0] or site


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
    return textwrap.fill(re.sub(r"(prompt|, \d+) ", "\\1\u00a0", words), width)


# ---------------------------------------------------------------- map


def map_of_predictions(run: Run) -> Figure:
    """Draw true places and where the best probe put them, held out; a map per split, at most 2.

    At most 400 samples, evenly chosen. A ridge may predict places that do not exist: latitudes
    are clipped to -90..90 and longitudes wrap, as in `geofast.geo.error_km`.

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
    figure = blank(10, 1.4 + 4.9 * len(splits))
    panels = figure.subplots(len(splits), 1, squeeze=False).flatten()
    norm, colours = world.km_colours()
    for split, axes in zip(splits, panels, strict=True):
        best, held = text.top(run, split), table[table["split"] == split]
        some = len(held) > MAP_SAMPLES
        drawn = f"{MAP_SAMPLES} of {len(held):,} samples drawn" if some else f"{len(held)} samples"
        heading = f"{text.split_words(split).capitalize()}: {drawn}"
        if pd.notna(best.get("median_km")):
            heading += f", median error{' of all' * some} {km(best['median_km'])} km"
        heading += f" ({text.place(run, best['site'], best['pool'], best['prompt'])})"
        axes.set_title(_wrapped(heading, 104), fontsize=11, loc="left")
        _draw_map(axes, held, norm, colours)
    told = "error in km; dot: true place, end of the line: predicted place"
    world.km_legend(figure, panels, norm, colours, told)
    title(figure, f"Where {text.model_name(run)} puts the samples it was not fitted on")
    return figure


def has_map(run: Run) -> bool:
    """Tell whether there are held-out predictions of places to draw."""
    places = ("latitude", "longitude")
    needed = {"split", "error_km", *places, *(f"{c}_predicted" for c in places)}
    return needed <= set(run.predictions.columns) and len(run.predictions) > 0


def _draw_map(axes: Axes, table: pd.DataFrame, norm: Any, colours: Any) -> None:
    from matplotlib.collections import LineCollection

    world.land(axes)
    chosen = table.iloc[np.unique(np.linspace(0, len(table) - 1, MAP_SAMPLES).astype(int))]
    # The worst are drawn first, so that long lines do not hide what is right.
    chosen = chosen.sort_values("error_km", ascending=False, kind="stable")
    latitude, longitude = (chosen[c].to_numpy(np.float64) for c in ("latitude", "longitude"))
    to_latitude, to_longitude = world.on_map(
        *(chosen[f"{c}_predicted"].to_numpy(np.float64) for c in ("latitude", "longitude"))
    )
    error = chosen["error_km"].to_numpy(np.float64)
    start, end = (np.stack(p, axis=1) for p in ((longitude, latitude), (to_longitude, to_latitude)))
    lines = world.short_way(start, end)
    segments = LineCollection(list(lines), lw=0.6, alpha=0.55, cmap=colours, norm=norm)
    segments.set_array(np.tile(error, len(lines) // len(error)))
    axes.add_collection(segments, autolim=False)
    axes.scatter(longitude, latitude, c=error, s=11, cmap=colours, norm=norm, lw=0, zorder=3)
    world.crop(axes, table["longitude"], table["latitude"])
