"""What an experiment with edits found: tables, words, and the folder that keeps them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .. import _folder
from ..report.numbers import km, number
from ..report.text import Table, clip_label, fill
from ..steering import Edit, load_edits, save_edits
from .intervals import bootstrap_means, mcnemar, sign_flip
from .study import SCORES

MEASURES = ("moved", "kept", "log_odds", "km", "kl", "perplexity", "repetition", "stability")
TESTED = ("moved", "log_odds", "km")
"""Measures of the effect, which are tested against random dimensions."""
AGAINST = "random dims"
READINGS = {
    "arm": "str", "share": "float64", "site": "str", "n": "int64",
    "km": "float64", "km_low": "float64", "km_high": "float64",
}  # fmt: skip
"""Columns of `Steered.readings`."""

Floats = NDArray[np.float64]
_FORMAT = 2
_TABLES = {name + ".csv": name for name in ("pairs", "summary", "readings")}
_EDITS = "edits.safetensors"
_NAME = 30  # characters of a site


@dataclass(eq=False, repr=False)
class Steered:
    """What edits changed; made by `gf.steer`.

    Attributes
    ----------
    pairs : DataFrame
        A row per pair, arm and share. `source, target`: ids; `arm`: `none` (the unedited model,
        share 0), `edit`, or a control; `share` of the dimensions; `answer`: what the model says of
        the source. `to_<level>`, `own_<level>`: does it name the target's, or still the source's;
        missing where nothing can be learnt from it. `moved`, `kept`: any of them. `log_odds`: log
        p(target's name) - log p(source's name) where the answer begins, nats. `km`: from the
        target's place to what the probe of a later site reads under the edit. `kl`: KL(unedited ||
        edited) of the next token, mean over the tokens of the unedited answer, nats. `perplexity`
        of the answer under the unedited model. `repetition`, `stability`: see `effects.words`.
        `source_latitude` to `reading_longitude`: the places, and what is read, in degrees. With
        `protocol="study"`, also the study's scores.
    summary : DataFrame
        A row per arm and share: `n` pairs, and for each measure m its mean `m` over the pairs where
        it is not missing, and `m_low, m_high`, its 95 % bootstrap interval over pairs. For `moved`,
        `log_odds` and `km`, `m_p`: two-sided p-value against `random dims` of the same share, of
        the same pairs, by McNemar's exact test or by sign flips; of all rows together none is
        corrected for the number of tests.
    readings : DataFrame
        A row per arm, share and later site that was probed, in the order of the forward pass: `n`
        pairs, and `km` with `km_low, km_high`, as in the summary, of what is read at that site.
        `info["read_at"]` is the last one, whose km the other tables have. Empty where the run
        probed no later site.
    info : dict
        What was asked and what ran; steering.json keeps it.
    edits : list of Edit
        Those of the arm `edit`, one for each share of `info["edits"]["shares"]`, with values for
        the samples of `info["edits"]["samples"]`, in their order: `edit.take` chooses among them.
    path : Path or None
        The folder it was saved to or opened from.
    """

    pairs: pd.DataFrame
    summary: pd.DataFrame
    readings: pd.DataFrame
    info: dict[str, Any]
    edits: Sequence[Edit] = ()
    path: Path | None = None

    def __repr__(self) -> str:
        return f"Steered({self.info['pairs']['kept']} pairs at {self.info['site']})"

    def __str__(self) -> str:
        return text(self)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the folder, all of it or nothing.

        Parameters
        ----------
        folder
            The folder to make. An empty one may be there already.
        overwrite
            Replace the experiment that is there; never a folder that holds other files.

        Returns
        -------
        Path
            The folder, absolute, with pairs.csv, summary.csv, readings.csv, steering.json,
            edits.safetensors and pages for people.

        Raises
        ------
        FileExistsError
            When something is there that may not be replaced.
        OSError
            When it cannot be written; nothing is left behind.
        """
        from ..report import steering

        target = Path(folder).expanduser().resolve()
        _folder.plain(self.info, "info")  # a value that JSON lacks must fail first
        replaces = overwrite and _is_ours(target)
        at = target.with_name(f".{target.name}.new") if replaces else target
        with _folder.making(at, self._nbytes(), False) as new:
            kinds = {
                file: _folder.write_table(getattr(self, name), new / file)
                for file, name in _TABLES.items()
            }
            save_edits(self.edits, new / _EDITS)
            steering.write(self, new, target)
            files = {path.name: path.stat().st_size for path in sorted(new.iterdir())}
            about = {"geofast_steering": _FORMAT, **self.info, "tables": kinds, "files": files}
            words = json.dumps(_folder.plain(about, "info"), indent=2, ensure_ascii=False)
            (new / "steering.json").write_text(words + "\n", encoding="utf-8")
        if replaces:
            _folder._swap(at, target)
        self.path = target
        return target

    def _nbytes(self) -> int:
        tensors = [t for e in self.edits for t in (e.values, e.left, e.right) if t is not None]
        tables = [getattr(self, name).memory_usage(deep=True).sum() for name in _TABLES.values()]
        return 2 * int(sum(tables)) + sum(t.nbytes for t in tensors) + 3_000_000


