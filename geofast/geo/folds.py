"""Splits of geotagged samples into folds.

A split has a `name`, which goes into tables, and `assign(table)`, which gives every sample the
number of the one fold that tests it. Random folds say how well a place is read from features that
have seen its neighbours; blocks and groups keep neighbours and countries out of training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd


@runtime_checkable
class Split(Protocol):
    """What every split offers."""

    @property
    def name(self) -> str:
        """Name of the split in tables, `kfold`, `blocks15`, `group:country` and the like."""

    def assign(self, table: pd.DataFrame) -> NDArray[np.int64]:
        """Fold number [n] of every sample of `table`, from 0."""


@dataclass(frozen=True)
class KFold:
    """Random folds, those of scikit-learn's `KFold(folds, shuffle=True, random_state=seed)`.

    Parameters
    ----------
    folds : int
        Number of folds, at least 2.
    seed : int
        Seed of the shuffle.
    """

    folds: int = 5
    seed: int = 42

    def __post_init__(self) -> None:
        _check_folds(self.folds)

    @property
    def name(self) -> str:
        """Name in tables: `kfold`."""
        return "kfold"

    def assign(self, table: pd.DataFrame) -> NDArray[np.int64]:
        """Fold number [n] of every sample.

        Raises
        ------
        ValueError
            When there are fewer samples than folds.
        """
        n = len(table)
        _check_samples(n, self.folds)
        order = np.arange(n)
        # The legacy generator is what scikit-learn shuffles with, and its stream never changes.
        np.random.RandomState(self.seed).shuffle(order)
        fold = np.empty(n, dtype=np.int64)
        for number, part in enumerate(np.array_split(order, self.folds)):
            fold[part] = number
        return fold


@dataclass(frozen=True)
class Blocks:
    """Spatial folds: square cells of latitude and longitude, each wholly in one fold.

    Cells start at 90 S, 180 W. They are square in degrees, so narrower in kilometres towards the
    poles. Folds are balanced in the number of samples.

    Parameters
    ----------
    degrees : float
        Side of a cell, above 0 and at most 90.
    folds : int
        Number of folds, at least 2.
    seed : int
        Seed of the order in which cells of equal size are dealt out.
    """

    degrees: float = 15
    folds: int = 5
    seed: int = 42

    def __post_init__(self) -> None:
        _check_folds(self.folds)
        if not 0 < self.degrees <= 90:
            msg = f"blocks need a side above 0 and at most 90 degrees, got {self.degrees}."
            raise ValueError(msg)

    @property
    def name(self) -> str:
        """Name in tables: `blocks15`."""
        return f"blocks{self.degrees:g}"

    def assign(self, table: pd.DataFrame) -> NDArray[np.int64]:
        """Fold number [n] of every sample, from its `latitude` and `longitude`.

        Raises
        ------
        ValueError
            When there are fewer samples, or fewer occupied cells, than folds.
        """
        latitude = _column(table, "latitude").to_numpy(dtype=np.float64)
        longitude = _column(table, "longitude").to_numpy(dtype=np.float64)
        _check_samples(len(table), self.folds)
        rows = int(np.ceil(180 / self.degrees))
        columns = int(np.ceil(360 / self.degrees))
        row = np.minimum((latitude + 90) // self.degrees, rows - 1)  # the north pole has no row
        column = ((longitude + 180) % 360) // self.degrees  # 180 E is 180 W
        _, cell = np.unique(row * columns + column, return_inverse=True)
        advice = "take smaller cells or fewer folds"
        return _deal(cell, self.folds, self.seed, f"cells of {self.degrees:g} degrees", advice)


@dataclass(frozen=True)
class GroupKFold:
    """Folds that keep groups together: countries, clusters, photographers.

    Folds are balanced in the number of samples.

    Parameters
    ----------
    column : str
        Column of the table of samples that names the group.
    folds : int
        Number of folds, at least 2.
    seed : int
        Seed of the order in which groups of equal size are dealt out.
    """

    column: str
    folds: int = 5
    seed: int = 42

    def __post_init__(self) -> None:
        _check_folds(self.folds)

    @property
    def name(self) -> str:
        """Name in tables: `group:country`."""
        return f"group:{self.column}"

    def assign(self, table: pd.DataFrame) -> NDArray[np.int64]:
        """Fold number [n] of every sample.

        Raises
        ------
        ValueError
            When the column is missing or has empty values, or when there are fewer samples, or
            fewer groups, than folds.
        """
        values = _column(table, self.column)
        _check_filled(table, values)
        _check_samples(len(table), self.folds)
        _, group = np.unique(values.astype(str).to_numpy(dtype=str), return_inverse=True)
        advice = "take fewer folds or another column"
        return _deal(group, self.folds, self.seed, f"groups in column {self.column!r}", advice)


@dataclass(frozen=True)
class SklearnSplit:
    """A scikit-learn splitter whose test folds hold every sample once. Made by `as_split`."""

    splitter: Any
    label: str
    groups: str | None = None

    @property
    def name(self) -> str:
        """Name in tables: the one given, or the splitter's class in lower case."""
        return self.label

    def assign(self, table: pd.DataFrame) -> NDArray[np.int64]:
        """Fold number [n] of every sample.

        Raises
        ------
        ValueError
            When the splitter refuses the samples, or its test folds leave a sample out or hold
            one twice.
        """
        n = len(table)
        kind = type(self.splitter).__name__
        groups = None if self.groups is None else _column(table, self.groups).to_numpy()
        try:
            tests = [test for _, test in self.splitter.split(np.zeros((n, 1)), None, groups)]
        except (ValueError, TypeError) as err:
            msg = f"{kind} could not split the {n} samples: {err}"
            if groups is None and "groups" in str(err):
                msg += " Write geofast's GroupKFold(column), which takes them from the samples."
            raise ValueError(msg) from err
        count = np.bincount(np.concatenate([*tests, np.empty(0, np.int64)]), minlength=n)
        if len(tests) < 2 or (count != 1).any():
            msg = (
                f"{kind} makes {len(tests)} test folds that leave out {int((count == 0).sum())} "
                f"and repeat {int((count > 1).sum())} of the {n} samples; take a splitter "
                "that tests every sample once, such as KFold or GroupKFold."
            )
            raise ValueError(msg)
        fold = np.empty(n, dtype=np.int64)
        for number, test in enumerate(tests):
            fold[test] = number
        return fold


