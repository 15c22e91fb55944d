"""The picture and the page of a search for dimensions: subspace.png and subspace.html."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..subspace import text
from ..subspace.stability import KEEP
from . import canvas, frame
from .canvas import COLOURS, GREY, PAPER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..subspace import Subspace

WORDS = {
    "coef": "|coef|",
    "coef_std": "|coef| x standard deviation",
    "forward": "forward selection",
    "backward": "backward elimination",
    "random": "random dimensions",
    "study": "the study's procedure (too high)",
}
_COLOURS = dict(zip(WORDS, (*COLOURS[:4], GREY, "#000000"), strict=True))
_TARGETS = 4  # more have their curves in subspace.csv
_FLOOR = -0.5  # R2 below 0 is worse than the mean; how much worse would squash the rest
_RING = f"smallest that keeps {text.KEPT}"
_LABELS = 30  # layers with a name; of more, every second one and so on


def write(found: Subspace, folder: str | Path, told: str | Path | None = None) -> None:
    """Write subspace.png and subspace.html into an existing folder.

    Without matplotlib the page has no picture. What cannot be drawn or worded warns.

    Parameters
    ----------
    found : Subspace
    folder : path
    told : path, optional
        What the page tells to open; `folder` by default.
    """
    folder = Path(folder)
    told = folder if told is None else Path(told)
    pages = {"subspace.html": lambda drawn: _html(found, folder, drawn, told)}
    frame.write({}, folder, {"subspace.png": lambda: shares(found)}, pages)


def finding(found: Subspace) -> str:
    """Say how few dimensions suffice for every target, at its best layer and by its best ranking.

    And whether random dimensions do as well. The study's ranking has seen what it is scored on and
    does not count.
    """
    rows = [_fewest(found, target) for target in found.targets]
    said = [_said(found, row) for row in rows if row is not None]
    return "; ".join(said) or "Held-out R² by the share of dimensions kept"


def _said(found: Subspace, row: pd.Series[Any]) -> str:
    """Say of a row of `smallest` how few dimensions suffice, and how many random ones do."""
    target, layer, share = row["target"], text.layer_name(row, 60), row["fraction"]
    enough = f"keep {text.KEPT} of R²"
    if share == 1:
        return f"{target}: no share tried of the dimensions of {layer} but all {enough}"
    tried = found.curves["fraction"].min()
    least = f"at most {_percent(share)}" if share == tried else _percent(share)
    chance = _random_share(found, row)
    if chance is not None and chance <= share:
        return (
            f"{target}: random dimensions of {layer} do as well as ranked ones: of both {least} "
            f"{enough}"
        )
    low, high = row["fraction_low"], row["fraction_high"]
    ends = f"up to {_percent(high)}" if low == tried else f"{text.percent(low)} to {_percent(high)}"
    said = (
        f"{target}: {least} of the dimensions of {layer} (95 % interval {ends}) {enough}, by "
        f"{WORDS[row['ranking']]}"
    )
    if chance is None:
        return f"{said}; no random dimensions were tried"
    within = ", not clearly more" if chance <= row["fraction_high"] else ""
    return f"{said}; of random dimensions {_percent(chance)}{within}"


def _random_share(found: Subspace, row: pd.Series[Any]) -> float | None:
    """The smallest share of random dimensions that suffices where `row` is; None without draws."""
    table = found.curves
    here = (table["ranking"] == "random") & (table["target"] == row["target"])
    here &= (table[text.KEYS] == row[text.KEYS]).all(axis=1)
    enough = table[here & (table["r2"] >= KEEP * row["r2"])]["fraction"]
    return None if enough.empty else float(enough.min())


def _percent(fraction: float) -> str:
    return f"{text.percent(fraction)} %"


def _fewest(found: Subspace, target: str) -> pd.Series[Any] | None:
    """Row of `smallest` with the least share at the best layer of a target."""
    table, best = found.smallest, text.best_layer(found, target).iloc[0]
    if table.empty:
        return None
    here = table[(table["target"] == target) & (table["ranking"] != "study")]
    here = here[(here[text.KEYS] == best[text.KEYS]).all(axis=1) & here["fraction"].notna()]
    return None if here.empty else here.loc[here["fraction"].idxmin()]


# ---------------------------------------------------------------- the picture


def shares(found: Subspace) -> Figure:
    """Draw R2 against the share of dimensions kept: a row per target, four at most.

    On the left the curves of the target's best layer, a line per ranking, the band of the random
    draws, and a ring at the smallest share that keeps 95 % of R2. On the right every layer, by the
    ranking that keeps most on average, a dot at its smallest share.

    Parameters
    ----------
    found : Subspace

    Returns
    -------
    matplotlib.figure.Figure
    """
    targets = found.targets[:_TARGETS]
    layers = _by_pool(found)
    many = len(layers) > 1 and not found.smallest.empty
    height = 3.6 if len(layers) <= 14 else 4.6
    figure = canvas.blank(10, 1.3 + height * len(targets))
    panels = figure.subplots(
        len(targets), 1 + many, squeeze=False, width_ratios=[1.25, 1][: 1 + many]
    )
    for target, row in zip(targets, panels, strict=True):
        _draw_curves(row[0], found, target)
        if many:
            _draw_layers(row[1], found, target, layers)
    for axes in panels[-1]:
        axes.set_xlabel("share of the dimensions kept (%)", fontsize=11)
    handles = dict[str, Any]()
    for axes in panels[:, 0]:
        drawn, labels = axes.get_legend_handles_labels()
        handles |= zip(labels, drawn, strict=True)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False,
        fontsize=10,
    )  # fmt: skip
    canvas.title(figure, finding(found))
    return figure


def _by_pool(found: Subspace) -> pd.DataFrame:
    """Site, pool and prompt of every layer, one pool and prompt after the other."""
    layers = found.curves[text.KEYS].drop_duplicates()
    parts = layers.groupby(["pool", "prompt"], sort=False)
    return pd.concat([part for _, part in parts])


def _draw_curves(axes: Axes, found: Subspace, target: str) -> None:
    here = text.best_layer(found, target)
    full = float(here[here["fraction"] == 1]["r2"].iloc[0])
    for ranking, rows in here.groupby("ranking", sort=False):
        colour, rows = _COLOURS[str(ranking)], rows.sort_values("fraction")
        share = 100 * rows["fraction"].to_numpy(np.float64)
        dashes = {"random": "--", "study": ":"}.get(str(ranking), "-")
        axes.plot(
            share, rows["r2"], dashes, color=colour, lw=2, marker="o", ms=3.5,
            label=WORDS[str(ranking)],
        )  # fmt: skip
        if ranking == "random":
            band = (rows[f"r2_{end}"].to_numpy(np.float64) for end in ("low", "high"))
            axes.fill_between(
                share, *band, color=colour, alpha=0.2, linewidth=0, label=text.draws(found)
            )
    _ring_smallest(axes, found, here, target)
    if full > 0:
        axes.axhline(KEEP * full, color="#b0b0b0", lw=1, zorder=0)
        axes.annotate(
            f"{text.KEPT} of R²", (100, KEEP * full), (0, -4), textcoords="offset points",
            ha="right", va="top", fontsize=9, color=GREY, bbox=PAPER,
        )  # fmt: skip
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, _FLOOR), high)
    axes.set_xlim(0, 102)
    axes.set_ylabel(f"held-out R² of {target}", fontsize=11)
    axes.set_title(text.layer_name(here.iloc[0], 54), fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=10)


def _ring_smallest(axes: Axes, found: Subspace, here: pd.DataFrame, target: str) -> None:
    """Ring the smallest share that suffices, by every ranking of the layer of `here`."""
    table = found.smallest
    if table.empty:
        return
    table = table[(table["target"] == target) & table["fraction"].notna()]
    table = table[table["ranking"] != "study"]  # its R2 has chosen what it scores
    table = table[(table[text.KEYS] == here.iloc[0][text.KEYS]).all(axis=1)]
    for _, row in table.iterrows():
        same = (here["ranking"] == row["ranking"]) & (here["fraction"] == row["fraction"])
        axes.plot(
            100 * row["fraction"], here[same]["r2"], "o", ms=11, mfc="none", mew=1.5,
            mec=_COLOURS[row["ranking"]], clip_on=False,
        )  # fmt: skip
    axes.plot([], [], "o", ms=11, mfc="none", mew=1.5, mec=GREY, label=_RING)


def _draw_layers(axes: Axes, found: Subspace, target: str, layers: pd.DataFrame) -> None:
    """R2 of every layer by share, of one ranking; the first layer lies at the bottom."""
    ranking = _ranking_that_keeps_most(found, target)
    table = found.curves
    table = table[(table["target"] == target) & (table["ranking"] == ranking)]
    fractions = np.sort(table["fraction"].unique())
    grid = table.set_index([*text.KEYS, "fraction"])["r2"]
    names = [tuple(row) for row in layers.to_numpy()]
    values = np.array([[grid[(*name, f)] for f in fractions] for name in names], np.float64)
    image = axes.imshow(
        values, origin="lower", aspect="auto", cmap="viridis", interpolation="nearest",
        vmin=max(0.0, np.nanmin(values)), vmax=max(np.nanmax(values), 0.01),
    )  # fmt: skip
    few = found.smallest
    few = few[(few["target"] == target) & (few["ranking"] == ranking) & few["fraction"].notna()]
    at = [names.index(tuple(row)) for row in few[text.KEYS].to_numpy()]
    axes.plot(
        np.searchsorted(fractions, few["fraction"]), at, "o", ms=4.5, mfc="white", mec="black",
        mew=0.8,
    )  # fmt: skip
    step = -(-len(names) // _LABELS)
    shown = range(0, len(names), step)
    labels = [text.layer_name(layers.iloc[i], 30) for i in shown]
    axes.set_yticks(shown, labels, fontsize=8)
    axes.set_xticks(range(len(fractions)), [text.percent(f) for f in fractions], fontsize=9)
    axes.set_title(f"every layer, by {WORDS[ranking]}", fontsize=11, loc="left")
    axes.spines[:].set_visible(False)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02, aspect=30)
    bar.outline.set_visible(False)
    bar.set_label("held-out R²", fontsize=10)
    bar.ax.tick_params(labelsize=9)


def _ranking_that_keeps_most(found: Subspace, target: str) -> str:
    """The ranking with the highest R2 over all layers and shares below one."""
    table = found.curves[(found.curves["target"] == target) & (found.curves["fraction"] < 1)]
    held_out = table[~table["ranking"].isin(["random", "study"])]
    table = table if held_out.empty else held_out
    if table.empty:  # all dimensions alone were measured
        return str(found.curves["ranking"].iloc[0])
    return str(table.groupby("ranking", sort=False)["r2"].mean().idxmax())


# ---------------------------------------------------------------- the page


def _html(found: Subspace, folder: Path, pictures: list[str], told: Path) -> str:
    body = [f'<p class="finding">{escape(finding(found))}.</p>']
    body += [f"<p>{escape(note)}</p>" for note in text.notes(found)]
    body += [frame.picture(folder / name, _caption(found)) for name in pictures]
    for title, table in (*text.curves(found), *text.smallest_sets(found)):
        body += [f"<h2>{escape(title)}</h2>", frame.table(table)]
    body.append(f"<h2>Method</h2><p>{escape(text.method(found))}</p>")
    name = json.dumps(str(told), ensure_ascii=False)
    body.append(f"<h2>Open it again</h2><pre>{escape(_OPEN.format(name=name))}</pre>")
    for what, rows in (
        ("How much the folds agree, subspace_stability.csv", found.stability),
        ("Everything, subspace.csv", found.curves),
    ):
        whole = frame.table(frame.whole(rows))
        body.append(f"<details><summary>{what}</summary>{whole}</details>")
    return frame.document("Which dimensions hold the targets", body)


_OPEN = """import geofast as gf

found = gf.Subspace.open({name})
found.curves      # a row per layer, target, ranking and share
found.dims        # the first dimensions of a layer, best first
print(found)      # what this page says"""


def _caption(found: Subspace) -> str:
    said = [
        "Left: held-out R² by the share of dimensions kept, refit, at the layer where it is "
        f"highest; rings: the smallest share that keeps {text.KEPT} of it."
    ]
    if found.curves[text.KEYS].drop_duplicates().shape[0] > 1 and not found.smallest.empty:
        said.append("Right: every layer, by the ranking that keeps most; dots: its smallest share.")
    if len(found.targets) > _TARGETS:
        said.append(f"The first {_TARGETS} of {len(found.targets)} targets are drawn.")
    return " ".join(said)
