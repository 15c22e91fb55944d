"""`steer`: what edits change in what a model answers, beside controls, of pairs of samples."""

from __future__ import annotations

import platform
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import nn

from ..capture import capture
from ..data import Samples, read
from ..geo import great_circle_km
from ..geo.gazetteer import LEVELS, Gazetteer, named
from ..models import Model
from ..models.load import load
from ..run import Probe, Run, key
from ..run import open as open_run
from ..steering import Edit, edited, generate_arms, score, states
from ..steering.asking import can_generate, require_tokenizer
from ..steering.edit import EDIT_ROLES, Phase
from . import study, words
from .arms import (
    CONTROLS,
    MODES,
    Arms,
    Index,
    Written,
    distinct,
    left_out,
    make_arms,
    mean_differences,
)
from .dims import ranked_dims
from .outcome import Steered, summarise
from .pairs import Pairs
from .probed import probed_sites
from .prompted import prompted

Keep = Literal["known", "all"]
Protocol = Literal["corrected", "study"]

_BYTES = 512 << 20  # of the values of edits that are in memory at once
_NO_NAMES = Gazetteer([])
_COLUMNS = {"place": ("place", "name", "city")}  # where no names= says which


def steer(
    model: str | Path | nn.Module | Model,
    data: str | Path | Samples,
    pairs: pd.DataFrame | str | Path,
    run: Run | str | Path,
    *,
    site: str | None = None,
    shares: Sequence[float] = (0.4,),
    mode: str = "swap",
    role: str | None = None,
    phase: Phase | None = None,
    ranking: str | None = None,
    controls: Sequence[str] = CONTROLS,
    names: Mapping[str, str] | None = None,
    gazetteer: Gazetteer | None = None,
    prompt: str | None = None,
    max_new_tokens: int = 20,
    keep: Keep = "known",
    seed: int = 0,
    protocol: Protocol = "corrected",
    batch_size: int = 32,
    progress: bool = False,
) -> Steered:
    """Edit sources towards their targets, and measure what changes in what the model answers.

    Parameters
    ----------
    model
        What `load` takes. It must make text.
    data
        Samples, or what `data.read` takes.
    pairs
        Columns `source` and `target`, ids of samples; or the path of a CSV with them. The source
        is run and edited; the target's state, or its place, is written into it.
    run
        A run of the model, or its folder: its probes rank the dimensions and read places.
    site
        Where to edit: a site that the run probed, or the whole name of a probe, `site/pool`. None
        takes the run's best probe.
    shares
        Of the dimensions, 0 to 1; at 0 nothing is edited. Mode `patch` edits all, whatever is said.
    mode
        `swap` writes the target's state in the first dimensions of the ranking. `set` moves there
        what the probe reads to the target's latitude and longitude. `patch` writes the target's
        whole state. (`add` is the control `mean difference`.)
    role
        Which tokens; None takes those that the probe's pool reads.
    phase
        None edits the last token in the prompt and in every step, where `swap` and `patch` write
        the target's own state at that step; other roles in the prompt alone. `prompt` and `steps`
        edit there alone.
    ranking
        `coef`, `coef_std`, `forward` or `backward`; None takes `coef_std`. See `effects.dims`.
    controls
        Some of `CONTROLS`, which says what they are. Those that need rows which the run does not
        keep are left out, and the result says so.
    names
        By level (`place`, `region`, `country`, `continent`), the column of the samples that has
        it; names, or codes that the gazetteer knows. None takes columns called like the levels,
        and `name` or `city` for the place.
    gazetteer
        That finds the names in answers; None takes the one of GeoNames that the demos fetch.
    prompt
        The words that texts stand in, or what is asked about images: one of the run's. None takes
        its only one.
    max_new_tokens
        Of an answer.
    keep
        `known`: only pairs of different countries (where no column says them, of different values
        at the first level there is) whose unedited answers name that of both. `all`: every pair.
    seed
        Of the random controls, the bootstrap and the random signs.
    protocol
        `study` adds the study's own scores; see `effects.study`, whose `SWAP` has the arguments of
        its experiment.
    batch_size
        Inputs that run together.
    progress
        Say on stderr what is begun.

    Returns
    -------
    Steered
        Tables of pairs and of arms; `save` writes the folder.

    Raises
    ------
    ValueError, FileNotFoundError
        Before anything is generated: when a pair names an unknown sample, or two are the same; the
        run is of another model or never probed the site; a sample has no token of the role, or
        with `swap` and `patch` not as many as the others; a place is off the sphere; a column, the
        tokenizer or the run's rows and statistics are missing; an argument is wrong. Afterwards
        when no pair is kept.
    """
    clock = _Clock(progress)
    run = run if isinstance(run, Run) else open_run(run)
    samples = data if isinstance(data, Samples) else read(data)
    asked = _Asked.of(
        samples, pairs, shares=shares, mode=mode, role=role, controls=controls, names=names,
        max_new_tokens=max_new_tokens, keep=keep, protocol=protocol,
    )  # fmt: skip
    clock.begin("loading")
    model, samples, run = prompted(load(model), samples, run, prompt)
    _require_speech(model)
    asked = replace(asked, samples=samples)
    (where,) = probed_sites(run, model, [site or run.best.name], role)
    if asked.names and gazetteer is None:
        from ..data.demos.gazetteer import gazetteer as default

        gazetteer = default()
    order = ranked_dims(run, where.probe.name, ranking)
    lost = left_out(run, where.probe.name, asked.controls)
    there = [control for control in asked.controls if control not in lost]
    known = _Names.of(asked, model, gazetteer)

    clock.begin("reading states")
    inputs = [asked.samples.load(row) for row in asked.rows.tolist()]
    wanted = phase or _phase(where.site, where.role)
    written = _written(
        model, asked, inputs, where.probe, where.role, wanted, known.tokens, batch_size
    )
    differences = None
    if "mean difference" in there:
        differences = _differences(run, where.probe.name, asked)
    arms = make_arms(written, run, order, asked.shares, there, ranking, seed, differences)

    clock.begin("asking without edits")
    (answers,) = generate_arms(
        model, inputs, [[]], batch_size=batch_size, max_new_tokens=max_new_tokens
    )
    kept, why = _kept(asked, known, answers)
    later = _later(run, model, where.probe)
    measured = _Measured(len(arms.makes))
    for number, some in enumerate(_chunks(arms, kept)):
        clock.begin("asking with edits", number)
        measured.add(_measure(model, inputs, arms, some, known, later, asked, batch_size))
    clock.begin("scoring")
    measured.perplexity(model, inputs, arms, kept, asked, batch_size)
    table = _table(asked, arms, kept, known, measured, answers)
    info: dict[str, Any] = {
        "model": model.name, "data": samples.source, "run": str(run.path or ""),
        "site": where.site, "pool": where.probe.pool,
        "prompt": prompt or next(iter(_prompts(run)), ""), "role": where.role,
        "phase": wanted, "mode": mode, "shares": list(asked.shares),
        "ranking": ranking or "coef_std", "controls": there, "left_out": dict(lost),
        "read_at": "" if later is None else later.name, "names": dict(asked.names),
        "level": asked.level, "keep": keep, "protocol": protocol,
        "max_new_tokens": max_new_tokens, "seed": seed, "batch_size": batch_size,
        "pairs": {"asked": len(asked.pairs), "kept": len(kept), "left_out": why},
        "versions": _versions(), "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
    }  # fmt: skip
    targets = distinct(written.targets[kept])[0]
    edits = arms.edits(targets)
    info["edits"] = {
        "shares": [share for share, _ in arms.written],
        "samples": asked.ids[asked.rows[targets]].tolist(),
    }
    both = np.concatenate([written.sources[kept], written.targets[kept]])
    info["samples"] = known.about(asked, answers, distinct(both)[0])
    clock.begin("summing up")
    summary = summarise(table, seed=seed)
    info["seconds"] = clock.seconds()
    return Steered(table, summary, info, edits)


