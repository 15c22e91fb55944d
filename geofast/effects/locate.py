"""`locate`: at which site, in how many dimensions and how an edit moves what a model answers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn

from ..data import Samples, read
from ..geo.gazetteer import LEVELS, Gazetteer
from ..models import Model
from ..models.checkpoint import DeviceMap
from ..models.load import Loading, load
from ..report.numbers import number
from ..report.text import Table, clip_label, fill
from ..run import Run
from ..run import open as open_run
from ..steering.asking import is_late
from ..steering.edit import Edit
from ..steering.generation import States
from ..steering.make import patch, set_to, swap
from .dims import ranked_dims
from .intervals import bootstrap_means
from .odds import BYTES, Asked, next_tokens, odds, states_of
from .pairs import Pairs
from .probed import Probed, require_probed
from .prompted import asked_as, chosen_prompt, worded_as
from .writing import about, save, with_ends

MODES = ("swap", "set", "patch")
_MEASURED = ("effect", "random_effect", "damage", "random_damage", "score")
_SHOWN = 12  # rows of the table in words


class Setting(NamedTuple):
    """Where and how to edit."""

    site: str
    share: float
    """Of the site's dimensions, above 0 to 1."""
    mode: str


@dataclass(frozen=True, eq=False, repr=False)
class Located:
    """Settings of an edit, the best first; made by `gf.locate`.

    Attributes
    ----------
    table : DataFrame
        A row per site x mode x share: `site, pool, prompt, role, mode, share, dims` (their number);
        `effect`, the mean change of log p(target's name) - log p(source's name) of the next token;
        `damage`, the mean KL(unedited || edited) of that token, given that it is neither name;
        `random_effect` and `random_damage`, the same in as many random dimensions (where all are
        edited, in these); and `score`, how much the effect is above that in random dimensions or
        that of no edit, 0, whichever is higher; missing where the damage is above the budget. All
        in nats, each with the ends of its 95 % bootstrap interval over pairs, `_low` and `_high`.
        The highest score first, of equal ones the highest effect; what has none last, by its
        damage.
    info : dict
        What was asked, and what it ran on. `budget`, and what asking the target itself would do to
        the next token, `target_effect` and `target_damage`, in nats.
    """

    table: pd.DataFrame
    info: dict[str, Any]

    @property
    def best(self) -> Setting:
        """The setting with the highest score.

        The score has chosen it, and is too high for that: report what it does to other pairs. One
        that is not above 0 does nothing that random dimensions do not.

        Raises
        ------
        ValueError
            When every setting does more damage than the budget.
        """
        first = self.table.iloc[0]
        if pd.isna(first["score"]):
            raise ValueError(
                f"every setting does more damage than {self.info['budget']:.3g} nats, the least "
                f"{first['damage']:.3g}: edit fewer dimensions, or raise max_damage="
            )
        return Setting(str(first["site"]), float(first["share"]), str(first["mode"]))

    def __repr__(self) -> str:
        return f"Located({len(self.table)} settings, {self.info['pairs']['used']} pairs)"

    def __str__(self) -> str:
        return _text(self.table, self.info)

    def save(self, folder: str | Path) -> Path:
        """Write locate.csv (`table`) and locate.json (`info`); the folder is made where missing.

        Raises
        ------
        OSError
            When they cannot be written.
        """
        return save(self.table, self.info, folder, "locate")


