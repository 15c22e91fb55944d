"""An experiment with edits in words and plain tables: the finding, effect and damage, examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..effects.intervals import mcnemar
from ..effects.study import SCORES
from .numbers import km, number
from .text import Table, clip_label, data_name, model_name, one_line

if TYPE_CHECKING:
    from ..effects.outcome import Steered

UNEDITED = "none"
EDIT = "edit"
CONTROL_WORDS = {
    "random dims": "the same edit in as many random dimensions",
    "random direction": "a random direction in all dimensions, as long as the edit's change",
    "shuffled labels": "the same edit in dimensions that a probe of shuffled places ranks first",
    "mean difference": "the mean state of samples near the target less that of samples near the "
    "source, added in all dimensions, whatever the share",
}
LEVELS = ("place", "region", "country", "continent")
EXAMPLES = 6
_ANSWER = 280  # characters of an answer that an example shows
_LEVEL = 0.05  # of tests
_ALONE = ("km", "kl", "perplexity", "repetition", "stability")  # no interval in a terminal
_SITES = 8  # rows of readings in a terminal
_NAME = 24  # characters of a site there
_Columns = Mapping[str, tuple[str, Callable[[Any], str]]]
_MODES = {
    "swap": "With {share} of the dimensions of {site} swapped",
    "set": "With the reading at {site} set to the target in {share} of the dimensions",
    "patch": "With the state at {site} patched",
}


# ---------------------------------------------------------------- what there is


def shares(steered: Steered) -> list[float]:
    """All shares of dimensions that were edited."""
    table = steered.summary
    return sorted(float(s) for s in table["share"][table["arm"] == EDIT].unique())


def controls(steered: Steered, share: float | None = None) -> list[str]:
    """Names of the controls, of one share or of any."""
    table = steered.summary
    arms = table["arm"] if share is None else table["arm"][table["share"] == share]
    return [a for a in dict.fromkeys(arms) if a not in (UNEDITED, EDIT)]


def arm_words(arm: str) -> str:
    """Name an arm as tables and legends do."""
    return "unedited" if arm == UNEDITED else arm


def has(steered: Steered, measure: str) -> bool:
    """Tell whether a measure was taken of the edit."""
    table = steered.summary
    return measure in table.columns and bool(table[measure][table["arm"] == EDIT].notna().any())


def row_of(steered: Steered, arm: str, share: float) -> Mapping[str, Any]:
    """Return the row of an arm at a share; the unedited model has one for all. Empty without."""
    table = steered.summary[steered.summary["arm"] == arm]
    if arm != UNEDITED:
        table = table[table["share"] == share]
    return {} if table.empty else table.iloc[0].to_dict()


def shown_share(steered: Steered) -> float:
    """Return the share that the finding, the examples and the map are of: the first one asked for.

    So nothing that these pairs say has chosen it.
    """
    asked = [float(share) for share in steered.info["shares"]]
    return next((share for share in asked if share > 0), asked[0])


def shown_control(steered: Steered) -> str | None:
    """The control beside the edit in examples and on the map: the first one at the share shown."""
    return next(iter(controls(steered, shown_share(steered))), None)


def readings_of(steered: Steered, arm: str, share: float) -> pd.DataFrame:
    """What is read at every later site, its index, under an arm at a share."""
    table = steered.readings[steered.readings["arm"] == arm]
    return (table if arm == UNEDITED else table[table["share"] == share]).set_index("site")


def has_readings(steered: Steered) -> bool:
    """Tell whether several later sites were read; of a single one all tables have the km."""
    read = readings_of(steered, EDIT, shown_share(steered))["km"]
    return int(read.notna().sum()) > 1


def tested(steered: Steered) -> bool:
    """Tell whether anything was tested against random dimensions."""
    return bool(steered.summary.filter(regex="_p$").notna().any(axis=None))


def fitted(steered: Steered) -> list[str]:
    """Say how many of the pairs' samples the run's probes were fitted to."""
    count, every = steered.info.get("fitted", 0), len(steered.info.get("samples", {}))
    if not count:
        return []
    return [
        f"The run's probes were fitted to {count:,} of these {every:,} samples: of those they read "
        "places better than of others, and dimensions are ranked by them."
    ]


def left_out(steered: Steered) -> list[str]:
    """Which pairs and controls are not there, and why, in sentences."""
    info = steered.info
    said = [
        f"{n:,} pair{'s' * (n > 1)} left out: {why}."
        for why, n in info["pairs"]["left_out"].items()
    ]
    said += [f"No control {name!r}: {why}." for name, why in info["left_out"].items()]
    for share in shares(steered):
        said += [
            f"No control {name!r} at a share of {share_words(share)}: there it is the edit itself."
            for name in info["controls"]
            if name not in controls(steered, share)
        ]
    return said


def share_words(share: float) -> str:
    """Write a share as a percentage."""
    return f"{100 * share:.4g} %"


def headline(steered: Steered) -> str:
    """One line: which edit of which model, and on how many pairs."""
    info = steered.info
    pairs = len(steered.pairs[["source", "target"]].drop_duplicates())
    what = f"{info['mode'].capitalize()} at {info['site']} of {model_name(steered)}"
    return f"{what}: {pairs:,} pairs of {Path(data_name(steered)).name}"


# ---------------------------------------------------------------- the finding


def finding(steered: Steered) -> list[str]:
    """Say what the edit did beside its controls, in sentences; the first one is the title.

    Of the first share asked for. It is said to move answers more than a control does where
    McNemar's exact test of the same pairs says so, at .05.
    """
    share = shown_share(steered)
    said = [_named(steered, share)] if has(steered, "moved") else []
    said += [_odds(steered, share)] if has(steered, "log_odds") else []
    said += [_read(steered, share)] if has(steered, "km") else []
    said += [_damage(steered, share)] if has(steered, "kl") else []
    return said or ["Nothing was measured of these answers."]


def _named(steered: Steered, share: float) -> str:
    row, names = row_of(steered, EDIT, share), model_name(steered)
    n = int(_judged(steered, EDIT, share).notna().sum())
    low, high = (_percent_alone(row.get(f"moved_{end}")) for end in ("low", "high"))
    ends = f"95 % interval {low} to {high}"
    doing = _doing(steered, share)
    if not row["moved"]:
        said = f"{doing}, {names} never names the target's place "
        said += f"({n} answer{'s' * (n > 1)}, {ends} %)"
    else:
        rate = f"{_percent(row['moved'])} of {n} answer{'s' * (n > 1)} ({ends})"
        said = f"{doing}, {names} names the target's place in {rate}"
    return f"{said}{_against(steered, share)}."


def _doing(steered: Steered, share: float) -> str:
    form = _MODES[steered.info["mode"]]
    return form.format(share=share_words(share), site=steered.info["site"])


def _against(steered: Steered, share: float) -> str:
    """Say which controls the edit beats, and which it does not."""
    others = controls(steered, share)
    if not others:
        none = "is another edit at this share" if steered.info["controls"] else "was run"
        return f"; no control {none}, so any edit may do as much"
    rates = {c: f"{c} {_percent(row_of(steered, c, share).get('moved'))}" for c in others}
    more = [rates[c] for c in others if clearly_more(steered, share, c)]
    like = [rates[c] for c in others if rates[c] not in more]
    if not like:
        return f", more than with every control: {_listed(more)}"
    if more:
        return f", more than with {_listed(more)}, but not clearly more than with {_listed(like)}"
    beneath = row_of(steered, EDIT, share)["moved"]
    no = all(beneath <= row_of(steered, c, share).get("moved", np.nan) for c in others)
    return f", {'no' if no else 'not clearly'} more than with its controls: {_listed(like)}"


def clearly_more(steered: Steered, share: float, control: str) -> bool:
    """Tell whether the edit moves more of the same pairs than a control does."""
    both = pd.concat([_judged(steered, arm, share) for arm in (EDIT, control)], axis=1).dropna()
    if both.empty or not both.iloc[:, 0].mean() > both.iloc[:, 1].mean():
        return False
    a, b = (both.iloc[:, i].to_numpy(bool) for i in range(2))
    return mcnemar(a, b) < _LEVEL


def _judged(steered: Steered, arm: str, share: float) -> pd.Series[Any]:
    """Whether each pair's answer names the target's place; missing where that would be trivial."""
    return of_arm(steered, arm, share).set_index(["source", "target"])["moved"]


def of_arm(steered: Steered, arm: str, share: float) -> pd.DataFrame:
    """Rows of the pairs under an arm at a share; the unedited model has one share."""
    table = steered.pairs[steered.pairs["arm"] == arm]
    return table if arm == UNEDITED else table[np.isclose(table["share"], share)]


def _odds(steered: Steered, share: float) -> str:
    odds = _two(row_of(steered, EDIT, share)["log_odds"])
    said = f"The log odds of the target's name against the source's are {odds} nats"
    return f"{said}{_beside(steered, share, 'log_odds', _two)}."


def _read(steered: Steered, share: float) -> str:
    away = km(row_of(steered, EDIT, share)["km"])
    said = f"At {steered.info['read_at']} the run's probe then reads {away} km from the target"
    return f"{said}{_beside(steered, share, 'km', km)}."


def _damage(steered: Steered, share: float) -> str:
    edit = row_of(steered, EDIT, share)
    said = f"The next token's distribution moves by KL {number(edit['kl'])} nats"
    said += _beside(steered, share, "kl", number, unedited=False)
    if has(steered, "kept"):
        said += f"; {_percent(edit['kept'])} of the answers still name the source's place"
        said += _beside(steered, share, "kept", _percent)
    return f"{said}."


def _beside(
    steered: Steered,
    share: float,
    measure: str,
    words: Callable[[Any], str],
    *,
    unedited: bool = True,
) -> str:
    """What the unedited model and the first control have, in parentheses."""
    arms = [*([UNEDITED] if unedited else []), *filter(None, [shown_control(steered)])]
    found = {arm: row_of(steered, arm, share).get(measure) for arm in arms}
    told = [f"{arm_words(a)} {words(v)}" for a, v in found.items() if v is not None and pd.notna(v)]
    return f" ({', '.join(told)})" if told else ""


def _listed(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _percent(value: Any) -> str:
    return "" if value is None or pd.isna(value) else f"{100 * float(value):.0f} %"


def _with_ends(row: Mapping[str, Any], measure: str, write: Callable[[Any], str]) -> str:
    """A number with its 95 % interval, where it has one."""
    value, low, high = (write(row.get(f"{measure}{end}")) for end in ("", "_low", "_high"))
    return f"{value} ({low} to {high})" if low else value


# ---------------------------------------------------------------- tables


def effect_table(steered: Steered, *, narrow: bool = False) -> Table:
    """What the answers name, what the logits say and the probe reads, an arm and share a row.

    For a terminal a table is `narrow`: without `n`, and some measures without their interval.
    """
    columns: _Columns = {
        "moved": ("names target, %", _percent_alone),
        "log_odds": ("log odds", _two),
        "km": ("km", km),
    }
    return _table(steered, columns, narrow)


def damage_table(steered: Steered, *, narrow: bool = False) -> Table:
    """What else the edit changes, an arm and share a row."""
    columns: _Columns = {
        "kept": ("names source, %", _percent_alone),
        "kl": ("KL", number),
        "perplexity": ("perplexity", lambda v: number(v, 1)),
        "repetition": ("repetition", _two),
        "stability": ("stability", _two),
    }
    return _table(steered, columns, narrow)


def study_table(steered: Steered, *, narrow: bool = False) -> Table | None:
    """The study's own scores; None where they were not asked for."""
    if not set(SCORES) <= set(steered.summary.columns):
        return None
    named = {s: (f"{s.removeprefix('study_')}, %", _percent_alone) for s in SCORES[:3]}
    return _table(steered, named, narrow)