# ------ what is asked


@dataclass(frozen=True, eq=False)
class _Asked:
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
    ) -> _Asked:
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
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be 1 or more; got {max_new_tokens}")
        found = _pairs(pairs, samples)
        rows, back = distinct(np.concatenate([found.source, found.target]))
        _check_places(samples, rows)
        columns = _columns(samples, names)
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


def _columns(samples: Samples, names: Mapping[str, str] | None) -> dict[str, str]:
    table = samples.table
    if names is None:
        guessed = {
            level: [c for c in _COLUMNS.get(level, (level,)) if c in table] for level in LEVELS
        }
        return {level: columns[0] for level, columns in guessed.items() if columns}
    for level, column in names.items():
        _require("a level of names", level, LEVELS)
        if column not in table:
            has = ", ".join(map(str, table.columns))
            raise ValueError(f"{samples.source} has no column {column!r}; it has {has}")
    return {level: names[level] for level in LEVELS if level in names}


def _prompts(run: Run) -> Sequence[str]:
    found: Sequence[str] = run.info.get("arguments", {}).get("prompts") or []
    return found


def _require_speech(model: Model) -> None:
    if not can_generate(model):
        raise ValueError(f"{model.name} makes no text: it has no language model to steer")
    require_tokenizer(model)


def _phase(site: str, role: str) -> Phase:
    return "both" if role == "last" and site.startswith("lm.") else "prompt"


