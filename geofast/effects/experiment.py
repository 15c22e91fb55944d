"""`steer`: what edits change in what a model answers, beside controls, of pairs of samples."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from ..data import Samples, read
from ..geo.gazetteer import Gazetteer
from ..models import Model
from ..models.checkpoint import DeviceMap
from ..models.load import Loading, load
from ..run import Probe, Run, key
from ..run import open as open_run
from ..steering import Edit, generate_arms, states
from ..steering.asking import can_generate, is_late, require_tokenizer
from ..steering.edit import Phase
from ..steering.generation import UnequalError
from .arms import (
    CONTROLS,
    Arms,
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
from .probed import Probed, require_probed
from .prompted import asked_as, chosen_prompt, worded_as
from .request import Keep, Protocol, Request
from .tables import table_of_pairs, table_of_readings


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
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    device_map: DeviceMap | None = None,
    adapter: str | Path | None = None,
    merge: bool = False,
    trust_remote_code: bool = False,
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
        Of the dimensions, 0 to 1: one at least, but at 0 nothing is edited. Of several the first is
        what the finding and the examples are of. Mode `patch` edits all, whatever is said.
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
    device, dtype, device_map, adapter, merge, trust_remote_code
        What `load` takes.

    Returns
    -------
    Steered
        Tables of pairs and of arms; `save` writes the folder.

    Raises
    ------
    ValueError, FileNotFoundError
        Before the model is loaded: when a pair names an unknown sample, or two are the same; the
        run read another kind of samples, was never asked the prompt, never probed the site or
        cannot rank its dimensions; a place is off the sphere; a column is missing; an argument is
        wrong. Before anything is generated: when the run is of another model, or that makes no
        text; a sample has no token of the role, or with `swap` and `patch` not as many as the
        others. Afterwards when no pair is kept.
    """
    clock = _Clock(progress)
    for name, value, least in (
        ("max_new_tokens", max_new_tokens, 1), ("batch_size", batch_size, 1), ("seed", seed, 0),
    ):  # fmt: skip
        if value < least:
            raise ValueError(f"{name} must be {least} or more; got {value}")
    run = run if isinstance(run, Run) else open_run(run)
    samples = data if isinstance(data, Samples) else read(data)
    chosen = chosen_prompt(run, prompt)
    run, samples = worded_as(run, samples, chosen)
    asked = Request.of(
        samples, pairs, shares=shares, mode=mode, role=role, controls=controls, names=names,
        max_new_tokens=max_new_tokens, keep=keep, protocol=protocol,
    )  # fmt: skip
    setting = _Setting.of(run, asked, site, role, phase, ranking, seed)
    if asked.names and gazetteer is None:
        from ..data.demos.gazetteer import gazetteer as default

        gazetteer = default()
    clock.begin("loading")
    loading: Loading = {
        "device": device, "dtype": dtype, "device_map": device_map, "adapter": adapter,
        "merge": merge, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    model = load(model, **loading)
    _require_speech(model)
    model = asked_as(run, model, samples, chosen)
    known = Names.of(asked, model, gazetteer)

    clock.begin("reading states")
    inputs = [asked.samples.load(row) for row in asked.rows.tolist()]
    arms = setting.arms(model, inputs, known.tokens, batch_size)

    clock.begin("asking without edits")
    (answers,) = generate_arms(
        model, inputs, [[]], batch_size=batch_size, max_new_tokens=max_new_tokens
    )
    kept, why = kept_pairs(asked, known, answers)
    later = _later(run, model, setting.where.probe)
    measured = Measured(len(arms.makes))
    clock.begin("asking with edits")
    with tqdm(
        total=len(arms.makes) * len(kept), unit="answer", leave=False, disable=not progress
    ) as bar:
        for some in chunks(arms, kept):
            made = measure(model, inputs, arms, some, known, later, asked, batch_size, bar.update)
            measured.add(made)
    clock.begin("scoring")
    measured.perplexity(model, inputs, arms, kept, asked, batch_size)
    clock.begin("summing up")
    pairs_ = table_of_pairs(asked, arms, kept, known, measured, answers)
    sites = [probe.site for probe in later]
    readings = table_of_readings(asked, arms, kept, sites, measured)
    targets = distinct(arms.place.targets[kept])[0]
    both = distinct(np.concatenate([arms.place.sources[kept], arms.place.targets[kept]]))[0]
    info = setting.about() | {
        "model": model.name, "prompt": chosen or "",
        "read_at": later[-1].name if later else "",
        "pairs": {"asked": len(asked.pairs), "kept": len(kept), "left_out": why},
        "batch_size": batch_size, "versions": _versions(),
        "dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device),
        "edits": {
            "shares": [share for share, _ in arms.written],
            "samples": asked.ids[asked.rows[targets]].tolist(),
        },
        "samples": known.about(asked, answers, both),
        "fitted": int(np.isin(asked.ids[asked.rows[both]], run.samples["id"].astype(str)).sum()),
    }  # fmt: skip
    found = Steered(
        pairs=pairs_,
        summary=summarise(pairs_, seed=seed),
        readings=summarise_readings(readings, seed=seed),
        info=info,
        edits=arms.edits(targets),
    )
    info["seconds"] = clock.seconds()
    return found


# ------ what is edited


@dataclass(frozen=True, eq=False)
class _Setting:
    """Where and how to edit, which the run says without the model."""

    run: Run
    asked: Request
    where: Probed
    phase: Phase
    ranking: str
    order: torch.Tensor
    controls: Sequence[str]
    lost: Mapping[str, str]
    """The controls that cannot be had, and why."""
    seed: int

    @classmethod
    def of(
        cls,
        run: Run,
        asked: Request,
        site: str | None,
        role: str | None,
        phase: Phase | None,
        ranking: str | None,
        seed: int,
    ) -> _Setting:
        where, *more = require_probed(run, [site or run.best.name], role)
        if more:
            several = ", ".join(one.site for one in (where, *more))
            raise ValueError(f"site must be one site; {site!r} is {several}")
        ranking = ranking or "coef_std"
        order = ranked_dims(run, where.probe.name, ranking)
        lost = left_out(run, where.probe.name, asked.controls)
        there = [control for control in asked.controls if control not in lost]
        phase = phase or ("both" if is_late(where.site, where.role) else "prompt")
        return cls(run, asked, where, phase, ranking, order, there, lost, seed)

    def arms(self, model: Model, inputs: Sequence[Any], longest: int, batch_size: int) -> Arms:
        """Run the distinct samples for what edits write, and lay out all arms."""
        asked, where = self.asked, self.where
        written = _written(
            model, asked, inputs, where.probe, where.role, self.phase, longest, batch_size
        )
        differences = None
        if "mean difference" in self.controls:
            differences = _differences(self.run, where.probe.name, asked)
        return make_arms(
            written, self.run, self.order, asked.shares, self.controls, self.ranking, self.seed,
            differences,
        )  # fmt: skip

    def about(self) -> dict[str, Any]:
        """Say what was asked."""
        asked = self.asked
        return {
            "data": asked.samples.source, "run": str(self.run.path or ""),
            "site": self.where.site, "pool": self.where.probe.pool, "role": self.where.role,
            "phase": self.phase, "mode": asked.mode, "shares": list(asked.shares),
            "ranking": self.ranking, "controls": list(self.controls), "left_out": dict(self.lost),
            "names": dict(asked.names), "level": asked.level, "keep": asked.keep,
            "protocol": asked.protocol, "max_new_tokens": asked.max_new_tokens, "seed": self.seed,
        }  # fmt: skip


def _require_speech(model: Model) -> None:
    if not can_generate(model):
        raise ValueError(f"{model.name} makes no text: it has no language model to steer")
    require_tokenizer(model)


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
    except UnequalError as error:
        raise ValueError(error.words(*map(asked.where, error.rows))) from error
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


# ------ what the result says of itself


class _Clock:
    """Seconds per stage, and what is begun."""

    def __init__(self, progress: bool) -> None:
        self._progress, self._seconds = progress, dict[str, float]()
        self._stage, self._since = "", time.perf_counter()

    def begin(self, stage: str) -> None:
        """Begin a stage, and say so."""
        self._lap()
        if self._progress:
            print(f"{stage} ...", file=sys.stderr, flush=True)
        self._stage = stage

    def seconds(self) -> dict[str, float]:
        """Of every stage so far."""
        self._lap()
        return {stage: round(took, 3) for stage, took in self._seconds.items()}

    def _lap(self) -> None:
        now = time.perf_counter()
        if self._stage:
            self._seconds[self._stage] = now - self._since
        self._since = now


def _versions() -> dict[str, str]:
    packages = ("geofast", "torch", "transformers", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