def _table(steered: Steered, columns: _Columns, narrow: bool) -> Table:
    table = steered.summary
    columns = {m: c for m, c in columns.items() if has(steered, m)}
    tests = [m for m in columns if f"{m}_p" in table.columns and table[f"{m}_p"].notna().any()]
    headers, cells = ["arm", "share", *([] if narrow else ["n"])], []
    for measure, (words, _) in columns.items():
        headers += [words, "p"] if measure in tests else [words]
    for row in table.to_dict("records"):
        line = [arm_words(row["arm"]), share_words(row["share"])]
        line += [] if narrow else [f"{int(row['n']):,}"]
        for measure, (_, write) in columns.items():
            alone = narrow and measure in _ALONE
            line.append(write(row[measure]) if alone else _with_ends(row, measure, write))
            line += [_p_words(row[f"{measure}_p"])] if measure in tests else []
        cells.append(line)
    return Table(headers, cells, 1)


def readings_table(steered: Steered, *, narrow: bool = False) -> Table:
    """Mean km from the target's place to what every later site reads, at the share shown.

    For a terminal some of many sites, and no control but the first.
    """
    share = shown_share(steered)
    arms = [UNEDITED, EDIT, *controls(steered, share)]
    read = {a: readings_of(steered, a, share) for a in (arms[:3] if narrow else arms)}
    sites = read[EDIT].index
    if narrow:
        sites = sites[np.linspace(0, len(sites) - 1, min(len(sites), _SITES)).round().astype(int)]
    cells = [
        [
            clip_label(site, _NAME) if narrow else site,
            *(_with_ends(rows.loc[site].to_dict(), "km", km) for rows in read.values()),
        ]
        for site in sites
    ]
    return Table(["site", *map(arm_words, read)], cells, 1)


