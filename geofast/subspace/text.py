"""A search for dimensions told in 100 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from ..report.numbers import number
from ..report.text import Table, clip_label, fill, split_words
from .stability import KEEP

if TYPE_CHECKING:
    from .result import Subspace

KEPT = f"{100 * KEEP:g} %"  # of R2
KEYS = ["site", "pool", "prompt"]
_NAME = 26  # characters of a name
_ALPHA = {
    "loo": "by leave-one-out, as the study has it",
    "gcv": "by generalised cross-validation instead of the study's leave-one-out, which needs rows "
    "and not statistics alone",
}
_SELECT = {"loo": "leave-one-out", "folds": "inner folds"}


def summary(found: Subspace) -> str:
    """Tell the curves of the best layer, and of every layer the smallest set that suffices."""
    tables = [*curves(found), *smallest_sets(found)]
    told = (f"{fill(title)}\n{table.text()}" for title, table in tables)
    return "\n\n".join([fill(method(found)), *map(fill, notes(found)), *told])


def method(found: Subspace) -> str:
    """Say what was measured."""
    split = f", {split_words(found.split)}" if found.split else ""
    said = (
        f"Held-out R² refit on a share of the dimensions{split}. Ranks are made in each training "
        "part, for each target"
    )
    if found.study:
        said += (
            "; study: the study's procedure, with one order by |coef| of latitude for all targets "
            "and folds, from the fold with the best held-out R², and alpha of every share and "
            f"target {_ALPHA[found.study]}"
        )
    return f"{said}."


def notes(found: Subspace) -> list[str]:
    """Say what a reader of the numbers must know, in sentences."""
    said = []
    if found.study:
        said.append(
            "The column study holds nothing out: its order has seen the rows it is scored on, so "
            "its numbers are too high."
        )
    dims = int(found.curves["dims"].max())
    if 0 < found.train < dims:
        said.append(
            f"Few samples: the smallest training part has {found.train:,} rows for {dims:,} "
            "dimensions, so many sets of dimensions fit it equally well, and which rank first says "
            "little."
        )
    if found.select in _SELECT:
        said.append(
            "At 100 % R² can differ a little from the run's: alpha is chosen here by generalised "
            f"cross-validation, from statistics, and in the run by {_SELECT[found.select]}."
        )
    return said


def draws(found: Subspace) -> str:
    """Name what lies between the ends of the random draws."""
    return f"range of {found.draws} draws" if found.draws else "95 % of random draws"


def curves(found: Subspace) -> list[tuple[str, Table]]:
    """R2 by share and ranking at the layer with the highest R2 of a target; a table a target."""
    return [_curve(found, target) for target in found.targets]


def smallest_sets(found: Subspace) -> list[tuple[str, Table]]:
    """The smallest share that suffices, a row a layer; a table a target."""
    # The study's R2 is not held out, so that it keeps more of it than it should.
    table = found.smallest
    if table.empty or set(table["ranking"]) == {"study"}:
        return []
    table, tried = table[table["ranking"] != "study"], float(found.curves["fraction"].min())
    return [_smallest(table, target, tried) for target in found.targets]


def best_layer(found: Subspace, target: str) -> pd.DataFrame:
    """Rows of `curves` of the layer with the highest R2 of a target."""
    table = found.curves[found.curves["target"] == target]
    best = table.loc[table[table["fraction"] == 1]["r2"].fillna(-float("inf")).idxmax()]
    return table[(table[KEYS] == best[KEYS]).all(axis=1)]


def _curve(found: Subspace, target: str) -> tuple[str, Table]:
    here = best_layer(found, target)
    rankings = list(dict.fromkeys(here["ranking"]))
    several = "random" in rankings
    headers = ["share", "dims", *rankings, *([draws(found)] if several else [])]
    cells = []
    for fraction, rows in here.groupby("fraction"):
        by = rows.set_index("ranking")
        cell = [f"{percent(fraction)} %", str(rows["dims"].iloc[0])]
        cell += [number(by.loc[r, "r2"]) for r in rankings]
        if several:
            low, high = (number(by.loc["random", f"r2_{end}"]) for end in ("low", "high"))
            cell.append(f"{low} to {high}")
        cells.append(cell)
    title = f"{target}: R² at {layer_name(here.iloc[0], 70)}, where it is highest"
    return title, Table(headers, cells, 0)


def _smallest(table: pd.DataFrame, target: str, tried: float) -> tuple[str, Table]:
    table = table[table["target"] == target]
    rankings = list(dict.fromkeys(table["ranking"]))
    cells = []
    for _, rows in table.groupby(KEYS, sort=False):
        by, first = rows.set_index("ranking"), rows.iloc[0]
        shares = [_share(by.loc[r]) for r in rankings]
        cells.append([layer_name(first, _NAME), number(first["r2"]), *shares])
    title = (
        f"{target}: smallest share, in percent, that keeps {KEPT} of R² (95 % interval, by "
        "bootstrap of the folds)"
    )
    if tried < 1 and (table["fraction"] == tried).any():
        least = percent(tried)
        title += f"; {least} is the least that was tried, and means at most {least}"
    return title, Table(["layer", "R²", *rankings], cells, 1)


def layer_name(row: pd.Series[Any], width: int = 200) -> str:
    """Name the layer of a row: site, pool and prompt."""
    return clip_label(" ".join(part for part in row[KEYS] if part), width)


def _share(row: pd.Series[Any]) -> str:
    if pd.isna(row["fraction"]):
        return ""
    share, low, high = (percent(row[f"fraction{end}"]) for end in ("", "_low", "_high"))
    return f"{share} ({low}-{high})"


def percent(fraction: Any) -> str:
    """Write a share in percent, without the sign."""
    return f"{100 * float(fraction):.3g}"