def _is_ours(folder: Path) -> bool:
    """Tell whether a folder holds an experiment and nothing else."""
    try:
        listed = json.loads((folder / "steering.json").read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return {path.name for path in folder.iterdir()} <= {"steering.json", *listed}


def open_steered(folder: str | Path) -> Steered:
    """Open what `Steered.save` wrote.

    Raises
    ------
    FileNotFoundError
        When the folder or a file of it is missing.
    ValueError
        When a file is damaged, of another size than steering.json says, or of another format.
    """
    path = Path(folder).expanduser().resolve()
    about = path / "steering.json"
    if not about.exists():
        raise FileNotFoundError(f"{path} holds no experiment: it has no steering.json")
    with _folder.reading(about):
        info = json.loads(about.read_text(encoding="utf-8"))
        version, kinds, files = (info.pop(k) for k in ("geofast_steering", "tables", "files"))
    if version != _FORMAT:
        what = "upgrade it" if version > _FORMAT else "run the experiment again"
        msg = f"{path} was written in format {version}; this geofast reads {_FORMAT}: {what}"
        raise ValueError(msg)
    for name in (*_TABLES, _EDITS):
        if not (path / name).exists():
            raise FileNotFoundError(f"{path / name} is missing, though steering.json lists it")
        if (found := (path / name).stat().st_size) != files[name]:
            msg = f"{path / name} has {found} bytes where steering.json says {files[name]}"
            raise ValueError(f"{msg}: copy the folder again")
    tables = {name: _folder.read_table(path / file, kinds[file]) for file, name in _TABLES.items()}
    return Steered(**tables, info=info, edits=load_edits(path / _EDITS), path=path)


# ------ the summary


def summarise(pairs: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Make `Steered.summary` of `Steered.pairs`."""
    measures = [*MEASURES, *(score for score in SCORES if score in pairs)]
    groups = {
        (str(arm), float(share)): rows
        for (arm, share), rows in pairs.groupby(["arm", "share"], sort=False)
    }
    table = []
    for (arm, share), rows in groups.items():
        values = _floats(rows, measures)
        low, high = bootstrap_means(values, seed=seed)
        row: dict[str, Any] = {"arm": arm, "share": share, "n": len(rows)}
        other = groups.get((AGAINST, share)) if arm not in (AGAINST, "none") else None
        for i, measure in enumerate(measures):
            there = values[~np.isnan(values[:, i]), i]
            row[measure] = there.mean() if len(there) else np.nan
            row[f"{measure}_low"], row[f"{measure}_high"] = low[i], high[i]
            if measure in TESTED:
                row[f"{measure}_p"] = np.nan
                if other is not None:
                    row[f"{measure}_p"] = _p_value(rows, other, measure, seed)
        table.append(row)
    return pd.DataFrame(table)


def summarise_readings(readings: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Make `Steered.readings`.

    Parameters
    ----------
    readings
        A row per pair, arm, share and site: `source, target, arm, share, site, km`. Sites are in
        the order of the pass, and each has the same pairs in the same order. It may have no rows.
    seed
        Of the bootstrap. That of the summary gives the last site the same interval.
    """
    table: list[dict[str, Any]] = []
    groups = readings.groupby(["arm", "share"], sort=False) if len(readings) else ()
    for (arm, share), rows in groups:
        sites = dict(iter(rows.groupby("site", sort=False)["km"]))
        low, high = bootstrap_means(np.stack([*sites.values()], 1), seed=seed)
        for i, (site, away) in enumerate(sites.items()):
            row = {"arm": arm, "share": share, "site": site, "n": away.count(), "km": away.mean()}
            table.append(row | {"km_low": low[i], "km_high": high[i]})
    return pd.DataFrame(table, columns=list(READINGS)).astype(READINGS)


def _floats(rows: pd.DataFrame, measures: Sequence[str]) -> Floats:
    found: Floats = rows[list(measures)].astype("Float64").to_numpy("float64", na_value=np.nan)
    return found


def _p_value(rows: pd.DataFrame, other: pd.DataFrame, measure: str, seed: int) -> float:
    """Test an arm against another of the same pairs, which are in the same order."""
    a, b = (_floats(table, [measure])[:, 0] for table in (rows, other))
    there = ~(np.isnan(a) | np.isnan(b))
    if not there.any():
        return float("nan")
    if measure == "moved":
        return mcnemar(a[there] > 0, b[there] > 0)
    return sign_flip(a[there] - b[there], seed=seed)


# ------ in words


def text(found: Steered) -> str:
    """Tell an experiment in 100 columns."""
    from ..report.steering_text import finding

    info, table = found.info, found.summary
    counts = info["pairs"]
    ranked = "" if info["mode"] == "patch" else f", dimensions by {info['ranking']}"
    head = (
        f"{info['model']}: {info['mode']} at {clip_label(info['site'], _NAME)}, tokens "
        f"{info['role']}, phase {info['phase']}{ranked}. "
        f"{counts['kept']} of {counts['asked']} pairs."
    )
    blocks = [fill(head), *_notes(info), _effect(table, info), _damage(table)]
    if set(SCORES) <= set(table.columns):
        blocks.append(_study(table))
    return "\n\n".join([*blocks, fill(" ".join(finding(found)))])


def _notes(info: Mapping[str, Any]) -> Iterator[str]:
    lines = [
        f"Left out: {n} pair{'s' * (n > 1)}, {why}." for why, n in info["pairs"]["left_out"].items()
    ]
    lines += [f"No control {name!r}: {why}." for name, why in info["left_out"].items()]
    if lines:
        yield "\n".join(fill(line, "  ") for line in lines)


def _effect(table: pd.DataFrame, info: Mapping[str, Any]) -> str:
    read = f"; km: from the target to what {info['read_at']} reads" if info["read_at"] else ""
    title = (
        f"Effect, with 95 % intervals, and p against {AGAINST} of the same share. moved: the "
        f"answer names the target's place; log odds: of the {info['level'] or 'place'}'s name, "
        f"nats{read}"
    )
    headers = ["arm", "share", "moved %", "p", "log odds", "p"]
    headers += ["km", "p"] if info["read_at"] else []
    cells = []
    for _, row in table.iterrows():
        cell = [row["arm"], _share(row), _percent(row, "moved"), _p(row["moved_p"])]
        cell += [_with_ends(row, "log_odds", 2), _p(row["log_odds_p"])]
        if info["read_at"]:
            cell += [km(row["km"]), _p(row["km_p"])]
        cells.append(cell)
    return f"{fill(title)}\n{Table(headers, cells, 1).text()}"


def _damage(table: pd.DataFrame) -> str:
    title = (
        "Damage. kept: the answer still names the source's place; kl, nats: of the next token from "
        "the unedited model's; perplexity: of the answer under the unedited model"
    )
    headers = ["arm", "share", "kept %", "kl", "perplexity", "repetition", "stability"]
    cells = [
        [
            row["arm"], _share(row), _percent(row, "kept"), number(row["kl"], 3),
            number(row["perplexity"], 1), number(row["repetition"], 2), number(row["stability"], 2),
        ]
        for _, row in table.iterrows()
    ]  # fmt: skip
    return f"{fill(title)}\n{Table(headers, cells, 1).text()}"


def _study(table: pd.DataFrame) -> str:
    title = "The study's own scores, by substrings, percent"
    scores = SCORES[:3]
    headers = ["arm", "share", *(score.removeprefix("study_") for score in scores)]
    cells = [
        [row["arm"], _share(row), *(_percent(row, score) for score in scores)]
        for _, row in table.iterrows()
    ]
    return f"{title}\n{Table(headers, cells, 1).text()}"


def _share(row: pd.Series[Any]) -> str:
    return f"{100 * row['share']:.3g}%"


def _with_ends(row: pd.Series[Any], measure: str, digits: int) -> str:
    value, low, high = (number(row[f"{measure}{end}"], digits) for end in ("", "_low", "_high"))
    return f"{value} ({low} to {high})" if value else ""


def _percent(row: pd.Series[Any], measure: str) -> str:
    if pd.isna(row[measure]):
        return ""
    value, low, high = (f"{100 * row[f'{measure}{end}']:.0f}" for end in ("", "_low", "_high"))
    return f"{value} ({low} to {high})"


def _p(value: Any) -> str:
    if pd.isna(value):
        return ""
    return "<.001" if value < 0.001 else f"{value:.3f}".removeprefix("0")