def _later(run: Run, model: Model, probe: Probe) -> Probe | None:
    """Return the probe of the last site of the same tower after the edited one; None for none."""
    order = [site.name for site in model.every_site]
    tower = {site.name: site.tower for site in model.every_site}
    after = [
        other
        for name, other in run.probes.items()
        if name == key(other.site, probe.pool, probe.prompt)
        and tower.get(other.site) == tower[probe.site]
        and order.index(other.site) > order.index(probe.site)
        and {"latitude", "longitude"} <= {*other.targets}
    ]
    return max(after, key=lambda p: order.index(p.site), default=None)


# ------ names


@dataclass(frozen=True, eq=False)
class _Names:
    """What the distinct samples are called, and whether a text says so."""

    gazetteer: Gazetteer | None
    places: list[dict[str, str]]
    """By level, of each distinct sample."""
    prompts: list[str]
    """What is asked about each."""
    usual: list[str]
    """The name that counts; empty where there is none."""
    tokens: int
    """The most that such a name has."""

    @classmethod
    def of(cls, asked: _Asked, model: Model, gazetteer: Gazetteer | None) -> _Names:
        """Collect the names; the asked level must be there for every sample."""
        count = len(asked.rows)
        found = [asked.values(i) for i in range(count)] if gazetteer is not None else [{}] * count
        texts = asked.samples.kind == "text"
        asking = next(iter(model.prompts), "")
        prompts = [str(asked.samples.load(int(r))) if texts else asking for r in asked.rows]
        usual = [""] * count
        if gazetteer is not None and asked.level:
            for i, one in enumerate(found):
                if asked.level not in one:
                    column = asked.names[asked.level]
                    raise ValueError(f"{asked.where(i)} has no {column}: fill the column in")
                usual[i] = next(iter(gazetteer.names(asked.level, one[asked.level])), "")
        return cls(gazetteer, found, prompts, usual, max(map(len, _ids(model, usual)), default=0))

    def says(self, text: str, of: int, beside: int | None, asked: int) -> dict[str, bool | None]:
        """Tell whether an answer about sample `asked` names `of`, which is not `beside`."""
        if self.gazetteer is None:
            return {}
        other = {} if beside is None else self.places[beside]
        return named(
            text, self.places[of], self.gazetteer, beside=other, prompt=self.prompts[asked]
        )

    def about(
        self, asked: _Asked, answers: Sequence[str], numbers: Index
    ) -> dict[str, dict[str, Any]]:
        """What distinct samples are asked, answer unedited and are called, by id: for people."""
        ids, found = asked.ids[asked.rows], dict[str, dict[str, Any]]()
        for n in numbers.tolist():
            names = {
                level: list(self.gazetteer.names(level, value)) if self.gazetteer else []
                for level, value in self.places[n].items()
            }
            found[str(ids[n])] = {"asked": self.prompts[n], "answer": answers[n], "names": names}
        return found

    def spot(self, asked: _Asked, number: int) -> study.Spot:
        """What the study looks for; codes, which it did not have, are names."""
        row = asked.samples.table.iloc[int(asked.rows[number])].to_dict()
        for level, column in asked.names.items():
            value = row[column]
            if self.gazetteer is not None and isinstance(value, str) and value.isupper():
                row[column] = next(iter(self.gazetteer.names(level, value)), value)
        return study.Spot.of(row, asked.names)


