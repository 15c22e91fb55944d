"""`steer`: what edits change in what a model answers, beside controls, of pairs of samples."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import nn

from ..data import Samples, read
from ..geo import great_circle_km
from ..geo.gazetteer import LEVELS, Gazetteer
from ..models import Model
from ..models.load import load
from ..run import Probe, Run, key
from ..run import open as open_run
from ..steering import Edit, generate_arms, states
from ..steering.asking import can_generate, require_tokenizer
from ..steering.edit import Phase
from . import study, words
from .arms import (
    CONTROLS,
    Arms,
    Index,
    Written,
    distinct,
    left_out,
    make_arms,
    mean_differences,
)
from .dims import ranked_dims
from .measuring import Measured, chunks, measure, pooled
from .names import Names, kept_pairs
from .outcome import Steered, summarise, summarise_readings
from .probed import probed_sites
from .prompted import prompted
from .request import Keep, Protocol, Request


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
        Of the dimensions, 0 to 1: one at least, but at 0 nothing is edited. Mode `patch` edits all,
        whatever is said.
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
        at the first level there is) whose unedited answers name that of both; under
        `protocol="study"` by the study's own judge. `all`: every pair.
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
    asked = Request.of(
        samples, pairs, shares=shares, mode=mode, role=role, controls=controls, names=names,
        max_new_tokens=max_new_tokens, keep=keep, protocol=protocol,
    )  # fmt: skip
    clock.begin("loading")
    model, samples, run = prompted(load(model), samples, run, prompt)
    _require_speech(model)
    asked = replace(asked, samples=samples)
    where, *more = probed_sites(run, model, [site or run.best.name], role)
    if more:
        several = ", ".join(one.site for one in (where, *more))
        raise ValueError(f"site must be one site; {site!r} is {several}")
    if asked.names and gazetteer is None:
        from ..data.demos.gazetteer import gazetteer as default

        gazetteer = default()
    order = ranked_dims(run, where.probe.name, ranking)
    lost = left_out(run, where.probe.name, asked.controls)
    there = [control for control in asked.controls if control not in lost]
    known = Names.of(asked, model, gazetteer)

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
    kept, why = kept_pairs(asked, known, answers)
    later = _later(run, model, where.probe)  # in the order of the pass
    measured = Measured(len(arms.makes))
    for number, some in enumerate(chunks(arms, kept)):
        clock.begin("asking with edits", number)
        measured.add(measure(model, inputs, arms, some, known, later, asked, batch_size))
    clock.begin("scoring")
    measured.perplexity(model, inputs, arms, kept, asked, batch_size)
    clock.begin("summing up")
    table = _table(asked, arms, kept, known, measured, answers)
    readings = _readings(asked, arms, kept, [probe.site for probe in later], measured)
    targets = distinct(written.targets[kept])[0]
    both = distinct(np.concatenate([written.sources[kept], written.targets[kept]]))[0]
    info: dict[str, Any] = {
        "model": model.name, "data": samples.source, "run": str(run.path or ""),
        "site": where.site, "pool": where.probe.pool,
        "prompt": prompt or next(iter(_prompts(run)), ""), "role": where.role,
        "phase": wanted, "mode": mode, "shares": list(asked.shares),
        "ranking": ranking or "coef_std", "controls": there, "left_out": dict(lost),
        "read_at": later[-1].name if later else "", "names": dict(asked.names),
        "level": asked.level, "keep": keep, "protocol": protocol,
        "max_new_tokens": max_new_tokens, "seed": seed, "batch_size": batch_size,
        "pairs": {"asked": len(asked.pairs), "kept": len(kept), "left_out": why},
        "versions": _versions(), "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "edits": {
            "shares": [share for share, _ in arms.written],
            "samples": asked.ids[asked.rows[targets]].tolist(),
        },
        "samples": known.about(asked, answers, both),
    }  # fmt: skip
    found = Steered(
        pairs=table,
        summary=summarise(table, seed=seed),
        readings=summarise_readings(readings, seed=seed),
        info=info,
        edits=arms.edits(targets),
    )
    info["seconds"] = clock.seconds()
    return found


# ------ what is run


def _prompts(run: Run) -> Sequence[str]:
    found: Sequence[str] = run.info.get("arguments", {}).get("prompts") or []
    return found


def _require_speech(model: Model) -> None:
    if not can_generate(model):
        raise ValueError(f"{model.name} makes no text: it has no language model to steer")
    require_tokenizer(model)


def _phase(site: str, role: str) -> Phase:
    return "both" if role == "last" and site.startswith("lm.") else "prompt"


def _later(run: Run, model: Model, probe: Probe) -> list[Probe]:
    """Return the probes of the sites of the same tower after the edited one, in their order."""
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
    return sorted(after, key=lambda p: order.index(p.site))


def _written(
    model: Model,
    asked: Request,
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
            ((rows,),) = pooled(model, inputs, [[check]], [probe], batch_size)
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
    asked: Request,
    inputs: Sequence[Any],
    check: Edit,
    probe: Probe,
) -> ValueError:
    """Name the first sample that alone fails as well."""
    for number, one in enumerate(inputs):
        try:
            pooled(model, [one], [[check]], [probe], 1)
        except ValueError as alone:
            return ValueError(f"{asked.where(number)}: {alone}")
    return error


def _differences(run: Run, name: str, asked: Request) -> torch.Tensor:
    ids = asked.ids[asked.rows]
    both = np.stack([asked.sources, asked.targets], 1)
    column = asked.names.get("country", "")
    values = None
    if column:
        found = [asked.values(i).get("country", "") for i in range(len(asked.rows))]
        values = [(found[s], found[t]) for s, t in both.tolist()]
    pairs = [(str(ids[s]), str(ids[t])) for s, t in both.tolist()]
    return mean_differences(run, name, pairs, asked.places[torch.from_numpy(both)], column, values)


# ------ the table


def _table(
    asked: Request,
    arms: Arms,
    kept: Index,
    known: Names,
    measured: Measured,
    answers: Sequence[str],
) -> pd.DataFrame:
    """Make `Steered.pairs`."""
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


def _readings(
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
    """Kilometres from places [..., 2] to readings [..., 2]; a probe may read beyond the poles."""
    latitude = np.clip(reading[..., 0], -90, 90)
    return great_circle_km(degrees[..., 0], degrees[..., 1], latitude, reading[..., 1])


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