def as_split(obj: Any, name: str | None = None, *, groups: str | None = None) -> Split:
    """Take a split of this module, its text form, or a scikit-learn splitter.

    Parameters
    ----------
    obj : Split, str or splitter
        A string goes through `parse_split`. A splitter is anything with scikit-learn's
        `split(X, y, groups)` whose test folds hold every sample once; that is checked by
        `assign`, when the samples are known.
    name : str, optional
        Name of a scikit-learn splitter in tables; its class in lower case by default.
    groups : str, optional
        Column of the table that is given to a scikit-learn splitter as `groups`.

    Returns
    -------
    Split

    Raises
    ------
    TypeError
        For anything else, with what can be passed.
    """
    if isinstance(obj, str):
        return parse_split(obj)
    if not isinstance(obj, type):
        if isinstance(obj, Split):
            return obj
        if callable(getattr(obj, "split", None)):
            return SklearnSplit(obj, name or type(obj).__name__.lower(), groups)
    msg = (
        f"a split is one of geofast's (KFold, Blocks, GroupKFold), a text such as 'blocks:15', "
        f"or an instance of a scikit-learn splitter, got {obj!r}."
    )
    raise TypeError(msg)


def parse_split(text: str, folds: int = 5, seed: int = 42) -> Split:
    """Read a split as it is written on the command line.

    Parameters
    ----------
    text : str
        `kfold`, `kfold:10` (ten folds), `blocks`, `blocks:15` (cells of 15 degrees) or
        `group:country` (a column).
    folds, seed : int
        Number of folds where the text does not give it, and the seed.

    Returns
    -------
    Split

    Raises
    ------
    ValueError
        When the text is none of these.
    """
    if folds < 2:
        raise ValueError(f"a split needs at least 2 folds, got {folds}: write folds=5 (--folds 5)")
    kind, _, value = text.partition(":")
    if kind == "group" and value:
        return GroupKFold(value, folds, seed)
    kinds: dict[str, Callable[[str], float]] = {"kfold": int, "blocks": float}
    try:
        number = kinds[kind](value) if value else {"kfold": folds, "blocks": 15}[kind]
    except (KeyError, ValueError) as err:
        msg = (
            f"cannot read the split {text!r}; write kfold, kfold:10 (folds), blocks:15 (degrees) "
            "or group:COLUMN."
        )
        raise ValueError(msg) from err
    try:
        return KFold(int(number), seed) if kind == "kfold" else Blocks(number, folds, seed)
    except ValueError as err:
        msg = f"cannot read the split {text!r}: {err}"
        raise ValueError(msg) from err


def _check_folds(folds: int) -> None:
    if folds < 2:
        msg = f"a split needs at least 2 folds, got {folds}."
        raise ValueError(msg)


def _check_samples(n: int, folds: int) -> None:
    if n < folds:
        msg = f"{n} samples cannot fill {folds} folds; take fewer folds or more samples."
        raise ValueError(msg)


def _column(table: pd.DataFrame, name: str) -> pd.Series[Any]:
    if name not in table.columns:
        columns = ", ".join(map(str, table.columns))
        msg = f"the samples have no column {name!r} to split by; their columns are: {columns}."
        raise ValueError(msg)
    return table[name]


def _check_filled(table: pd.DataFrame, values: pd.Series[Any]) -> None:
    missing = np.flatnonzero(values.isna().to_numpy())
    if missing.size:
        first = table["id"].iloc[missing[0]] if "id" in table.columns else missing[0]
        msg = (
            f"{missing.size} samples have no value in column {values.name!r} (the first is "
            f"{first}); fill it or drop them before splitting by it."
        )
        raise ValueError(msg)


def _deal(
    group: NDArray[np.int64], folds: int, seed: int, what: str, advice: str
) -> NDArray[np.int64]:
    """Give whole groups to folds, the largest first, each to the fold with the fewest samples."""
    sizes = np.bincount(group)
    if len(sizes) < folds:
        msg = f"{len(sizes)} {what} cannot fill {folds} folds; {advice}."
        raise ValueError(msg)
    order = np.random.RandomState(seed).permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    fold_of_group = np.empty(len(sizes), dtype=np.int64)
    load = np.zeros(folds, dtype=np.int64)
    for number in order:
        emptiest = int(load.argmin())
        fold_of_group[number] = emptiest
        load[emptiest] += sizes[number]
    return fold_of_group[group]
