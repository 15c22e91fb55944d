"""Pairs of samples: the source, which is run and edited, and the target, written into it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..data import Samples

_COLUMNS = ("source", "target")


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of some samples, by their rows in the samples' table."""

    samples: Samples
    source: NDArray[np.int64]
    """[n]"""
    target: NDArray[np.int64]
    """[n]"""

    @classmethod
    def of(cls, pairs: pd.DataFrame | str | Path, samples: Samples) -> Pairs:
        """Find the samples that pairs name.

        Parameters
        ----------
        pairs
            Columns `source` and `target`, ids of samples; or the path of a CSV with them.
        samples
            With those ids.

        Raises
        ------
        FileNotFoundError
            When there is no such CSV.
        ValueError
            When the file is no CSV, a column is missing, there is no pair, or a pair names an
            unknown sample.
        """
        where = "pairs" if isinstance(pairs, pd.DataFrame) else str(pairs)
        table = pairs if isinstance(pairs, pd.DataFrame) else _read(pairs)
        missing = [name for name in _COLUMNS if name not in table]
        if missing:
            has = ", ".join(map(str, table.columns))
            raise ValueError(f"{where} has no column {missing[0]!r}; it has {has}")
        if table.empty:
            raise ValueError(f"{where} has no pair: give a row for each, source and target")
        ids = pd.Index(samples.table["id"].astype(str))
        source, target = (ids.get_indexer(table[name].astype(str)) for name in _COLUMNS)
        for name, found in zip(_COLUMNS, (source, target), strict=True):
            for row in np.flatnonzero(found < 0)[:1]:
                if not str(table[name].iloc[row]):
                    raise ValueError(f"{where}, row {row}: no {name} is given")
                msg = (
                    f"{where}, row {row}: {samples.source} has no sample {table[name].iloc[row]!r}"
                )
                raise ValueError(f"{msg}, the {name}")
        return cls(samples, source.astype(np.int64), target.astype(np.int64))

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.source)

    def of_both(self, column: str) -> tuple[list[Any], list[Any]]:
        """Return what a column of the samples says of the sources and of the targets.

        Raises
        ------
        ValueError
            When there is no such column, or no value for a sample of a pair.
        """
        table = self.samples.table
        if column not in table:
            has = ", ".join(map(str, table.columns))
            raise ValueError(f"{self.samples.source} has no column {column!r}; it has {has}")
        values = table[column]
        for row in np.concatenate([self.source, self.target]):
            if pd.isna(values.iloc[row]) or not str(values.iloc[row]).strip():
                msg = f"{self.samples.where(row)} has no {column}, and a pair names it"
                raise ValueError(f"{msg}: fill it in, or leave the pair out")
        return values.iloc[self.source].tolist(), values.iloc[self.target].tolist()

    def inputs(self) -> tuple[list[Any], list[Any]]:
        """Read the inputs of sources and of targets; what is in several pairs is one object."""
        read: dict[int, Any] = {}
        for row in (*self.source.tolist(), *self.target.tolist()):
            if row not in read:
                read[row] = self.samples.load(row)
        return [read[r] for r in self.source.tolist()], [read[r] for r in self.target.tolist()]


def _read(path: str | Path) -> pd.DataFrame:
    """Read pairs as text; `NA` is an id."""
    if not Path(path).expanduser().is_file():
        raise FileNotFoundError(f"there is no file of pairs {path}")
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False)
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no CSV with source and target: {error}") from error
