"""What an experiment with edits found: tables, words, and the folder that keeps them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .. import _folder
from ..report.text import clip_label, fill
from ..steering import Edit, load_edits, save_edits
from .intervals import bootstrap_means, mcnemar, sign_flip
from .study import SCORES

MEASURES = ("moved", "kept", "log_odds", "km", "kl", "perplexity", "repetition", "stability")
TESTED = ("moved", "log_odds", "km")
"""Measures of the effect, which are tested against random dimensions."""
RATES = ("moved", "kept", *SCORES)
"""Measures that are true or false of a pair."""
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
        it is not missing, and `m_low, m_high`, its 95 % interval over pairs: see
        `effects.intervals.bootstrap_means`. For `moved`, `log_odds` and `km`, `m_p`: two-sided
        p-value against `random dims` of the same share, of the same pairs, by McNemar's exact test
        or by sign flips; of all rows together none is corrected for the number of tests. Where all
        dimensions are edited, `random dims` and `shuffled labels` would be the edit itself: there
        they have no row, and `m_p` is missing.
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
    if not about.exists() and (path / "run.json").exists():
        raise ValueError(f"{path} holds a run, not an experiment: gf.open opens it")
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
    rates = [measure in RATES for measure in measures]
    groups = {
        (str(arm), float(share)): rows
        for (arm, share), rows in pairs.groupby(["arm", "share"], sort=False)
    }
    table = []
    for (arm, share), rows in groups.items():
        values = _floats(rows, measures)
        low, high = bootstrap_means(values, rates=rates, seed=seed)
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
    from ..report import steering_text as words

    info = found.info
    counts = info["pairs"]
    ranked = "" if info["mode"] == "patch" else f", dimensions by {info['ranking']}"
    head = (
        f"{info['model']}: {info['mode']} at {clip_label(info['site'], _NAME)}, tokens "
        f"{info['role']}, phase {info['phase']}{ranked}. "
        f"{counts['kept']} of {counts['asked']} pairs."
    )
    blocks = [fill(head)]
    if lines := [*words.fitted(found), *words.left_out(found)]:
        blocks.append("\n".join(fill(line, "  ") for line in lines))
    tested = f", and p against {AGAINST} of the same share" if words.tested(found) else ""
    effect = (
        f"Effect, with 95 % intervals{tested}. names target: the answer names the target's "
        f"place; log odds: of the {info['level'] or 'place'}'s name, nats"
    )
    if info["read_at"]:
        effect += f"; km: from the target's place to what {info['read_at']} reads"
    damage = (
        "Damage. names source: the answer still names the source's place; KL: of the next token "
        "from the unedited model's, nats; perplexity: of the answer under the unedited model; "
        "repetition: share of word triples said before; stability: how much of the unedited answer "
        "is still there, names apart"
    )
    tables = [
        (effect, words.effect_table(found, narrow=True)),
        (damage, words.damage_table(found, narrow=True)),
    ]
    if words.has_readings(found):
        share = words.share_words(words.shown_share(found))
        several = (
            f"Mean km from the target's place to what later sites read, at a share of {share}, "
            "with 95 % intervals"
        )
        tables.append((several, words.readings_table(found, narrow=True)))
    if study := words.study_table(found, narrow=True):
        tables.append(("The study's own scores, by substrings", study))
    blocks += [f"{fill(title)}\n{table.text()}" for title, table in tables]
    return "\n\n".join([*blocks, fill(" ".join(words.finding(found)))])
