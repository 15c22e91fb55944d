"""A search for dimensions told in 100 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from ..report.numbers import number
from ..report.text import Table, clip_label, fill, split_words
from .stability import KEEP

if TYPE_CHECKING:
    from .result import Subspace

_KEYS = ["site", "pool", "prompt"]
_NAME = 26  # characters of a name


def summary(found: Subspace) -> str:
    """Tell the curves of the best layer, and of every layer the smallest set that suffices."""
    split = f", {split_words(found.split)}" if found.split else ""
    head = (
        f"Held-out R² refit on a share of the dimensions{split}. Ranks are made in each training "
        "part, for each target"
    )
    if "study" in set(found.curves["ranking"]):
        head += (
            "; study: the study's procedure, with one order by |coef| of latitude for all targets "
            "and folds, from the fold with the best held-out R²"
        )
    blocks = [fill(f"{head}."), *(_curve(found, target) for target in found.targets)]
    blocks += [_smallest(found, target) for target in found.targets]
    return "\n\n".join(block for block in blocks if block)


def _curve(found: Subspace, target: str) -> str:
    """R2 by share and ranking at the layer with the highest R2 of a target."""
    table = found.curves[found.curves["target"] == target]
    best = table.loc[table[table["fraction"] == 1]["r2"].fillna(-float("inf")).idxmax()]
    here = table[(table[_KEYS] == best[_KEYS]).all(axis=1)]
    rankings = list(dict.fromkeys(here["ranking"]))
    several = "random" in rankings
    headers = ["share", "dims", *rankings, *(["95 % of random draws"] if several else [])]
    cells = []
    for fraction, rows in here.groupby("fraction"):
        by = rows.set_index("ranking")
        cell = [f"{_percent(fraction)}%", str(rows["dims"].iloc[0])]
        cell += [number(by.loc[r, "r2"]) for r in rankings]
        if several:
            low, high = (number(by.loc["random", f"r2_{end}"]) for end in ("low", "high"))
            cell.append(f"{low} to {high}")
        cells.append(cell)
    title = f"{target}: R² at {_name(best, 70)}, where it is highest"
    return f"{title}\n{Table(headers, cells, 0).text()}"


def _smallest(found: Subspace, target: str) -> str:
    """The smallest share that suffices, a row a layer."""
    table = found.smallest
    if table.empty or set(table["ranking"]) == {"study"}:
        return ""
    # The study's R2 is not held out, so that it keeps more of it than it should.
    table = table[(table["target"] == target) & (table["ranking"] != "study")]
    rankings = list(dict.fromkeys(table["ranking"]))
    cells = []
    for _, rows in table.groupby(_KEYS, sort=False):
        by, first = rows.set_index("ranking"), rows.iloc[0]
        shares = [_share(by.loc[r]) for r in rankings]
        cells.append([_name(first, _NAME), number(first["r2"]), *shares])
    title = fill(
        f"{target}: smallest share, in percent, that keeps {KEEP:.0%} of R² (95 % interval, by "
        "bootstrap of the folds)"
    )
    return f"{title}\n{Table(['layer', 'R²', *rankings], cells, 1).text()}"


def _name(row: pd.Series[Any], width: int) -> str:
    return clip_label(" ".join(part for part in row[_KEYS] if part), width)


def _share(row: pd.Series[Any]) -> str:
    if pd.isna(row["fraction"]):
        return ""
    share, low, high = (_percent(row[f"fraction{end}"]) for end in ("", "_low", "_high"))
    return f"{share} ({low}-{high})"


def _percent(fraction: Any) -> str:
    return f"{100 * float(fraction):.3g}"
