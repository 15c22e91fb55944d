"""`locate`: at which site, in how many dimensions and how an edit moves what a model answers."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from .. import _folder
from ..data import Samples, read
from ..models import Model, load
from ..report.numbers import number
from ..report.text import Table, clip_label, fill
from ..run import Run
from ..run import open as open_run
from ..steering.edit import Edit, Phase
from ..steering.generation import States, states
from ..steering.make import patch, set_to, swap
from .dims import ranked_dims
from .intervals import bootstrap_means
from .odds import Asked, Odds, next_tokens, odds
from .pairs import Pairs
from .probed import Probed, probed_sites

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
        edited, in these); and `score`, effect - random_effect, missing where the damage is above
        the budget. All in nats, each with the ends of its 95 % bootstrap interval over pairs,
        `_low` and `_high`. The highest score first; what has none last, by its damage.
    info : dict
        What was asked, and what it ran on. `budget`, and what asking the target itself would do to
        the next token, `target_effect` and `target_damage`, in nats.
    """

    table: pd.DataFrame
    info: dict[str, Any]

    @property
    def best(self) -> Setting:
        """The setting with the highest score.

        The score has chosen it, and is too high for that: report what it does to other pairs.

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
    model: Any,
    data: str | Path | Samples,
    pairs: pd.DataFrame | str | Path,
    run: Run | str | Path,
    *,
    names: str | Mapping[str, str],
    sites: str | Sequence[str] | None = None,
    shares: Sequence[float] = (0.1, 0.2, 0.4, 1.0),
    modes: str | Sequence[str] = ("swap",),
    role: str | None = None,
    phase: Phase = "prompt",
    ranking: str | None = None,
    max_damage: float | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> Located:
    """Try sites, shares of the dimensions and modes on some pairs, without generation.

    Every source is run up to its next token under each edit, and under the same edit of as many
    random dimensions; every target once for all. Report the effect of what was chosen on other
    pairs.

    Parameters
    ----------
    model
        From `load`, or what it takes. One that talks about images is asked its one prompt; see
        `Model.asking`.
    data
        Samples, or what `data.read` takes. Texts are asked as they are.
    pairs
        Columns `source` and `target`, ids of samples; or a CSV with them. The source is run and
        edited; the target's state, or place, is written into it.
    run
        A run of the model, or its folder: its probes rank the dimensions.
    names
        The column with the name that an answer begins with, such as a country's; or a mapping from
        levels to columns, of which the first counts. Pairs whose names begin with the same token
        are left out.
    sites
        Names or globs of sites that the run probed, None for all; see `probed_sites`.
    shares
        Of a site's dimensions, above 0 to 1. Mode `patch` takes them all.
    modes
        Some of `swap` (the target's state in the chosen dimensions), `set` (the smallest change in
        them after which the probe reads the target's place) and `patch` (its whole state).
    role
        Which tokens to edit; None takes those that the probe's pool reads.
    phase
        Of the edits, `prompt` or `both`: nothing is generated here.
    ranking
        Of the dimensions; see `ranked_dims`.
    max_damage
        The budget, in nats. None takes what asking the target itself does to the next token: an
        edit that is to bring its answer need not disturb the rest by more.
    seed
        Of the random dimensions, an order for every site, and of the bootstrap.
    batch_size
        Inputs that run together.

    Returns
    -------
    Located

    Raises
    ------
    ValueError, FileNotFoundError
        Before the model runs: when it makes no text, or an argument is wrong; a pair names unknown
        samples; a name is missing, or those of every pair begin alike; the run is of another model,
        never probed a site or cannot rank its dimensions; a place is off the sphere. Afterwards
        where texts have different numbers of tokens of the role.
    """
    began = time.perf_counter()
    several = (modes,) if isinstance(modes, str) else tuple(dict.fromkeys(modes))
    _check(shares, several, phase, max_damage, batch_size)
    model = model if isinstance(model, Model) else load(model)
    samples = data if isinstance(data, Samples) else read(data)
    run = run if isinstance(run, Run) else open_run(run)
    model = model.reading(samples.kind)
    given = Pairs.of(pairs, samples)
    column = names if isinstance(names, str) else next(iter(names.values()), "")
    trials = _trials(run, probed_sites(run, model, sites, role), several, shares, ranking, seed)
    asked = Asked.of(model, *given.inputs(), *given.of_both(column))
    kept = given.take(asked.kept)
    setting = {trial.number: trial.set_to(kept, phase) for trial in trials if trial.mode == "set"}
    held = states_of(
        model, asked, [(t.at.site, t.at.role) for t in trials if t.mode != "set"], batch_size
    )
    arms = [
        setting.get(trial.number) or trial.write(held, asked.of_pair, phase) for trial in trials
    ]
    goal = next_tokens(model, asked.targets, batch_size)
    made = odds(model, asked, goal, [[edit] for arm in arms for edit in arm], batch_size)
    goals = {
        "target_effect": float(made.whole.mean()),
        "target_damage": float(made.whole_damage.mean()),
    }
    budget = goals["target_damage"] if max_damage is None else float(max_damage)
    info = {
        **about(model, samples.source),
        "run": str(run.path or ""), "names": column, "ranking": ranking or "coef_std",
        "phase": phase, "seed": seed, "budget": budget, **goals,
        "pairs": {"asked": len(given), "used": len(asked), "alike": len(given) - len(asked)},
        "seconds": round(time.perf_counter() - began, 3),
    }  # fmt: skip
    return Located(_table(trials, made, budget, seed), info)


def _check(
    shares: Sequence[float],
    modes: Sequence[str],
    phase: str,
    max_damage: float | None,
    batch_size: int,
) -> None:
    if not len(shares) or not all(0 < share <= 1 for share in shares):
        raise ValueError(f"shares must be above 0 and at most 1; got {list(shares)}")
    if not modes or not set(modes) <= set(MODES):
        raise ValueError(f"modes must be some of {', '.join(MODES)}; got {list(modes)}")
    if phase not in ("prompt", "both"):
        raise ValueError(f"phase must be prompt or both, as nothing is generated; got {phase!r}")
    if max_damage is not None and not max_damage >= 0:
        raise ValueError(f"max_damage must be 0 nats or more; got {max_damage}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}")


# ------ what is tried


@dataclass(frozen=True, eq=False)
class _Trial:
    """One setting, and the random dimensions beside it."""

    number: int
    at: Probed
    mode: str
    share: float
    dims: torch.Tensor
    random: torch.Tensor
    """int64 [m] as `dims`; empty where all are edited."""

    @property
    def several(self) -> list[torch.Tensor]:
        """The dimensions of each of its arms."""
        return [self.dims, self.random] if len(self.random) else [self.dims]

    def set_to(self, pairs: Pairs, phase: Phase) -> list[Edit]:
        places = pairs.samples.table[["latitude", "longitude"]].to_numpy("float64")
        latitude, longitude = torch.from_numpy(places[pairs.target]).T
        return [
            set_to(
                self.at.probe, latitude, longitude, dims, sites=self.at.site, role=self.at.role,
                phase=phase,
            )
            for dims in self.several
        ]  # fmt: skip

    def write(self, held: Mapping[str, States], of_pair: torch.Tensor, phase: Phase) -> list[Edit]:
        states = held[self.at.role]
        site = self.at.site
        one = States({site: states.at[site]}, states.role, states.in_prompt, states.model)
        width, have = len(self.at.probe.coef), one.at[site].shape[-1]
        if have != width:
            msg = f"{site} is {have} wide, and the run's probe there is {width}: take a run of "
            raise ValueError(msg + "this model")
        if self.mode == "patch":
            return [patch(one, phase=phase).take(of_pair)]
        return [swap(one, dims, phase=phase).take(of_pair) for dims in self.several]


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
                made.append(_Trial(len(made), at, mode, share, order[:m], beside))
    return made


def states_of(
    model: Model, asked: Asked, wanted: Sequence[tuple[str, str]], batch_size: int
) -> dict[str, States]:
    """Keep the targets' states at sites and tokens of roles, by role: one pass over them for each.

    `wanted` are sites and roles.
    """
    sites: dict[str, dict[str, None]] = {}
    for site, role in wanted:
        sites.setdefault(role, {})[site] = None
    return {
        role: states(model, asked.targets, list(some), role, batch_size=batch_size)
        for role, some in sites.items()
    }


# ------ what came of it


def _table(trials: Sequence[_Trial], made: Odds, budget: float, seed: int) -> pd.DataFrame:
    rows, values = [], []
    arm = 0
    for trial in trials:
        beside = arm + len(trial.several) - 1
        effect, damage = made.effect.numpy(), made.damage.numpy()
        score = effect[arm] - effect[beside]
        if damage[arm].mean() > budget:
            score = np.full_like(score, np.nan)
        values += [effect[arm], effect[beside], damage[arm], damage[beside], score]
        probe = trial.at.probe
        rows.append(
            {
                "site": probe.site, "pool": probe.pool, "prompt": probe.prompt,
                "role": trial.at.role, "mode": trial.mode, "share": trial.share,
                "dims": len(trial.dims),
            }
        )  # fmt: skip
        arm = beside + 1
    columns = np.stack(values, 1)
    low, high = bootstrap_means(columns, seed=seed)
    shape = len(trials), len(_MEASURED)
    for row, *each in zip(
        rows, *(x.reshape(shape) for x in (columns.mean(0), low, high)), strict=True
    ):
        for name, mean, a, b in zip(_MEASURED, *each, strict=True):
            row |= {name: float(mean), f"{name}_low": float(a), f"{name}_high": float(b)}
    table = pd.DataFrame(rows)
    by = ["score", "damage"]
    return table.sort_values(by, ascending=[False, True], kind="stable", ignore_index=True)


def about(model: Model, data: str) -> dict[str, Any]:
    """Say what a measurement ran on."""
    return {
        "model": model.name,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "data": data,
    }


def save(table: pd.DataFrame, info: Mapping[str, Any], folder: str | Path, name: str) -> Path:
    """Write a table as CSV and what is said of it as JSON."""
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / f"{name}.csv", index=False, lineterminator="\n")
    text = json.dumps(_folder.plain(info, "info"), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    return folder


def with_ends(row: pd.Series[Any], name: str, digits: int = 2) -> str:
    """Write a number and its interval."""
    value, low, high = (number(row[f"{name}{end}"], digits) for end in ("", "_low", "_high"))
    return f"{value} ({low} to {high})" if value else ""


def _text(table: pd.DataFrame, info: Mapping[str, Any]) -> str:
    pairs = info["pairs"]
    alike = f" ({pairs['alike']} whose names begin alike left out)" if pairs["alike"] else ""
    head = (
        f"{len(table)} settings on {pairs['used']} pairs{alike}. Effect: change of log p(target's "
        "name) - log p(source's name) of the next token, in nats; asking the target itself: "
        f"{info['target_effect']:.2f}. Damage: KL of that token given that it is neither; asking "
        f"the target itself: {info['target_damage']:.2f}. Score: effect less that of as many "
        f"random dimensions, at a damage of at most {info['budget']:.2f}. 95 % intervals are over "
        "pairs."
    )
    headers = ["site", "mode", "share", "effect", "random", "score", "damage"]
    cells = [
        [
            clip_label(str(row["site"]), 26), str(row["mode"]), f"{100 * row['share']:.3g}%",
            with_ends(row, "effect"), number(row["random_effect"], 2), with_ends(row, "score"),
            number(row["damage"], 2),
        ]
        for _, row in table.head(_SHOWN).iterrows()
    ]  # fmt: skip
    blocks = [fill(head), Table(headers, cells, 2).text()]
    if (more := len(table) - _SHOWN) > 0:
        blocks.append(f"{more} more with lower scores.")
    return "\n\n".join(blocks)
