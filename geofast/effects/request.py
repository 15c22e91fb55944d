"""What is asked of an experiment with edits, read and checked before a model is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch

from ..data import Samples
from ..geo.gazetteer import LEVELS
from ..steering.edit import EDIT_ROLES
from .arms import CONTROLS, MODES, Index, distinct
from .pairs import Pairs

Keep = Literal["known", "all"]
Protocol = Literal["corrected", "study"]

_COLUMNS = {"place": ("place", "name", "city")}  # where no names= says which


@dataclass(frozen=True, eq=False)
class Request:
    """An experiment, read and checked as far as that goes without the model."""

    samples: Samples
    pairs: Pairs
    rows: Index
    """Of the samples' table: the distinct samples of the pairs."""
    sources: Index
    """Of each pair, the number of its source in `rows`."""
    targets: Index
    shares: tuple[float, ...]
    mode: str
    controls: tuple[str, ...]
    names: Mapping[str, str]
    """By level, a column."""
    max_new_tokens: int
    keep: str
    protocol: str

    @classmethod
    def of(
        cls,
        samples: Samples,
        pairs: pd.DataFrame | str | Path,
        *,
        shares: Sequence[float],
        mode: str,
        role: str | None,
        controls: Sequence[str],
        names: Mapping[str, str] | None,
        max_new_tokens: int,
        keep: str,
        protocol: str,
    ) -> Request:
        """Read the pairs and check the arguments."""
        _require("mode", mode, MODES, "; add is the control 'mean difference'" * (mode == "add"))
        _require("keep", keep, get_args(Keep))
        _require("protocol", protocol, get_args(Protocol))
        if role is not None:
            _require("role", role, EDIT_ROLES)
        controls = [controls] if isinstance(controls, str) else list(controls)
        for control in controls:
            _require("controls", control, CONTROLS)
        parts = [float(share) for share in ([1.0] if mode == "patch" else shares)]
        if not parts or not all(0 <= share <= 1 for share in parts) or len({*parts}) < len(parts):
            raise ValueError(f"shares must be 0 to 1, each once; got {parts}")
        found = _pairs(pairs, samples)
        rows, back = distinct(np.concatenate([found.source, found.target]))
        _check_places(samples, rows)
        columns = _columns(samples, names)
        for column in columns.values():
            if not _has_words(told := samples.table[column].iloc[rows]):
                bad = next(value for value in told.dropna() if not isinstance(value, str))
                raise ValueError(f"a name must be text; column {column!r} has {bad!r}")
        if keep == "known" and not columns:
            raise ValueError(
                "keep='known' asks whether answers name the places: say which columns have the "
                "names (names={'country': 'country'}), or keep='all'"
            )
        return cls(
            samples, found, rows, back[: len(found)], back[len(found) :], tuple(parts), mode,
            tuple(dict.fromkeys(controls)), columns, max_new_tokens, keep, protocol,
        )  # fmt: skip

    @property
    def ids(self) -> Any:
        """Of all samples, in the order of the table."""
        return self.samples.table["id"].astype(str).to_numpy()

    @property
    def level(self) -> str:
        """The level whose name counts: the country, or else the first there is; "" for none."""
        here = [level for level in LEVELS if level in self.names]
        return "country" if "country" in here else next(iter(here), "")

    @property
    def places(self) -> torch.Tensor:
        """Latitude and longitude of the distinct samples, float64 [distinct, 2]."""
        table = self.samples.table.iloc[self.rows]
        return torch.from_numpy(table[["latitude", "longitude"]].to_numpy("float64", copy=True))

    def values(self, number: int) -> dict[str, str]:
        """What the columns say of a distinct sample, by level; missing values are left out."""
        row = self.samples.table.iloc[int(self.rows[number])]
        found = {level: row[column] for level, column in self.names.items()}
        return {k: str(v) for k, v in found.items() if not pd.isna(v) and str(v).strip()}

    def where(self, number: int) -> str:
        """Name a distinct sample for people."""
        return self.samples.where(int(self.rows[number]))


def _require(name: str, value: str, allowed: Sequence[str], more: str = "") -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}{more}")


def _pairs(pairs: pd.DataFrame | str | Path, samples: Samples) -> Pairs:
    ids = samples.table["id"].astype(str)
    if ids.duplicated().any():
        twice = ids[ids.duplicated()].iloc[0]
        raise ValueError(f"{samples.source} has two samples with the id {twice!r}")
    found = Pairs.of(pairs, samples)
    for row in np.flatnonzero(found.source == found.target)[:1].tolist():
        raise ValueError(f"the pair of {ids.iloc[found.source[row]]!r} is of one sample: name two")
    times = Counter(zip(found.source.tolist(), found.target.tolist(), strict=True))
    (source, target), most = times.most_common(1)[0]
    if most > 1:
        raise ValueError(f"the pair of {ids.iloc[source]!r} and {ids.iloc[target]!r} comes twice")
    return found


def _check_places(samples: Samples, rows: Index) -> None:
    for name, most in (("latitude", 90), ("longitude", 180)):
        values = samples.table[name].to_numpy("float64")[rows]
        for bad in np.flatnonzero(~(np.abs(values) <= most))[:1]:
            msg = f"{samples.where(int(rows[bad]))}: {name} {values[bad]} is off the sphere"
            raise ValueError(f"{msg}: -{most} to {most} degrees")


def _has_words(column: pd.Series[Any]) -> bool:
    return all(isinstance(value, str) for value in column.dropna())


def _columns(samples: Samples, names: Mapping[str, str] | None) -> dict[str, str]:
    table = samples.table
    if names is None:
        words = [column for column in table if _has_words(table[column])]
        guessed = {
            level: [c for c in _COLUMNS.get(level, (level,)) if c in words] for level in LEVELS
        }
        return {level: columns[0] for level, columns in guessed.items() if columns}
    for level, column in names.items():
        _require("a level of names", level, LEVELS)
        if column not in table:
            has = ", ".join(map(str, table.columns))
            raise ValueError(f"{samples.source} has no column {column!r}; it has {has}")
    return {level: names[level] for level in LEVELS if level in names}
