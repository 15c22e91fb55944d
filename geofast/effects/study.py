"""The swap experiment of the study as its code has it, faults included.

Locatelli et al., Textual Supervision Enhances Geospatial Representations in Vision-Language Models
(ICML 2026; arXiv 2606.07172). Its judge looks for names as lower-case substrings, so that "oman"
is found in "romantic", and a place whose list of aliases ends in a separator has an empty alias,
which every text contains. `geofast.geo.gazetteer.named` is the corrected judge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import pandas as pd

SCORES = ("study_stability", "study_efficacy", "study_success", "study_known")
ALIASES = "alternate_names"
WHERE = ("city", "region", "country")
SEPARATOR = ";"


class Options(TypedDict):
    """Arguments of `steer`."""

    site: str
    shares: tuple[float, ...]
    mode: str
    role: str
    phase: str
    ranking: str
    controls: tuple[str, ...]
    max_new_tokens: int
    seed: int
    protocol: str


SWAP: Options = {
    "site": "lm.layers.0",
    "shares": tuple(i / 10 for i in range(11)),
    "mode": "swap",
    "role": "last",
    "phase": "both",
    "ranking": "coef",
    "controls": ("random dims",),
    "max_new_tokens": 100,
    "seed": 42,
    "protocol": "study",
}
"""The study's swap as arguments of `steer`: the residual after the first block of the language
model, at the last token of the prompt and of every step, the target's own state at that step;
dimensions by the sum of both targets' |coef|, each scaled to 0 to 1; beside it the first of one
fixed permutation. The study samples at temperature 1e-4, which is greedy but for ties."""


@dataclass(frozen=True)
class Spot:
    """What the study looks for in a text."""

    names: tuple[str, ...]
    """The place's name and its aliases, as the table separates them."""
    where: tuple[str, ...]
    """Its city, region and country, those that the table has."""

    @classmethod
    def of(cls, row: Mapping[str, Any], columns: Mapping[str, str]) -> Spot:
        """Read a row of a table of samples.

        Parameters
        ----------
        row
            Columns `alternate_names` (aliases between semicolons), `city`, `region` and `country`
            are read where they are.
        columns
            By `place`, `region` and `country`, columns of other names.
        """
        names = _texts(row, [columns.get("place", "name")])
        for aliases in _texts(row, [ALIASES]):
            # "A;" has the alias "", and every text contains it: the study's fault, kept.
            names += aliases.split(SEPARATOR)
        where = _texts(row, [columns.get(name, name) for name in WHERE])
        return cls(tuple(names), tuple(where))


def stability(text: str, spot: Spot) -> bool:
    """Tell whether a text has the place's name, or an alias of it, in any letter case."""
    return _has(text, spot.names)


def efficacy(text: str, spot: Spot) -> bool:
    """Tell whether a text has the place's city, region or country, in any letter case."""
    return _has(text, spot.where)


def known(text: str, spot: Spot) -> bool:
    """Tell whether the answer about a place names it and where it is; the study keeps those."""
    return stability(text, spot) and efficacy(text, spot)


def scores(answer: str, source: Spot, target: Spot) -> dict[str, bool]:
    """Score an edited answer.

    Parameters
    ----------
    answer
        Of the source under the edit.
    source, target
        The pair's places.

    Returns
    -------
    dict
        `study_stability`: it names the source's place; `study_efficacy`: it names the target's
        city, region or country; `study_success`: both.
    """
    stays, moves = stability(answer, source), efficacy(answer, target)
    return {
        "study_stability": stays, "study_efficacy": moves, "study_success": stays and moves,
    }  # fmt: skip


def _has(text: str, names: Sequence[str]) -> bool:
    low = text.lower()
    return any(name.lower() in low for name in names)


def _texts(row: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    found = [row.get(column) for column in columns]
    return [str(value) for value in found if not (value is None or pd.isna(value) or value == "")]