def _ids(model: Model, texts: Sequence[str]) -> list[list[int]]:
    tokenizer = require_tokenizer(model)
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return ids


def _kept(asked: _Asked, known: _Names, answers: Sequence[str]) -> tuple[Index, dict[str, int]]:
    """Numbers of the pairs that are kept, and how many are not for which reason."""
    every = np.arange(len(asked.pairs))
    if asked.keep == "all":
        return every, {}
    says = [
        known.says(text, number, None, number).get(asked.level)
        for number, text in enumerate(answers)
    ]
    why: Counter[str] = Counter()
    kept = []
    for pair, (s, t) in enumerate(zip(asked.sources.tolist(), asked.targets.tolist(), strict=True)):
        reason = ""
        if known.usual[s].casefold() == known.usual[t].casefold():
            reason = f"both of one {asked.level}"
        elif says[s] is None or says[t] is None:
            reason = f"the {asked.level} stands in the prompt"
        elif not says[s]:
            reason = f"unedited, the model does not name the source's {asked.level}"
        elif not says[t]:
            reason = f"unedited, the model does not name the target's {asked.level}"
        if reason:
            why[reason] += 1
        else:
            kept.append(pair)
    if not kept:
        reasons = "; ".join(f"{n}: {reason}" for reason, n in why.items())
        raise ValueError(f"of {len(every)} pairs none is left ({reasons}); keep='all' keeps them")
    return np.array(kept, dtype=np.int64), dict(why)


# ------ states and arms


def _written(
    model: Model,
    asked: _Asked,
    inputs: Sequence[Any],
    probe: Probe,
    role: str,
    phase: Phase,
    longest: int,
    batch_size: int,
) -> Written:
    """Run the distinct samples once for what is written of them, or for their rows."""
    width = len(probe.coef)
    # An edit that adds nothing refuses what cannot be edited.
    nothing = torch.zeros(1, 1, 1, width)
    check = Edit("add", (probe.site,), width, torch.arange(width), nothing, role, phase)
    check.sites_in(model)
    found = rows = None
    try:
        if asked.mode == "set":
            (rows,) = _pooled(model, inputs, [[check]], probe, batch_size)
        else:
            # A name that is scored may have more tokens than an answer.
            steps = 0 if phase == "prompt" else max(asked.max_new_tokens, longest + 1) - 1
            found = states(model, inputs, probe.site, role, steps=steps, batch_size=batch_size)
    except ValueError as error:
        raise _blamed(error, model, asked, inputs, check, probe) from error
    if found is not None and (wide := found.at[probe.site].shape[-1]) != width:
        raise ValueError(f"{probe.site} is {wide} wide, and the run's probe is for {width}")
    return Written(
        probe, asked.mode, role, phase, model.name, asked.sources, asked.targets, found, rows,
        asked.places,
    )  # fmt: skip


def _blamed(
    error: ValueError,
    model: Model,
    asked: _Asked,
    inputs: Sequence[Any],
    check: Edit,
    probe: Probe,
) -> ValueError:
    """Name the first sample that alone fails as well."""
    for number, one in enumerate(inputs):
        try:
            _pooled(model, [one], [[check]], probe, 1)
        except ValueError as alone:
            return ValueError(f"{asked.where(number)}: {alone}")
    return error


def _pooled(
    model: Model, inputs: Sequence[Any], arms: Sequence[Sequence[Edit]], probe: Probe, size: int
) -> list[torch.Tensor]:
    """Pooled rows where a probe reads, float32 [inputs, d], under every arm."""
    short = model.until(model.sites(probe.site))
    found: list[list[torch.Tensor]] = [[] for _ in arms]
    for start in range(0, len(inputs), size):
        numbers = range(start, min(start + size, len(inputs)))
        batch = short.prepare([inputs[i] for i in numbers])
        for number, arm in enumerate(arms):
            here = [edit.take(numbers) if edit.samples > 1 else edit for edit in arm]
            with edited(short, here), capture(short, probe.site, probe.pool) as rows:
                short.forward(batch)
            found[number].append(rows[key(probe.site, probe.pool)])
    return [torch.cat(parts) for parts in found]


