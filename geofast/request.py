"""What is asked of a probe: samples, targets, splits and options, checked before anything runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray

from .batching import Lengths
from .capture import Pools, pools_by_tower
from .controls import check_controls, check_tokens
from .data import Samples, read
from .extract import ready, usable, worded
from .geo import Split
from .geo.folds import as_split
from .models import Model
from .models.twin import require_twin
from .plan import Task, make_tasks
from .pooling import parse_pools
from .ridge import Select


@dataclass(frozen=True)
class Labelled:
    """Samples, and what goes with each of them: targets and baselines."""

    samples: Samples
    y: torch.Tensor
    """float64 [n, k]."""
    baselines: dict[str, torch.Tensor]

    def take(self, indices: NDArray[np.int64]) -> Labelled:
        """Keep some samples, in the order of `indices`."""
        baselines = {name: x[torch.from_numpy(indices)] for name, x in self.baselines.items()}
        return Labelled(self.samples.take(indices), self.y[torch.from_numpy(indices)], baselines)


class Options(TypedDict):
    """What `probe` and `plan` are asked beside the model, the data and how to load the model."""

    sites: str | Sequence[str] | None
    pool: Pools
    prompts: str | Sequence[str] | None
    split: Split | Any | Sequence[Split | Any]
    group: str | None
    alphas: Sequence[float]
    select: Select | None
    storage: Literal["auto", "rows", "gram"]
    targets: str | Sequence[str]
    baselines: Mapping[str, ArrayLike] | None
    controls: str | Sequence[str]
    batch_size: int | None
    workers: int | None
    strict: bool


@dataclass(frozen=True)
class Request:
    """A probe as it was asked for, read and checked."""

    options: Options
    given: Labelled
    inputs: Mapping[str, Samples]
    """The samples in the words of every prompt, as `extract.worded` returns them."""
    splits: list[Split]
    targets: list[str]
    alphas: list[float]
    controls: list[str]
    tasks: list[Task]
    warned: list[str]
    """Of groups that are left out."""
    lengths: Mapping[str, Lengths]
    """By prompt: of texts once a model has counted their tokens, of others once one was tried."""

    @classmethod
    def of(cls, data: str | Path | Samples, options: Options, *, location: bool) -> Request:
        """Read the samples and check what is asked; `location` samples are places.

        Raises
        ------
        ValueError, OSError
            See `probe`.
        """
        strict = options["strict"]
        if not isinstance(data, Samples | str | os.PathLike):
            raise TypeError(
                f"data must be a path or samples; got a {type(data).__name__}: make samples of it "
                "with gf.data.from_arrays, or save it and let gf.data.read read it"
            )
        if not isinstance(data, Samples):
            data = read(data, location=location, strict=strict)
        samples = data.as_locations() if location else data
        splits = as_splits(options["split"])
        targets = _several(options["targets"])
        features = (options["baselines"] or {}).items()
        baselines = {name: torch.as_tensor(x) for name, x in features}
        given = Labelled(samples, read_targets(samples, targets), baselines)
        alphas = as_list(options["alphas"])
        _check(options, given, alphas)
        controls = list(dict.fromkeys(_several(options["controls"])))
        check_controls(controls, samples.kind, given.baselines)
        inputs = worded(samples, options["prompts"])
        tasks, warned = scored_tasks(given, splits, options["group"], targets, options["select"])
        return cls(
            options,
            given,
            inputs,
            splits,
            targets,
            alphas,
            controls,
            tasks,
            warned,
            lengths={},
        )

    def of_model(self, model: Model) -> tuple[Model, Request]:
        """Return the model as it reads the samples, and the request without texts it cannot take.

        Raises
        ------
        ValueError
            As `read_by`, and when it has no such control.
        """
        samples, model = self.given.samples, self.read_by(model)
        weighs = model.device.type != "meta"  # what is planned before that has nothing to copy
        if "random-weights" in self.controls and weighs:
            require_twin(model)
        asked = self._readable_by(model) if samples.kind == "text" else self
        if "tokens" in self.controls:
            check_tokens(model, asked.inputs)
        return model, asked

    def read_by(self, model: Model) -> Model:
        """Return the model as it reads the samples; one without weights tells as well.

        Raises
        ------
        ValueError
            When it reads others, takes no prompt beside them, or has no such site, tower or token.
        """
        options = self.options
        ready_ = ready(model, self.given.samples, options["prompts"], options["sites"])
        check_pools(ready_, options["sites"], options["pool"])
        return ready_

    @property
    def storage(self) -> str:
        """What was asked for: auto, rows or gram; `each` where a pool takes every token."""
        return "each" if _each(self.options["pool"]) else self.options["storage"]

    def _readable_by(self, model: Model) -> Request:
        good, unfit, lengths = usable(model, self.inputs, self.options["strict"])
        if not unfit:
            return replace(self, lengths=lengths)
        asked = replace(self.take(good), lengths=lengths)
        return asked.with_samples(replace(asked.given, samples=asked.given.samples.skipping(unfit)))

    def take(self, indices: NDArray[np.int64]) -> Request:
        """Return the request for the samples at `indices`, in the folds that they have."""
        return replace(
            self,
            given=self.given.take(indices),
            inputs={label: samples.take(indices) for label, samples in self.inputs.items()},
            tasks=[replace(t, fold=t.fold[torch.from_numpy(indices)]) for t in self.tasks],
            lengths={label: one.take(indices) for label, one in self.lengths.items()},
        )

    def with_samples(self, given: Labelled) -> Request:
        """Return the request for some of the samples, with folds of their own."""
        tasks, warned = scored_tasks(
            given, self.splits, self.options["group"], self.targets, self.options["select"]
        )
        return replace(self, given=given, tasks=tasks, warned=warned)

    @property
    def passes(self) -> int:
        """How often a model reads the samples: it itself, and its twin."""
        return 1 + ("random-weights" in self.controls)


def _several(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def as_splits(split: Any) -> list[Split]:
    """Take one split or several, each under a name of its own."""
    many = split if isinstance(split, list | tuple) else [split]
    if not many:
        raise ValueError("no split was given; write for example split=gf.KFold(5)")
    splits = [as_split(s) for s in many]
    names = [s.name for s in splits]
    if len(set(names)) < len(names):
        raise ValueError(f"two splits have the same name: {', '.join(names)}")
    return splits


def read_targets(samples: Samples, names: Sequence[str]) -> torch.Tensor:
    """Return the columns to regress, float64 [n, k]."""
    table = samples.table
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"targets= (--targets) needs one column or several, each once; got {list(names)}"
        )
    for name in names:
        if name not in table or not pd.api.types.is_numeric_dtype(table[name]):
            numeric = [c for c in table if pd.api.types.is_numeric_dtype(table[c])]
            raise ValueError(
                f"target {name!r} is not a numeric column; there are {', '.join(numeric)}"
            )
        if not np.isfinite(table[name]).all():
            row = int(np.flatnonzero(~np.isfinite(table[name]))[0])
            raise ValueError(
                f"target {name!r} of sample {table['id'].iloc[row]} is not a finite number"
            )
        if len(table) > 1 and table[name].nunique() == 1:
            value = table[name].iloc[0]
            raise ValueError(
                f"target {name!r} is {value} for every sample: there is nothing to regress"
            )
    return torch.from_numpy(table[list(names)].to_numpy(np.float64, copy=True))


def as_list(alphas: Any) -> list[float]:
    """Take penalties from any kind of sequence."""
    if not hasattr(alphas, "__len__") or np.ndim(alphas) != 1:
        raise ValueError(f"alphas must be a list of positive numbers; got {alphas!r}")
    return [float(a) for a in alphas]


def _check(options: Options, given: Labelled, alphas: Sequence[float]) -> None:
    """Refuse what would only fail after the forward pass."""
    sites, select, storage = options["sites"], options["select"], options["storage"]
    batch_size, workers = options["batch_size"], options["workers"]
    every_token = _each(options["pool"])
    if every_token and "rows" in (storage, "rows" if select == "loo" else ""):
        raise ValueError(
            f"pool {every_token!r} makes a row of every token, of which statistics alone are kept: "
            "leave out storage='rows' (--storage) and select='loo' (--select)"
        )
    if sites is not None and not len(sites):
        raise ValueError("sites= is empty; give names or globs, or None for every layer")
    if (batch_size is not None and batch_size < 1) or (workers or 0) < 0:
        msg = f"batch_size must be at least 1 and workers at least 0; got {batch_size}, {workers}"
        raise ValueError(msg)
    if storage not in ("auto", "rows", "gram"):
        raise ValueError(f"storage must be auto, rows or gram; got {storage!r}")
    if select not in (None, "loo", "gcv", "folds"):
        raise ValueError(f"select must be loo, gcv or folds; got {select!r}")
    if select == "loo" and storage == "gram":
        raise ValueError(
            "select='loo' (--select) needs rows: use storage='rows' (--storage), or select='gcv' "
            "or 'folds'"
        )
    if not len(alphas) or not all(0 < a < float("inf") for a in alphas):
        raise ValueError(f"alphas must be positive numbers; got {list(alphas)}")
    for name, x in given.baselines.items():
        if x.ndim != 2 or len(x) != len(given.samples):
            msg = (
                f"baseline {name!r} has shape {list(x.shape)} for {len(given.samples)} samples; "
                "give one row for each"
            )
            raise ValueError(msg)
        if not torch.isfinite(x).all():
            raise ValueError(f"baseline {name!r} has NaN or infinite values; replace them")


def _each(pool: Pools) -> str:
    """Return the first pool that makes a row of every token, or ""."""
    given = pool.values() if isinstance(pool, Mapping) else (pool,)
    pools = [one for some in given if some is not None for one in parse_pools(some)]
    return next((one.name for one in pools if one.each is not None), "")


def check_pools(model: Model, sites: str | Sequence[str] | None, pool: Pools) -> None:
    """Refuse pools of a tower that the model does not have, or of tokens that a tower has not."""
    towers = {t.name: t for t in model.towers}
    for name in pool if isinstance(pool, Mapping) else ():
        if name not in towers:
            raise ValueError(f"pool= names a tower {name!r}; {model.name} has {', '.join(towers)}")
    # DINOv3's ConvNeXt puts the mean of all patches, a cls, before them in its norm alone.
    wanted = [
        site
        for site in model.sites(sites)
        if not site.is_vector
        and not (towers[site.tower].channels_first and site.name.endswith(".norm"))
    ]
    by_tower = pools_by_tower(model.towers, wanted, pool)
    apart = ", or name the sites of one tower (sites=, --sites)" if len(by_tower) > 1 else ""
    for name, pools in by_tower.items():
        tower, roles = towers[name], model.roles(towers[name])
        # What stands before the patches, a model without numbers does not show.
        open_ = ("cls", "register") if name == "vision" and model.device.type == "meta" else ()
        for one in pools:
            lacking = [role for _, role in one.parts if role not in ("all", *roles, *open_)]
            if lacking:
                has = " and ".join(roles) or "a single vector"
                raise ValueError(
                    f"pool {one.name!r}: {name} has no {lacking[0]} token, but {has}; use "
                    f"{tower.default_pool} or mean{apart}"
                )


def scored_tasks(
    given: Labelled,
    splits: Sequence[Split],
    group: str | None,
    targets: Sequence[str],
    select: str | None,
) -> tuple[list[Task], list[str]]:
    """Return what is cross-validated, and warnings; see `plan.make_tasks`."""
    tasks, warned = make_tasks(given.samples.table, splits, group, given.y, targets)
    few = [t for t in tasks if t.folds < 3]
    if select == "folds" and few:
        msg = (
            f"select='folds' (--select) needs at least 3 folds, and split {few[0].split!r} has "
            f"{few[0].folds}; take more folds, or select='loo' or 'gcv'"
        )
        raise ValueError(msg)
    return tasks, warned
