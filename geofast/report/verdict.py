"""Which targets a model reads, in words: true for any numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from .numbers import number, with_error


@dataclass(frozen=True)
class Score:
    """The R2 of a target, and its standard error; 0 where that is not known."""

    r2: float
    se: float = 0.0

    def above(self, other: Score) -> bool:
        """Tell whether it is higher by more than 1.96 standard errors of the difference."""
        return self.r2 - other.r2 > 1.96 * math.hypot(self.se, other.se)


NOTHING = Score(0.0)
Scores = Mapping[str, Score]


def score(r2: Any, se: Any) -> Score:
    """Return a score of a table's numbers; an error may be missing."""
    return Score(float(r2), 0.0 if se is None or pd.isna(se) else float(se))


def denied(claimed: Scores, honest: Scores) -> bool:
    """Tell whether something that one layer reads is not read by the layer chosen honestly.

    A run of before R2 was kept by target has one honest score, of no target in particular.
    """
    read = {t for t, s in claimed.items() if s.above(NOTHING)}
    doubted = {t for t, s in honest.items() if not s.above(NOTHING)}
    return bool(read & doubted or (read and doubted - claimed.keys()))


def reads(scores: Scores, twin: Scores, where: str) -> str:
    """Say which of the targets are read at all, and more than by a twin with random weights.

    Parameters
    ----------
    scores
        By target.
    twin
        The same of the twin; empty without one.
    where
        What is said of the place, in parentheses.
    """
    order = sorted(scores, key=lambda t: scores[t].r2, reverse=True)
    read = [t for t in order if scores[t].above(NOTHING)]
    more = [t for t in read if t not in twin or scores[t].above(twin[t])]
    if not read:
        return _reads_nothing(scores, order, where)
    if twin and len(more) < len(read):
        said = _reads_like_twin(scores, twin, order, read, more)
    elif len(order) > 2:
        said = _reads_many(scores, order, read)
    else:
        said = _reads_one_or_two(scores, order, read)
    return f"{said} ({where})"


def _reads_nothing(scores: Scores, order: Sequence[str], where: str) -> str:
    high, low = order[0], order[-1]
    best, worst = (with_error(s.r2, s.se or None) for s in (scores[high], scores[low]))
    if len(order) == 1:
        return f"does not read {high}: R² {best} ({where})"
    told = f"R²: {high} {best}, {low} {worst}"
    if len(order) > 2:
        return f"reads none of {len(order)} targets ({told}, {_mean(scores)} on average; {where})"
    return f"reads neither {high} nor {low} ({told}; {where})"


def _reads_one_or_two(scores: Scores, order: Sequence[str], read: Sequence[str]) -> str:
    first, *others = [*read, *(t for t in order if t not in read)]
    r2, *less = (number(scores[t].r2) for t in (first, *others))
    if not others:
        return f"reads {first}: R² {r2}"
    if len(read) == 1:
        return f"reads {first} but not {others[0]}: R² {r2} against {less[0]}"
    if scores[first].above(scores[others[0]]):
        return f"reads {first} better than {others[0]}: R² {r2} against {less[0]}"
    return f"reads {first} and {others[0]}, neither clearly better: R² {r2} and {less[0]}"


def _reads_many(scores: Scores, order: Sequence[str], read: Sequence[str]) -> str:
    high, low = read[0], order[-1]
    some = "" if len(read) == len(order) else f"{len(read)} of {len(order)} targets, "
    numbers = f"R² {number(scores[high].r2)} against {number(scores[low].r2)}"
    return f"reads {some}{high} best and {low} worst: {numbers}, {_mean(scores)} on average"


def _reads_like_twin(
    scores: Scores, twin: Scores, order: Sequence[str], read: Sequence[str], more: Sequence[str]
) -> str:
    """Say what is read no more than by the twin, which is something."""
    like = [t for t in read if t not in more]
    no = all(round(scores[t].r2, 3) <= round(twin[t].r2, 3) for t in like)
    degree = "no more" if no else "not clearly more"
    if len(order) > 2:
        high = read[0]
        than = f"R² of {high} {number(scores[high].r2)} against {number(twin[high].r2)}"
        many = f"reads {len(more) or 'none'} of {len(order)} targets clearly more"
        return (
            f"{many} than its random twin: {than}, {_mean(scores)} against {_mean(twin)} on average"
        )
    against = ", ".join(
        f"{number(scores[t].r2)} against {number(twin[t].r2)}" for t in [*more, *like]
    )
    if more:
        return f"reads {more[0]} more than its random twin, {like[0]} {degree}: R² {against}"
    rest = "".join(f", and not {t}" for t in order if t not in read)
    return f"reads {' and '.join(like)} {degree} than its random twin{rest}: R² {against}"


def _mean(scores: Scores) -> str:
    return number(sum(s.r2 for s in scores.values()) / len(scores))
