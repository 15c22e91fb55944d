"""Makes the tables of an experiment of what was measured: a row per pair, arm and share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..geo import error_km
from ..geo.gazetteer import LEVELS, Gazetteer
from . import study, words
from .arms import Arms, Index
from .measuring import Measured
from .names import Names
from .request import Request


def table_of_pairs(
    asked: Request,
    arms: Arms,
    kept: Index,
    known: Names,
    measured: Measured,
    answers: Sequence[str],
) -> pd.DataFrame:
    """Make `Steered.pairs`: a row per pair, arm and share."""
    ids, degrees = asked.ids[asked.rows], asked.places.numpy()
    sources, targets = arms.place.sources[kept], arms.place.targets[kept]
    numbers = {name: measured.of(name) for name in ("log_odds", "kl", "perplexity")}
    reading = measured.of("reading")
    last = reading[:, :, -1] if reading.shape[2] else np.full((*reading.shape[:2], 2), np.nan)
    numbers["km"] = _away(last, degrees[targets])
    judge = _Judge(asked, known, answers)
    rows = []
    for arm, share, number in arms.table:
        for i, (s, t) in enumerate(zip(sources.tolist(), targets.tolist(), strict=True)):
            answer = measured.answers[number][i]
            row = {"source": ids[s], "target": ids[t], "arm": arm, "share": share, "answer": answer}
            row |= judge(s, t, answer, measured.answers[0][i])
            row |= {name: values[number, i] for name, values in numbers.items()}
            row |= {"source_latitude": degrees[s, 0], "source_longitude": degrees[s, 1]}
            row |= {"target_latitude": degrees[t, 0], "target_longitude": degrees[t, 1]}
            row |= {"reading_latitude": last[number, i, 0]}
            row |= {"reading_longitude": last[number, i, 1]}
            rows.append(row)
    table = pd.DataFrame(rows)
    levels = [level for level in LEVELS if level in asked.names]
    said = [f"{side}_{level}" for side in ("to", "own") for level in levels]
    truths = [*said, "moved", "kept", *(score for score in study.SCORES if score in table)]
    table = table.astype(dict.fromkeys(truths, "boolean"))
    first = ["source", "target", "arm", "share", "answer", *said, "moved", "kept"]
    measures = ["log_odds", "km", "kl", "perplexity", "repetition", "stability"]
    return table[[*first, *measures, *(c for c in table if c not in {*first, *measures})]]


def table_of_readings(
    asked: Request, arms: Arms, kept: Index, sites: Sequence[str], measured: Measured
) -> pd.DataFrame:
    """Say how far from the target every later probe reads: a row per arm, site and pair."""
    ids = asked.ids[asked.rows]
    sources, targets = arms.place.sources[kept], arms.place.targets[kept]
    km = _away(measured.of("reading"), asked.places.numpy()[targets][:, None])
    return pd.DataFrame(
        [
            {"source": s, "target": t, "arm": arm, "share": share, "site": site, "km": away}
            for arm, share, number in arms.table
            for i, site in enumerate(sites)
            for s, t, away in zip(ids[sources], ids[targets], km[number, :, i], strict=True)
        ]
    )


def _away(reading: NDArray[np.float64], degrees: NDArray[np.float64]) -> NDArray[np.float64]:
    """Kilometres from places [..., 2] to readings [..., 2]."""
    return error_km(degrees[..., 0], degrees[..., 1], reading[..., 0], reading[..., 1])


_NO_NAMES = Gazetteer([])


class _Judge:
    """Reads answers, each once."""

    def __init__(self, asked: Request, known: Names, answers: Sequence[str]) -> None:
        self._asked, self._known = asked, known
        self._seen: dict[tuple[int, int, str, str], dict[str, Any]] = {}
        self._spots: list[study.Spot] = []
        self._right: list[bool] = []
        if asked.protocol == "study":
            self._spots = [known.spot(asked, i) for i in range(len(asked.rows))]
            self._right = known.by_study(asked, answers)

    def __call__(self, source: int, target: int, answer: str, unedited: str) -> dict[str, Any]:
        """Score an answer about a source, beside the unedited one."""
        one = (source, target, answer, unedited)
        if one not in self._seen:
            self._seen[one] = self._score(*one)
        return self._seen[one]

    def _score(self, source: int, target: int, answer: str, unedited: str) -> dict[str, Any]:
        levels = [level for level in LEVELS if level in self._asked.names]
        to = self._known.says(answer, target, source, source)
        own = self._known.says(answer, source, target, source)
        row: dict[str, Any] = {f"to_{level}": _truth(to.get(level)) for level in levels}
        row |= {f"own_{level}": _truth(own.get(level)) for level in levels}
        row |= {"moved": _any(to.values()), "kept": _any(own.values())}
        row |= {
            "repetition": words.repetition(answer),
            "stability": words.stability(unedited, answer, self._known.gazetteer or _NO_NAMES),
        }
        if self._spots:
            row |= study.scores(answer, self._spots[source], self._spots[target])
            row["study_known"] = self._right[source] and self._right[target]
        return row


def _truth(value: bool | None) -> Any:
    return pd.NA if value is None else value


def _any(values: Iterable[bool | None]) -> Any:
    """Whether one is true; missing where all are."""
    there = [value for value in values if value is not None]
    return any(there) if there else pd.NA
