"""The pictures of an experiment: effect against damage, readings of later sites, and a map."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from . import steering_text as text
from . import world
from .canvas import COLOURS, GREY, blank, title
from .numbers import km
from .steering_text import EDIT, UNEDITED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..effects.outcome import Steered

Array = NDArray[np.float64]

_ROOM = 100  # characters below an axis as wide as the page
MAP_PAIRS = 24  # more arrows than this hide each other
_MARKS = ("o", "s", "^", "D", "v", "P", "X")
_TITLES = {
    "moved": "Effect: answers that name the target's place",
    "log_odds": "Effect: log odds of the target's name, nats",
    "kl": "Damage: KL from the unedited model, nats",
}
_OVER = {
    "moved": "Answers that name the target's place",
    "log_odds": "Log odds of the target's name",
}


# ---------------------------------------------------------------- effect and damage


def effect_and_damage(steered: Steered) -> Figure:
    """Draw effect and damage of the edit and of every control.

    With several shares, a panel for each measure over the shares, and one of effect over damage;
    with one share only panels of effect over damage. Bars are 95 % intervals over pairs. The title
    is the finding.

    Parameters
    ----------
    steered : Steered

    Returns
    -------
    matplotlib.figure.Figure
    """
    panels = _panels(steered)
    lines = -(-len(panels) // 2)
    figure = blank(10, 1.5 + 3.5 * lines)
    every = figure.subplots(lines, min(len(panels), 2), squeeze=False).flatten()
    for axes, draw in zip(every, panels, strict=False):
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=10)
    for axes in every[len(panels) :]:
        axes.set_visible(False)
    title(figure, text.finding(steered)[0])
    _legend(figure)
    return figure


def _panels(steered: Steered) -> list[Callable[[Axes], None]]:
    """What can be drawn of these measures."""
    effects = [m for m in ("moved", "log_odds") if text.has(steered, m)]
    damaged = text.has(steered, "kl")

    def over_shares(measure: str) -> Callable[[Axes], None]:
        return lambda axes: _over_shares(axes, steered, measure)

    def over_damage(measure: str) -> Callable[[Axes], None]:
        return lambda axes: _over_damage(axes, steered, measure)

    several = len(text.shares(steered)) > 1
    if not several and damaged:
        return [over_damage(m) for m in effects] or [over_shares("kl")]
    panels = [over_shares(m) for m in [*effects, *(["kl"] if damaged else [])]]
    return panels + ([over_damage(effects[0])] if damaged and effects else [])


def _arms(steered: Steered) -> list[str]:
    return [EDIT, *text.controls(steered)]


def _style(steered: Steered, arm: str) -> dict[str, Any]:
    """Line of an arm: the edit heavy, controls light, each with a colour and mark of its own."""
    i = _arms(steered).index(arm)
    edit = arm == EDIT
    return {
        "color": COLOURS[i % len(COLOURS)], "marker": _MARKS[i % len(_MARKS)],
        "lw": 2.4 if edit else 1.2, "ms": 6.5 if edit else 5, "zorder": 4 if edit else 3,
    }  # fmt: skip


def _label(arm: str) -> str:
    return text.arm_words(arm) if arm in (UNEDITED, EDIT) else f"control: {arm}"


def _legend(figure: Figure) -> None:
    """Say below all panels, once, what their lines are."""
    handles = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 3),
        frameon=False, fontsize=10,
    )  # fmt: skip


def _values(steered: Steered, arm: str, measure: str) -> tuple[Array, Array, Array]:
    """Mean, and how far its interval reaches below and above it, share by share."""
    rows = [text.row_of(steered, arm, share) for share in text.shares(steered)]
    mean, low, high = (
        np.array([row.get(f"{measure}{end}", np.nan) for row in rows], dtype=np.float64)
        for end in ("", "_low", "_high")
    )
    # A bootstrap's ends may lie beyond the mean by rounding.
    return mean, (mean - low).clip(0), (high - mean).clip(0)


def _bars(axes: Axes, style: Mapping[str, Any], x: Array, y: Array, **errors: Any) -> None:
    axes.errorbar(
        x, y, **errors, fmt="none", ecolor=style["color"], elinewidth=1, alpha=0.7,
        zorder=style["zorder"],
    )  # fmt: skip


def _over_shares(axes: Axes, steered: Steered, measure: str) -> None:
    shares = 100 * np.array(text.shares(steered))
    apart = 0.012 * np.ptp(shares) if len(shares) > 1 else 1.0
    arms = _arms(steered)
    for i, arm in enumerate(arms):
        # Side by side, so that intervals do not hide each other.
        x = shares + apart * (i - (len(arms) - 1) / 2)
        mean, below, above = _values(steered, arm, measure)
        style = _style(steered, arm)
        _bars(axes, style, x, mean, yerr=[below, above])
        axes.plot(x, mean, label=_label(arm), **style)
    before = text.row_of(steered, UNEDITED, 0).get(measure)
    if before is not None and pd.notna(before):
        axes.axhline(before, color=GREY, lw=1, ls="--", zorder=1, label=_label(UNEDITED))
    axes.set_title(_TITLES[measure], fontsize=11, loc="left")
    axes.set_xlabel("share of the dimensions that is edited", fontsize=11)
    axes.xaxis.set_major_formatter(_per_cent(1))
    axes.set_xticks(shares[:: max(1, -(-len(shares) // 8))])
    _scale(axes, steered, measure)


def _over_damage(axes: Axes, steered: Steered, measure: str) -> None:
    shares = text.shares(steered)
    before = text.row_of(steered, UNEDITED, 0)
    for arm in _arms(steered):
        mean, below, above = _values(steered, arm, measure)
        damage, left, right = _values(steered, arm, "kl")
        style = _style(steered, arm)
        _bars(axes, style, damage, mean, yerr=[below, above], xerr=[left, right])
        axes.plot(damage, mean, label=_label(arm), **style)
        if arm == EDIT and len(shares) > 1:
            for i in {0, len(shares) - 1, shares.index(text.shown_share(steered))}:
                axes.annotate(
                    text.share_words(shares[i]), (damage[i], mean[i]), (-6, 7), fontsize=9,
                    textcoords="offset points", ha="right", color=style["color"],
                )  # fmt: skip
    if before and pd.notna(before[measure]):
        axes.axhline(before[measure], color=GREY, lw=1, ls="--", zorder=1, label=_label(UNEDITED))
    axes.set_title(f"{_OVER[measure]}, over damage", fontsize=11, loc="left")
    axes.set_xlabel("damage: KL from the unedited model, nats", fontsize=11)
    axes.set_xlim(left=min(0, axes.get_xlim()[0]))
    _scale(axes, steered, measure)


def _scale(axes: Axes, steered: Steered, measure: str) -> None:
    if measure == "moved":
        axes.yaxis.set_major_formatter(_per_cent(100))
        top = max(np.nanmax(sum(_values(steered, arm, "moved")[::2])) for arm in _arms(steered))
        axes.set_ylim(-0.03 * max(top, 0.1), 1.1 * max(top, 0.1))
    elif measure == "kl":
        axes.set_ylim(bottom=0)


def _per_cent(factor: float) -> Any:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: f"{factor * value:.3g} %")


# ---------------------------------------------------------------- readings


def readings_of_sites(steered: Steered) -> Figure:
    """Draw how far from the target's place every later site reads, at the share shown.

    A line per arm over the sites in the order of the pass, its 95 % interval over pairs a band.

    Parameters
    ----------
    steered : Steered

    Returns
    -------
    matplotlib.figure.Figure
    """
    share = text.shown_share(steered)
    figure = blank(10, 4.8)
    axes = figure.subplots()
    sites = text.readings_of(steered, EDIT, share).index
    for arm in (EDIT, *text.controls(steered, share), UNEDITED):
        rows = text.readings_of(steered, arm, share).reindex(sites)
        style: dict[str, Any] = {"color": GREY, "lw": 1.2, "ls": "--", "zorder": 2}
        if arm != UNEDITED:
            style = _style(steered, arm)
        axes.plot(range(len(sites)), rows["km"], label=_label(arm), **style)
        axes.fill_between(
            range(len(sites)), rows["km_low"], rows["km_high"], color=style["color"], alpha=0.13,
            linewidth=0, zorder=0,
        )  # fmt: skip
    # The last site is in every table: it keeps its label where not all have room.
    step = -(-len(sites) * (max(map(len, sites)) + 2) // _ROOM)
    shown = range(len(sites) - 1, -1, -step)
    axes.set_xticks(shown, [sites[i] for i in shown])
    axes.set_ylim(bottom=0)
    axes.set_ylabel("km from the target's place", fontsize=11)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("site that is read, in the order of the pass", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=10)
    title(figure, text.readings_title(steered))
    _legend(figure)
    return figure


# ---------------------------------------------------------------- map


def has_map(steered: Steered) -> bool:
    """Tell whether a probe of a later site read places."""
    return not _mapped(steered, EDIT).empty


def map_of_readings(steered: Steered) -> Figure:
    """Draw for some pairs where the probe reads the edited source, the same under a control below.

    The first 24 pairs that have a reading, at the share shown. An arrow goes from the source's
    place to the reading, a dotted line on to the target's place.

    Parameters
    ----------
    steered : Steered

    Returns
    -------
    matplotlib.figure.Figure
    """
    below = text.shown_control(steered) or UNEDITED
    drawn = {arm: _mapped(steered, arm) for arm in (EDIT, below)}
    drawn = {arm: rows.head(MAP_PAIRS) for arm, rows in drawn.items() if len(rows)}
    figure = blank(10, 1.4 + 4.9 * len(drawn))
    panels = figure.subplots(len(drawn), 1, squeeze=False).flatten()
    norm, colours = world.km_colours()
    every = pd.concat(drawn.values())
    for axes, (arm, rows) in zip(panels, drawn.items(), strict=True):
        _draw_pairs(axes, rows, norm, colours)
        sides = ("source", "target", "reading")
        world.crop(axes, *(pd.concat([every[f"{s}_{c}"] for s in sides]) for c in _PLACE[::-1]))
        axes.set_title(_heading(steered, arm, len(rows)), fontsize=11, loc="left")
    told = "km from the target (ring) to where the probe reads (arrowhead); dot: source"
    world.km_legend(figure, panels, norm, colours, told)
    share = text.share_words(text.shown_share(steered))
    where = f"after {steered.info['mode']} at {steered.info['site']} ({share})"
    title(figure, f"Where the probe at {steered.info['read_at']} has the sources {where}")
    return figure


_PLACE = ("latitude", "longitude")


def _mapped(steered: Steered, arm: str) -> pd.DataFrame:
    """Pairs of an arm with a reading, its place brought onto the map."""
    columns = [f"{side}_{c}" for side in ("source", "target", "reading") for c in _PLACE]
    if not {*columns, "km"} <= set(steered.pairs.columns):
        return pd.DataFrame()
    rows = text.of_arm(steered, arm, text.shown_share(steered)).dropna(subset=[*columns, "km"])
    at = (rows[f"reading_{c}"].to_numpy(np.float64) for c in _PLACE)
    latitude, longitude = world.on_map(*at)
    return rows.assign(reading_latitude=latitude, reading_longitude=longitude)


def _heading(steered: Steered, arm: str, shown: int) -> str:
    rows = _mapped(steered, arm)
    some = f"{shown} of {len(rows):,} pairs drawn" if shown < len(rows) else f"{shown} pairs"
    words = {EDIT: "Edit", UNEDITED: "Unedited"}.get(arm, f"Control: {arm}")
    return f"{words}: {some}, mean {km(rows['km'].mean())} km from the target"


def _draw_pairs(axes: Axes, rows: pd.DataFrame, norm: Any, colours: Any) -> None:
    from matplotlib.collections import LineCollection
    from matplotlib.patches import FancyArrowPatch

    world.land(axes)
    source, target, reading = (
        rows[[f"{side}_longitude", f"{side}_latitude"]].to_numpy(np.float64)
        for side in ("source", "target", "reading")
    )
    away = rows["km"].to_numpy(np.float64)
    rest = LineCollection(list(world.short_way(reading, target)), lw=0.8, ls=":", color=GREY)
    axes.add_collection(rest, autolim=False)
    arrows = world.short_way(source, reading)
    across = arrows[:, :, 0]
    there = (across.max(1) >= -180) & (across.min(1) <= 180)  # most copies lie beside the map
    for (start, end), distance in zip(arrows[there], np.tile(away, 3)[there], strict=True):
        arrow = FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=9, shrinkA=0, shrinkB=0, lw=1.3,
            color=colours(norm(distance)), zorder=3,
        )  # fmt: skip
        axes.add_patch(arrow)
    axes.scatter(source[:, 0], source[:, 1], s=12, color="black", lw=0, zorder=4)
    axes.scatter(
        target[:, 0], target[:, 1], s=34, facecolor="none", edgecolor="black", lw=1, zorder=4
    )