def _differences(run: Run, name: str, asked: _Asked) -> torch.Tensor:
    ids = asked.ids[asked.rows]
    both = np.stack([asked.sources, asked.targets], 1)
    column = asked.names.get("country", "")
    values = None
    if column:
        found = [asked.values(i).get("country", "") for i in range(len(asked.rows))]
        values = [(found[s], found[t]) for s, t in both.tolist()]
    pairs = [(str(ids[s]), str(ids[t])) for s, t in both.tolist()]
    return mean_differences(run, name, pairs, asked.places[torch.from_numpy(both)], column, values)


def _chunks(arms: Arms, kept: Index) -> Iterable[Index]:
    """Split pairs so that the values of all arms' edits fit."""
    each = 4 * 2 * max(1, sum(arms.sizes))  # twice: for the names of both places
    step = max(1, _BYTES // each)
    return [kept[i : i + step] for i in range(0, len(kept), step)]


# ------ measuring


@dataclass(eq=False)
class _Measured:
    """What was measured of pairs, by the number of the edits; chunk after chunk."""

    count: int
    answers: list[list[str]] = field(default_factory=list)
    numbers: dict[str, list[NDArray[np.float64]]] = field(default_factory=dict)

    def add(self, more: _Measured) -> None:
        """Append other pairs."""
        self.answers = self.answers or [[] for _ in range(self.count)]
        for mine, theirs in zip(self.answers, more.answers, strict=True):
            mine += theirs
        for name, parts in more.numbers.items():
            self.numbers.setdefault(name, []).extend(parts)

    def of(self, name: str) -> NDArray[np.float64]:
        """A measure of all pairs, float64 [edits, pairs, ...]."""
        return np.concatenate(self.numbers[name], 1)

    def perplexity(
        self,
        model: Model,
        inputs: Sequence[Any],
        arms: Arms,
        kept: Index,
        asked: _Asked,
        batch_size: int,
    ) -> None:
        """Score every answer under the unedited model, each once; an empty one has none."""
        sources = arms.place.sources[kept].tolist()
        asked_for = [
            (s, text) for said in self.answers for s, text in zip(sources, said, strict=True)
        ]
        distinct_ = list(dict.fromkeys(asked_for))
        ids = [one[: asked.max_new_tokens] for one in _ids(model, [t for _, t in distinct_])]
        full = [i for i, one in enumerate(ids) if one]
        found = np.full(len(distinct_), np.nan)
        if full:
            (scores,) = score(
                model, [inputs[distinct_[i][0]] for i in full], [ids[i] for i in full],
                batch_size=batch_size,
            )  # fmt: skip
            found[full] = scores.perplexity.numpy()
        of = dict(zip(distinct_, found.tolist(), strict=True))
        values = np.array([of[one] for one in asked_for])
        self.numbers["perplexity"] = [values.reshape(self.count, len(kept))]


def _measure(
    model: Model,
    inputs: Sequence[Any],
    arms: Arms,
    some: Index,
    known: _Names,
    later: Probe | None,
    asked: _Asked,
    batch_size: int,
) -> _Measured:
    """Run some pairs under all edits."""
    made = _Measured(len(arms.makes))
    sources, targets = arms.place.sources[some].tolist(), arms.place.targets[some].tolist()
    shown = [inputs[s] for s in sources]
    edits = [make(some) for make in arms.makes]
    made.answers = generate_arms(
        model, shown, edits, batch_size=batch_size, max_new_tokens=asked.max_new_tokens
    )
    n = len(some)
    odds = np.full((made.count, n), np.nan)
    apart = [i for i in range(n) if _can_tell(known.usual[sources[i]], known.usual[targets[i]])]
    if apart:
        both = np.concatenate([some[apart], some[apart]])
        texts = [known.usual[targets[i]] for i in apart] + [known.usual[sources[i]] for i in apart]
        twice = [make(both) for make in arms.makes]
        scores = score(model, [shown[i] for i in apart] * 2, texts, twice, batch_size=batch_size)
        totals = torch.stack([s.total for s in scores]).numpy()
        odds[:, apart] = totals[:, : len(apart)] - totals[:, len(apart) :]
    divergence = np.zeros((made.count, n))
    if made.count > 1:
        # Before the first token they are compared whatever it is, also where an answer is empty.
        ids = [one[: asked.max_new_tokens] or [0] for one in _ids(model, made.answers[0])]
        scores = score(model, shown, ids, edits[1:], kl=True, batch_size=batch_size)
        for number, found in enumerate(scores, 1):
            assert found.kl is not None
            divergence[number] = (found.kl.sum(1) / found.counts).numpy()
    reading = np.full((made.count, n, 2), np.nan)
    if later is not None:
        columns = [later.targets.index(name) for name in ("latitude", "longitude")]
        for number, rows in enumerate(_pooled(model, shown, edits, later, batch_size)):
            reading[number] = later(rows)[:, columns].numpy()
    made.numbers = {"log_odds": [odds], "kl": [divergence], "reading": [reading]}
    return made


def _can_tell(source: str, target: str) -> bool:
    return bool(source and target) and source.casefold() != target.casefold()


# ------ the table


def _table(
    asked: _Asked,
    arms: Arms,
    kept: Index,
    known: _Names,
    measured: _Measured,
    answers: Sequence[str],
) -> pd.DataFrame:
    """Make `Steered.pairs`."""
    ids, degrees = asked.ids[asked.rows], asked.places.numpy()
    sources, targets = arms.place.sources[kept], arms.place.targets[kept]
    reading = measured.of("reading")
    numbers = {name: measured.of(name) for name in ("log_odds", "kl", "perplexity")}
    numbers["km"] = great_circle_km(
        degrees[targets, 0], degrees[targets, 1], np.clip(reading[..., 0], -90, 90), reading[..., 1]
    )
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
            row |= {"reading_latitude": reading[number, i, 0]}
            row |= {"reading_longitude": reading[number, i, 1]}
            rows.append(row)
    table = pd.DataFrame(rows)
    levels = [level for level in LEVELS if level in asked.names]
    said = [f"{side}_{level}" for side in ("to", "own") for level in levels]
    truths = [*said, "moved", "kept", *(score for score in study.SCORES if score in table)]
    table = table.astype(dict.fromkeys(truths, "boolean"))
    first = ["source", "target", "arm", "share", "answer", *said, "moved", "kept"]
    measures = ["log_odds", "km", "kl", "perplexity", "repetition", "stability"]
    return table[[*first, *measures, *(c for c in table if c not in {*first, *measures})]]


class _Judge:
    """Reads answers, each once."""

    def __init__(self, asked: _Asked, known: _Names, answers: Sequence[str]) -> None:
        self._asked, self._known = asked, known
        self._seen: dict[tuple[int, int, str, str], dict[str, Any]] = {}
        self._spots: list[study.Spot] = []
        self._right: list[bool] = []
        if asked.protocol == "study":
            self._spots = [known.spot(asked, i) for i in range(len(asked.rows))]
            pairs = zip(answers, self._spots, strict=True)
            self._right = [study.known(text, spot) for text, spot in pairs]

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


# ------ what the result says of itself


class _Clock:
    """Seconds per stage, and what is begun."""

    def __init__(self, progress: bool) -> None:
        self._progress, self._seconds = progress, dict[str, float]()
        self._stage, self._since = "", time.perf_counter()

    def begin(self, stage: str, again: int = 0) -> None:
        """Begin a stage; say so, unless it is begun again."""
        self._lap()
        if self._progress and not again:
            print(f"{stage} ...", file=sys.stderr, flush=True)
        self._stage = stage

    def seconds(self) -> dict[str, float]:
        """Of every stage so far."""
        self._lap()
        return {stage: round(took, 3) for stage, took in self._seconds.items()}

    def _lap(self) -> None:
        now = time.perf_counter()
        if self._stage:
            self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + now - self._since
        self._since = now


def _versions() -> dict[str, str]:
    packages = ("geofast", "torch", "transformers", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
