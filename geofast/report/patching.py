"""The picture of patching: patching.png, what each site and token restores."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from . import canvas, frame
from .canvas import COLOURS, GREY
from .text import clip_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..effects.patching import Patched

HALF = 0.5
_SAID = 4  # tokens in the title
_LABEL = 22  # characters of a token
_ROOM = 90  # characters below an axis
_BEYOND = 1.0, 0.25  # how far below 0 and above 1 lines are shown, and bands
_WHAT = "restored share of the change of answer"


def write(found: Patched, folder: Path) -> None:
    """Write patching.png into an existing folder.

    Without matplotlib there is none. What cannot be drawn warns, and the warning is kept in
    `info["warnings"]`.
    """
    frame.write(found.info, folder, {"patching.png": partial(curves, found)}, {})


def finding(found: Patched) -> str:
    """Say which tokens restore half of the change of answer or more, and at which sites.

    Of whole prompts, which restore all of it, nothing is said beside other tokens.
    """
    if not found.info["target_effect"] > 0:
        return "Asked about them, the model does not name these targets: shares mean little"
    grid = _shares(found)
    if "all" in grid and len(grid.columns) > 1:
        grid = grid.drop(columns="all")
    most = grid.sum().sort_values(ascending=False, kind="stable").index
    carry = [token for token in most if (grid[token] >= HALF).any()]
    if not carry:
        site, token = grid.stack().idxmax()
        return (
            "None of these tokens restores half of the change of answer; the most is "
            f"{100 * grid.loc[site, token]:.1f} %, by {_token(found, token)} at {site}"
        )
    by_site = sorted(carry[:_SAID], key=lambda t: (grid[t] >= HALF).argmax())
    said = [f"{_token(found, t)} {_where(grid[t])}" for t in by_site]
    if more := len(carry) - len(said):
        said.append(f"{more} more token{'s' if more > 1 else ''} somewhere")
    return f"Half of the change of answer or more is restored by {'; '.join(said)}"


def _where(shares: pd.Series[float]) -> str:
    """Say at which sites of those that have a token it restores half."""
    there = shares.dropna()
    at = np.flatnonzero(there >= HALF)
    first, last = there.index[at[[0, -1]]]
    if len(at) == len(there):
        return "at every site"
    if len(at) == 1:
        return f"at {first}"
    if len(at) < at[-1] - at[0] + 1:
        return f"at {len(at)} sites from {first} to {last}"
    if at[0] == 0:
        return f"up to {last}"
    return f"from {first} on" if at[-1] == len(there) - 1 else f"from {first} to {last}"


def _token(found: Patched, token: str | int) -> str:
    if isinstance(token, str):
        return "the last token" if token == "last" else f"{token} tokens"
    word = found.info["words"].get(token)
    return f"token {token} ({clip_label(word, _LABEL)})" if word else f"token {token}"


def _shares(found: Patched) -> pd.DataFrame:
    """What is restored, a row a site; shares of no change at all are missing."""
    return found.grid().astype(np.float64).replace([np.inf, -np.inf], np.nan)


# ---------------------------------------------------------------- the picture


def curves(found: Patched) -> Figure:
    """Draw the restored share by site, in the order of the pass.

    Roles have a line each, with the 95 % interval over pairs as a band; positions have a row each
    of a heat map. The title is the finding.

    Parameters
    ----------
    found : Patched

    Returns
    -------
    matplotlib.figure.Figure
    """
    grid = _shares(found)
    roles = [token for token in grid if isinstance(token, str)]
    places = [token for token in grid if isinstance(token, int)]
    heights = [4.2] * bool(roles) + [1.6 + 0.24 * min(len(places), 40)] * bool(places)
    figure = canvas.blank(10, 1.0 + sum(heights))
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    if roles:
        _draw_roles(panels[0], found, grid[roles])
    if places:
        _draw_positions(panels[-1], found, grid[places])
    for axes in panels:
        _name_sites(axes, [str(site) for site in grid.index])
    pairs = found.info["pairs"]["used"]
    panels[-1].set_xlabel(
        f"site that is patched, in the order of the pass; {pairs:,} pair{'s' if pairs > 1 else ''}",
        fontsize=11,
    )
    canvas.title(figure, finding(found))
    return figure


def _draw_roles(axes: Axes, found: Patched, grid: pd.DataFrame) -> None:
    low, high = (found.grid(f"restored_{end}").astype(np.float64) for end in ("low", "high"))
    x = np.arange(len(grid))
    for i, role in enumerate(grid):
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(x, grid[role], color=colour, lw=2, marker="o", ms=3.5, label=role)
        axes.fill_between(x, low[role], high[role], color=colour, alpha=0.15, linewidth=0, zorder=0)
    for share in (0, 1):
        axes.axhline(share, color="#b0b0b0", lw=1, zorder=0)
    bottom, top = 0.0, 1.0
    for drawn, beyond in zip((grid, pd.concat([low, high])[grid.columns]), _BEYOND, strict=True):
        values = drawn.to_numpy()
        bottom = min(bottom, max(np.nanmin(values, initial=0), -beyond))
        top = max(top, min(np.nanmax(values, initial=1), 1 + beyond))
    axes.set_ylim(bottom - 0.05 * (top - bottom), top + 0.05 * (top - bottom))
    axes.set_xlim(-0.5, len(grid) - 0.5)
    axes.yaxis.set_major_formatter(_per_cent())
    axes.set_ylabel(_WHAT, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.fill_between([], [], [], color=GREY, alpha=0.2, linewidth=0, label="95 % over pairs")
    axes.figure.legend(loc="outside lower center", ncols=7, frameon=False, fontsize=10)


def _draw_positions(axes: Axes, found: Patched, grid: pd.DataFrame) -> None:
    """A row a position, the first on top; blue restores, red leads away."""
    values = grid.to_numpy().T
    most = float(np.nanmax(np.abs(values), initial=0))
    limit = min(max(most, 0.1), 1.0)
    image = axes.imshow(
        values, aspect="auto", cmap="RdBu", interpolation="nearest", vmin=-limit, vmax=limit
    )
    step = -(-len(grid.columns) // 40)
    shown = range(0, len(grid.columns), step)
    words = found.info["words"]
    labels = [f"{grid.columns[i]} {words.get(grid.columns[i], '')}".rstrip() for i in shown]
    axes.set_yticks(shown, [clip_label(label, _LABEL + 4) for label in labels])
    axes.set_ylabel("token that is patched", fontsize=11)
    axes.spines[:].set_visible(False)
    extend = "neither" if most <= limit else "both"
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02, aspect=30, extend=extend)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_formatter(_per_cent())
    bar.set_label(_WHAT, fontsize=10)
    bar.ax.tick_params(labelsize=9)


def _name_sites(axes: Axes, sites: list[str]) -> None:
    """Name those sites for which there is room, the last one always; part the towers by a line."""
    step = -(-len(sites) * (max(map(len, sites)) + 2) // _ROOM)
    shown = range(len(sites) - 1, -1, -step)
    axes.set_xticks(shown, [sites[i] for i in shown])
    axes.tick_params(labelsize=9)
    towers = [site.partition(".")[0] for site in sites]
    for i in range(1, len(sites)):
        if towers[i] != towers[i - 1]:
            axes.axvline(i - 0.5, color=GREY, lw=0.8, ls=":", zorder=1)


def _per_cent() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1, 0, " %")