def readings_title(steered: Steered) -> str:
    """Say what the first and the last of several later sites read."""
    share = shown_share(steered)
    edit = readings_of(steered, EDIT, share)["km"]
    before = readings_of(steered, UNEDITED, 0)["km"]
    first, last = edit.index[[0, -1]]
    return (
        f"{_doing(steered, share)}, probes read {km(edit[first])} km from the target "
        f"at {first} and {km(edit[last])} km at {last} (unedited {km(before[first])} and "
        f"{km(before[last])} km)"
    )


def _two(value: Any) -> str:
    return number(value, 2)


def _percent_alone(value: Any) -> str:
    return _percent(value).removesuffix(" %")


def _p_words(value: Any) -> str:
    """Write a p-value."""
    if value is None or pd.isna(value):
        return ""
    return "<.001" if value < 0.001 else number(value).lstrip("0") if value < 1 else "1"


# ---------------------------------------------------------------- examples


@dataclass(frozen=True)
class Answer:
    """What was answered, and what the judge found in it."""

    text: str
    verdict: str


@dataclass(frozen=True)
class Example:
    """A pair's answers side by side."""

    source: str
    target: str
    own: tuple[str, ...]
    """Names of the source's place."""
    other: tuple[str, ...]
    """Names of the target's place."""
    answers: Mapping[str, Answer]
    """By heading."""