def locate(
    model: str | Path | nn.Module | Model,
    data: str | Path | Samples,
    pairs: pd.DataFrame | str | Path,
    run: Run | str | Path,
    *,
    names: str | Mapping[str, str],
    gazetteer: Gazetteer | None = None,
    prompt: str | None = None,
    sites: str | Sequence[str] | None = None,
    shares: Sequence[float] = (0.1, 0.2, 0.4, 1.0),
    modes: str | Sequence[str] = ("swap",),
    role: str | None = None,
    ranking: str | None = None,
    max_damage: float | None = None,
    seed: int = 0,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    device_map: DeviceMap | None = None,
    adapter: str | Path | None = None,
    merge: bool = False,
    trust_remote_code: bool = False,
) -> Located:
    """Try sites, shares of the dimensions and modes on some pairs, without generation.

    Every source is run up to its next token under each edit, and under the same edit of as many
    random dimensions; every target once for all. Report the effect of what was chosen on other
    pairs.

    Parameters
    ----------
    model
        From `load`, or what it takes.
    data
        Samples, or what `data.read` takes.
    pairs
        Columns `source` and `target`, ids of samples; or a CSV with them. The source is run and
        edited; the target's state, or place, is written into it.
    run
        A run of the model, or its folder: its probes rank the dimensions.
    names
        With what an answer begins: by level (`place`, `region`, `country`, `continent`) the column
        that has it, names or codes that the gazetteer knows, of which the country's counts, or else
        the first; or a column whose text it is. Pairs whose names begin with the same token are
        left out.
    gazetteer
        That has the usual name of a value at a level; None takes the one of GeoNames that the demos
        fetch.
    prompt
        The words that texts stand in, or what is asked about images: one of the run's. None takes
        its only one.
    sites
        Names or globs of sites that the run probed, None for all; see `require_probed`.
    shares
        Of a site's dimensions, above 0 to 1. Mode `patch` takes them all.
    modes
        Some of `swap` (the target's state in the chosen dimensions), `set` (the smallest change in
        them after which the probe reads the target's place) and `patch` (its whole state).
    role
        Which tokens to edit; None takes those that the probe's pool reads.
    ranking
        Of the dimensions; see `ranked_dims`.
    max_damage
        The budget, in nats. None takes what asking the target itself does to the next token: an
        edit that is to bring its answer need not disturb the rest by more.
    seed
        Of the random dimensions, an order for every site, and of the bootstrap.
    batch_size
        Inputs that run together.
    device, dtype, device_map, adapter, merge, trust_remote_code
        What `load` takes.

    Returns
    -------
    Located

    Raises
    ------
    ValueError, FileNotFoundError
        Before the model is loaded: when an argument is wrong; a pair names unknown samples, or a
        name is missing; the run read another kind of samples, was never asked the prompt, never
        probed a site or cannot rank its dimensions; a place is off the sphere. Before it runs: when
        it makes no text, or the run is of another; the names of every pair begin alike. Afterwards
        where texts have different numbers of tokens of the role.
    """
    began = time.perf_counter()
    several = (modes,) if isinstance(modes, str) else tuple(dict.fromkeys(modes))
    _check(shares, several, max_damage, batch_size, seed)
    run = run if isinstance(run, Run) else open_run(run)
    samples = data if isinstance(data, Samples) else read(data)
    chosen = chosen_prompt(run, prompt)
    run, samples = worded_as(run, samples, chosen)
    trials = _trials(run, require_probed(run, sites, role), several, shares, ranking, seed)
    given = Pairs.of(pairs, samples)
    column, words = _words(given, names, gazetteer)
    to_places = {trial: trial.set_to(given) for trial in trials if trial.mode == "set"}
    inputs = given.inputs()
    loading: Loading = {
        "device": device, "dtype": dtype, "device_map": device_map, "adapter": adapter,
        "merge": merge, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    model = asked_as(run, load(model, **loading), samples, chosen)
    asked = Asked.of(model, *inputs, *words)
    kept = asked.kept.nonzero()[0].tolist()
    setting = {trial: [edit.take(kept) for edit in edits] for trial, edits in to_places.items()}
    wanted = [t.key for t in trials if t.mode != "set"]
    held = states_of(model, asked.targets, wanted, batch_size)
    goal = next_tokens(model, asked.targets, batch_size)
    effect: dict[_Trial, torch.Tensor] = {}
    damage: dict[_Trial, torch.Tensor] = {}
    for part in _parts(trials, held, len(asked)):
        each = [setting.get(t) or t.write(held[t.key], asked.of_pair) for t in part]
        made = odds(model, asked, goal, [[edit] for edits in each for edit in edits], batch_size)
        counts = [len(edits) for edits in each]
        effect |= dict(zip(part, made.effect.split(counts), strict=True))
        damage |= dict(zip(part, made.damage.split(counts), strict=True))
    goals = {
        "target_effect": float(made.whole.mean()),
        "target_damage": float(made.whole_damage.mean()),
    }
    budget = goals["target_damage"] if max_damage is None else float(max_damage)
    info = {
        **about(model), "data": samples.source,
        "run": str(run.path or ""), "names": column, "ranking": ranking or "coef_std",
        "seed": seed, "budget": budget, **goals,
        "pairs": {"asked": len(given), "used": len(asked), "alike": len(given) - len(asked)},
        "seconds": round(time.perf_counter() - began, 3),
    }  # fmt: skip
    return Located(_table(effect, damage, budget, seed), info)


def _check(
    shares: Sequence[float],
    modes: Sequence[str],
    max_damage: float | None,
    batch_size: int,
    seed: int,
) -> None:
    if not len(shares) or not all(0 < share <= 1 for share in shares):
        raise ValueError(f"shares must be above 0 and at most 1; got {list(shares)}")
    if not modes or not set(modes) <= set(MODES):
        raise ValueError(f"modes must be some of {', '.join(MODES)}; got {list(modes)}")
    if max_damage is not None and not max_damage >= 0:
        raise ValueError(f"max_damage must be 0 nats or more; got {max_damage}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more; got {seed}")


def _words(
    pairs: Pairs, names: str | Mapping[str, str], gazetteer: Gazetteer | None
) -> tuple[str, list[list[str]]]:
    """Return the column that counts, and the names of sources and of targets."""
    if isinstance(names, str):
        return names, _texts(pairs, names)
    if not names or not set(names) <= set(LEVELS):
        raise ValueError(f"names must be a column, or columns by {', '.join(LEVELS)}; got {names}")
    level = "country" if "country" in names else next(iter(names))
    both = _texts(pairs, names[level])
    if gazetteer is None:
        from ..data.demos.gazetteer import gazetteer as default

        gazetteer = default()
    words = [
        [next(iter(gazetteer.names(level, value)), value) for value in values] for values in both
    ]
    return names[level], words


def _texts(pairs: Pairs, column: str) -> list[list[str]]:
    both = list(pairs.of_both(column))
    if bad := [value for side in both for value in side if not isinstance(value, str)]:
        raise ValueError(f"a name must be text; column {column!r} has {bad[0]!r}")
    return both


# ------ what is tried


@dataclass(frozen=True, eq=False)
class _Trial:
    """One setting, and the random dimensions beside it."""

    at: Probed
    mode: str
    share: float
    dims: torch.Tensor
    random: torch.Tensor
    """int64 [m] as `dims`; empty where all are edited."""

    @property
    def key(self) -> tuple[str, str]:
        """Its site and role."""
        return self.at.site, self.at.role

    @property
    def several(self) -> list[torch.Tensor]:
        """The dimensions of each of its arms."""
        return [self.dims, self.random] if len(self.random) else [self.dims]

    def set_to(self, pairs: Pairs) -> list[Edit]:
        """Make the edits that move the reading to the targets' places."""
        probe, role = self.at.probe, self.at.role
        places = pairs.samples.table[["latitude", "longitude"]].to_numpy("float64")
        latitude, longitude = torch.from_numpy(places[pairs.target]).T
        return [set_to(probe, latitude, longitude, dims, role=role) for dims in self.several]

    def write(self, held: States, of_pair: torch.Tensor) -> list[Edit]:
        """Make the edits that write the targets' states, each the number of a pair's target."""
        site, width = self.at.site, len(self.at.probe.coef)
        if (have := held.at[site].shape[-1]) != width:
            raise ValueError(
                f"{site} is {have} wide, and the run's probe there is {width}: take a run of this "
                "model"
            )
        if self.mode == "patch":
            return [patch(held).take(of_pair)]
        return [swap(held, dims).take(of_pair) for dims in self.several]


def _trials(
    run: Run,
    sites: Sequence[Probed],
    modes: Sequence[str],
    shares: Sequence[float],
    ranking: str | None,
    seed: int,
) -> list[_Trial]:
    generator = torch.Generator().manual_seed(seed)
    made: list[_Trial] = []
    for at in sites:
        order = ranked_dims(run, at.probe.name, ranking)
        d = len(order)
        random = torch.randperm(d, generator=generator)
        for mode in modes:
            for share in (1.0,) if mode == "patch" else dict.fromkeys(map(float, shares)):
                m = max(1, round(share * d))
                beside = random[:m] if m < d else random[:0]
                made.append(_Trial(at, mode, share, order[:m], beside))
    return made


def _parts(
    trials: Sequence[_Trial], held: Mapping[tuple[str, str], States], pairs: int
) -> Iterator[list[_Trial]]:
    """Part trials into those that are run in one call, their edits in memory together."""
    if late := [trial for trial in trials if is_late(*trial.key)]:
        yield late
    part: list[_Trial] = []
    size = 0
    for trial in (trial for trial in trials if not is_late(*trial.key)):
        x = held[trial.key].at[trial.at.site] if trial.mode != "set" else torch.empty(1, 1, 0)
        more = pairs * x.shape[1] * sum(map(len, trial.several)) * x.element_size()
        if part and size + more > BYTES:
            yield part
            part, size = [], 0
        part.append(trial)
        size += more
    if part:
        yield part


# ------ what came of it


def _table(
    effect: Mapping[_Trial, torch.Tensor],
    damage: Mapping[_Trial, torch.Tensor],
    budget: float,
    seed: int,
) -> pd.DataFrame:
    """Sum up effects and damages [1 or 2, n], of the edit and of random dimensions."""
    rows, values = [], []
    for trial in effect:
        edit, beside = effect[trial][[0, -1]].numpy()
        harm, harm_beside = damage[trial][[0, -1]].numpy()
        # Random dimensions that do worse than no edit would make any edit look good.
        score = edit - beside if beside.mean() > 0 else edit
        if harm.mean() > budget:
            score = np.full_like(edit, np.nan)
        values += [edit, beside, harm, harm_beside, score]
        probe = trial.at.probe
        rows.append(
            {
                "site": probe.site, "pool": probe.pool, "prompt": probe.prompt,
                "role": trial.at.role, "mode": trial.mode, "share": trial.share,
                "dims": len(trial.dims),
            }
        )  # fmt: skip
    columns = np.stack(values, 1)
    low, high = bootstrap_means(columns, seed=seed)
    shape = len(rows), len(_MEASURED)
    for row, *each in zip(
        rows, *(x.reshape(shape) for x in (columns.mean(0), low, high)), strict=True
    ):
        for name, mean, a, b in zip(_MEASURED, *each, strict=True):
            row |= {name: float(mean), f"{name}_low": float(a), f"{name}_high": float(b)}
    table = pd.DataFrame(rows)
    # Where all dimensions are edited none are left to be random, and every score is 0 at most.
    then = table["effect"].where(table["score"].notna(), -table["damage"])
    table = table.assign(then=then).sort_values(
        ["score", "then"], ascending=False, kind="stable", ignore_index=True
    )
    return table.drop(columns="then")


def _text(table: pd.DataFrame, info: Mapping[str, Any]) -> str:
    pairs = info["pairs"]
    alike = f" ({pairs['alike']} whose names begin alike left out)" if pairs["alike"] else ""
    head = (
        f"{len(table)} setting{'s' * (len(table) > 1)} on {pairs['used']} pairs{alike}. Effect: "
        "change of log p(target's name) - log p(source's name) of the next token, in nats; asking "
        "the target itself: "
        f"{info['target_effect']:.2f}. Damage: KL of that token given that it is neither; asking "
        f"the target itself: {info['target_damage']:.2f}. Score: effect less that of as many "
        "random dimensions, or of no edit where that is more, at a damage of at most "
        f"{info['budget']:.2f}. 95 % intervals are over pairs."
    )
    headers = ["site", "mode", "share", "effect", "random", "score", "damage"]
    cells = [
        [
            clip_label(str(row["site"]), 26), str(row["mode"]), f"{100 * row['share']:.3g} %",
            with_ends(row, "effect"), number(row["random_effect"], 2), with_ends(row, "score"),
            number(row["damage"], 2),
        ]
        for _, row in table.head(_SHOWN).iterrows()
    ]  # fmt: skip
    blocks = [fill(head), Table(headers, cells, 2).text()]
    if (more := len(table) - _SHOWN) > 0:
        blocks.append(f"{more} more with lower scores or more damage.")
    beside = table[(table["share"] < 1) & (table["mode"] != "patch")]
    if len(beside) and not (beside["score"] > 0).any():
        blocks.append("Within the budget no setting does more than random dimensions or no edit.")
    return "\n\n".join(blocks)