def examples(steered: Steered, count: int = EXAMPLES) -> list[Example]:
    """Return the first pairs of the table, whatever became of them, at the share shown."""
    share, control = shown_share(steered), shown_control(steered)
    arms = {"source, unedited": UNEDITED, "source, edited": EDIT}
    arms |= {f"source, {control}": control} if control else {}
    rows = {words: _by_pair(of_arm(steered, arm, share)) for words, arm in arms.items()}
    about = steered.info.get("samples", {})
    found = []
    for source, target in [*rows["source, edited"]][:count]:
        told = {words: _answer(by[source, target]) for words, by in rows.items()}
        unedited = {"source, unedited": told.pop("source, unedited")}
        if "answer" in about.get(target, {}):
            unedited["target, unedited"] = Answer(_clipped(about[target]["answer"]), "")
        (own, first), (other, second) = (_names(steered, one) for one in (source, target))
        found.append(Example(first, second, own, other, unedited | told))
    return found


def first_asked(steered: Steered) -> str:
    """What the first source is asked, where the experiment says so."""
    about = steered.info.get("samples", {}).get(str(steered.pairs["source"].iloc[0]), {})
    return str(about.get("asked", ""))


def _by_pair(table: pd.DataFrame) -> dict[tuple[str, str], Mapping[Any, Any]]:
    return {(str(r["source"]), str(r["target"])): r for r in table.to_dict("records")}


def _names(steered: Steered, sample: str) -> tuple[tuple[str, ...], str]:
    """All names of a sample's place, and what people call it."""
    names = steered.info.get("samples", {}).get(sample, {}).get("names", {})
    usual = [names[level][0] for level in ("place", "country") if names.get(level)]
    every = tuple(name for level in LEVELS for name in names.get(level, ()))
    if names.get("place") or not every:
        return every, ", ".join(usual) or sample
    # Two samples of one country are told apart by their ids.
    return every, f"{', '.join(usual) or every[0]} ({sample})"


def _answer(row: Mapping[str, Any]) -> Answer:
    hits = []
    for side, prefix in (("target", "to"), ("source", "own")):
        levels = [v for v in LEVELS if _true(row.get(f"{prefix}_{v}"))]
        if levels:
            hits.append(f"{side}'s {' and '.join(levels)}")
    return Answer(_clipped(row["answer"]), f"names the {', the '.join(hits)}" if hits else "")


def _true(value: Any) -> bool:
    return value is not None and not pd.isna(value) and bool(value)


def _clipped(answer: Any) -> str:
    words = one_line(str(answer).strip())
    return words if len(words) <= _ANSWER else words[: _ANSWER - 1] + "…"
