"""`probe`: the main job. One forward pass, all sites, pools, prompts, folds and groups."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import nn

from . import _ops
from .capture import Pools
from .data import Samples, read
from .extract import Extracted, Storage, extract, word
from .geo import Split, fold_scores, great_circle_km
from .geo.folds import KFold, as_split
from .models import Model, load
from .ridge import ALPHAS, Select, Solution, cross_validate, fit, solve
from .run import Probe, Run

_MEMORY_SHARE = 0.25  # of the machine's memory, for pooled rows


def probe(
    model: str | Path | nn.Module | Model,
    data: str | Path | Samples,
    *,
    sites: str | Sequence[str] | None = None,
    pool: Pools = None,
    prompts: Sequence[str] = ("{text}",),
    split: Split | Any | Sequence[Split | Any] = KFold(),  # noqa: B008 - frozen
    group: str | None = None,
    alphas: Sequence[float] = ALPHAS,
    select: Select | None = None,
    storage: Literal["auto", "rows", "gram"] = "auto",
    targets: Sequence[str] = ("latitude", "longitude"),
    baselines: Mapping[str, torch.Tensor] | None = None,
    batch_size: int = 16,
    workers: int | None = None,
    strict: bool = False,
    progress: bool = False,
) -> Run:
    """Probe every site of a model for where its samples are.

    Parameters
    ----------
    model
        What `load` takes.
    data
        What `data.read` takes, or `Samples`.
    sites
        Names or globs; None takes `embed` and every layer of every tower.
    pool
        A pool or several, or a mapping from tower to such; None for each tower's default.
    prompts
        For text: templates that name columns, `{text}` being the input itself.
    split
        One or several ways to make folds: ours (`KFold`, `Blocks`, `GroupKFold`) or any
        scikit-learn splitter.
    group
        A column; each of its values is also probed on its own, with folds of its own.
    alphas, select
        Penalties, and how one is chosen: `loo`, `gcv` or `folds`. None takes `loo` where rows are
        kept and `gcv` where only statistics are.
    storage
        `rows`, `gram`, or `auto`: rows while they fit a quarter of the machine's memory, else
        whichever of rows on disk and statistics is smaller. Kilometres, MAE, Spearman and `loo`
        need rows.
    targets
        Numeric columns to regress, degrees or any other unit.
    baselines
        Named features [n, d] of the same samples, probed beside the model as controls.
    batch_size, workers
        Samples in a forward pass, and processes that decode ahead of it (None: one for images
        on files, none for the rest).
    strict
        Stop at the first sample that cannot be read instead of counting it as skipped.
    progress
        Print the plan, and a bar with the time left.

    Returns
    -------
    Run
        Tables, probes and held-out predictions; `save` writes the folder.

    Raises
    ------
    ValueError
        For bad data, splits, sites, pools or targets; the message says what to do.
    FloatingPointError
        For NaN or infinite activations, naming site, sample and dtype.
    """
    clock = _Clock()
    samples = data if isinstance(data, Samples) else read(data)
    splits = _as_splits(split)
    y = _targets(samples, targets)
    tasks = _tasks(samples.table, splits, group)  # fails before the model is loaded
    model = load(model)
    if samples.kind != model.kind:
        raise ValueError(f"{model.name} reads {model.kind}; {samples.source} holds {samples.kind}")
    clock.lap("load")

    cells, fold_of_cell = _cells(tasks)
    plan = _plan(model, samples, sites, pool, prompts, y.shape[1], int(cells.max()) + 1, storage)
    if progress:
        print(plan.sentence, flush=True)
    with TemporaryDirectory(prefix="geofast-rows-") as folder:
        store = Storage(plan.kind, y, cells, Path(folder) if plan.on_disk else None)
        found = extract(
            model, samples, store, sites=sites, pool=pool, prompts=prompts, batch_size=batch_size,
            workers=_workers(samples, workers), strict=strict, progress=progress,
        )  # fmt: skip
        clock.lap("forward")
        if len(found.kept) < len(samples):
            samples = samples.take(found.kept)
            y = y[found.kept]
            tasks = _tasks(samples.table, splits, group)
            baselines = {k: v[found.kept] for k, v in (baselines or {}).items()}
        select = select or ("loo" if found.rows is not None else "gcv")
        solved = _solve_all(found, baselines or {}, y, tasks, fold_of_cell, alphas, select)
        probes = _probes(found, y, targets, alphas, select)
        clock.lap("solve")

    layers = _table(solved, tasks, y, targets)
    info = {
        "model": model.name,
        "data": samples.source,
        "arguments": {
            "sites": sites, "pool": pool, "prompts": list(prompts), "group": group,
            "split": [s.name for s in splits], "alphas": [float(a) for a in alphas],
            "select": select, "storage": plan.kind, "targets": list(targets),
            "batch_size": batch_size, "workers": _workers(samples, workers),
        },
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "backend": _ops.describe(model.device),
        "methods": sorted({s.solution.method for s in solved}),
        "storage": plan.sentence,
        "counts": {
            "read": len(samples),
            "skipped": len(found.skipped) + len(samples.skipped),
            "why": [f"{s.where}: {s.reason}" for s in [*samples.skipped, *found.skipped]],
        },
        "seconds": clock.seconds,
        "versions": _versions(),
        "honest": _honest(solved, layers),
        "warnings": [],
    }  # fmt: skip
    return Run(
        info=info,
        layers=layers,
        samples=_samples_table(samples, tasks, targets),
        probes=probes,
        predictions=_predictions(solved, tasks, samples, y, targets),
        rows=found.rows if not plan.on_disk else None,
        grams=found.grams,
    )


# ------ what is to be done


@dataclass(frozen=True)
class _Task:
    """One cross-validation: a split, of everybody or of one group."""

    split: str
    group: str
    fold: torch.Tensor
    """int64 [n]; -1 outside the group."""


def _as_splits(split: Any) -> list[Split]:
    many = split if isinstance(split, list | tuple) else [split]
    if not many:
        raise ValueError("no split was given; write for example split=gf.KFold(5)")
    splits = [as_split(s) for s in many]
    names = [s.name for s in splits]
    if len(set(names)) < len(names):
        raise ValueError(f"two splits have the same name: {', '.join(names)}")
    return splits


def _targets(samples: Samples, names: Sequence[str]) -> torch.Tensor:
    table = samples.table
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
        if table[name].nunique() == 1:
            value = table[name].iloc[0]
            raise ValueError(
                f"target {name!r} is {value} for every sample: there is nothing to regress"
            )
    return torch.from_numpy(table[list(names)].to_numpy(np.float64, copy=True))


def _tasks(table: pd.DataFrame, splits: Sequence[Split], group: str | None) -> list[_Task]:
    tasks = [_Task(s.name, "", torch.from_numpy(s.assign(table))) for s in splits]
    if group is None:
        return tasks
    if group not in table:
        raise ValueError(
            f"there is no column {group!r} to group by; the samples have {', '.join(table)}"
        )
    for value in sorted(table[group].dropna().unique(), key=str):
        member = (table[group] == value).to_numpy(copy=True)
        for split in splits:
            fold = torch.full((len(table),), -1)
            fold[torch.from_numpy(member)] = torch.from_numpy(split.assign(table[member]))
            tasks.append(_Task(split.name, str(value), fold))
    return tasks


def _cells(tasks: Sequence[_Task]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the cell of every sample [n], and for each task the fold of every cell."""
    folds = torch.stack([t.fold for t in tasks], 1)
    combinations, cell = folds.unique(dim=0, return_inverse=True)
    return cell, list(combinations.unbind(1))


@dataclass(frozen=True)
class _Plan:
    kind: Literal["rows", "gram"]
    on_disk: bool
    sentence: str


def _plan(
    model: Model,
    samples: Samples,
    sites: Any,
    pool: Pools,
    prompts: Sequence[str],
    targets: int,
    cells: int,
    storage: str,
) -> _Plan:
    """Choose where pooled rows go, from their widths in a pass over one sample."""
    from .capture import capture

    first = word(samples.take(np.arange(1)), prompts[0]) if samples.kind == "text" else samples
    with capture(model, sites, pool) as rows:
        model.forward(model.prepare([_first(first)]))
    widths = [rows[key].shape[1] for key in rows for _ in prompts]
    as_rows = 4 * len(samples) * sum(widths)
    as_grams = 8 * cells * sum((w + 1 + targets) ** 2 for w in widths)
    budget = int(_MEMORY_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    kind: Literal["rows", "gram"]
    if storage == "auto":
        kind = "rows" if as_rows <= max(budget, as_grams) else "gram"
        why = (
            f"chosen: rows need {_mb(as_rows)}, statistics {_mb(as_grams)}, "
            f"memory for them is {_mb(budget)}"
        )
    elif storage in ("rows", "gram"):
        kind = "gram" if storage == "gram" else "rows"
        why = f"as asked: {_mb(as_rows if kind == 'rows' else as_grams)}"
    else:
        raise ValueError(f"storage must be auto, rows or gram; got {storage!r}")
    on_disk = kind == "rows" and as_rows > budget
    where = {"gram": "statistics (Gram matrices)", "rows": "pooled rows"}[kind]
    sentence = (
        f"{model.name}: {len(rows)} site x pool, {len(samples)} samples, {len(prompts)} prompt(s); "
        f"keeping {where}{' on disk' if on_disk else ''} ({why})"
    )
    return _Plan(kind, on_disk, sentence)


def _first(samples: Samples) -> Any:
    for i in range(len(samples)):
        try:
            return samples.load(i)
        except (OSError, ValueError):
            continue
    raise ValueError(f"none of the {len(samples)} samples of {samples.source} could be read")


def _mb(n: int) -> str:
    return f"{n / 2**20:,.0f} MB" if n < 2**30 else f"{n / 2**30:,.1f} GB"


def _workers(samples: Samples, workers: int | None) -> int:
    return workers if workers is not None else int(samples.kind == "image")


# ------ solving


@dataclass(frozen=True)
class _Solved:
    site: str
    pool: str
    prompt: str
    control: str
    task: int
    d: int
    solution: Solution
    member: torch.Tensor | None
    """int64: the samples of the group; None for all."""

    @property
    def r2(self) -> torch.Tensor:
        """[F]: held-out R2, mean over targets."""
        assert self.solution.r2 is not None
        return self.solution.r2.mean(1)

    @property
    def inner_r2(self) -> torch.Tensor:
        """[F]: R2 on the inner folds, mean over targets."""
        assert self.solution.inner_r2 is not None
        return self.solution.inner_r2.mean(1)


def _solve_all(
    found: Extracted,
    baselines: Mapping[str, torch.Tensor],
    y: torch.Tensor,
    tasks: Sequence[_Task],
    fold_of_cell: Sequence[torch.Tensor],
    alphas: Sequence[float],
    select: Select,
) -> list[_Solved]:
    solved = []
    for t, task in enumerate(tasks):
        inner = int(task.fold.max()) >= 2
        for key, x in (found.rows or {}).items():
            solved.append(_solve_rows(key, "", x, y, t, task, alphas, select, inner))
        for key, gram in (found.grams or {}).items():
            if select == "loo":
                raise ValueError(
                    "select='loo' needs rows: use storage='rows', or select='gcv' or 'folds'"
                )
            solution = solve(gram, alphas, folds=fold_of_cell[t], select=select, inner=inner)
            solved.append(_Solved(*_parts(key), "", t, gram.dim, solution, None))
        for name, x in baselines.items():
            solved.append(_solve_rows(f"input/{name}", name, x, y, t, task, alphas, "loo", inner))
    return solved


def _solve_rows(
    key: str,
    control: str,
    x: torch.Tensor,
    y: torch.Tensor,
    t: int,
    task: _Task,
    alphas: Sequence[float],
    select: Select,
    inner: bool,
) -> _Solved:
    member = None
    fold = task.fold
    if bool((fold < 0).any()):
        member = (fold >= 0).nonzero()[:, 0]
        x, y, fold = x[member], y[member], fold[member]
    try:
        solution = cross_validate(x, y, fold, alphas, select=select, inner=inner)
    except ValueError as error:
        group = f", group {task.group}" if task.group else ""
        error.add_note(f"While solving {key}, split {task.split}{group}.")
        raise
    return _Solved(*_parts(key), control, t, x.shape[1], solution, member)


def _parts(key: str) -> tuple[str, str, str]:
    site, pool, *prompt = key.split("/", 2)
    return site, pool, prompt[0] if prompt else ""


def _probes(
    found: Extracted,
    y: torch.Tensor,
    targets: Sequence[str],
    alphas: Sequence[float],
    select: Select,
) -> dict[str, Probe]:
    """Fit every site on all samples; alpha as in the folds, where it needs none."""
    way: Any = "gcv" if select == "folds" else select
    solutions = {key: fit(x, y, alphas, select=way) for key, x in (found.rows or {}).items()}
    for key, gram in (found.grams or {}).items():
        solutions[key] = solve(gram, alphas, folds=torch.zeros(gram.cells, dtype=torch.int64))
    return {
        key: Probe(*_parts(key), tuple(targets), float(s.alpha[0]), s.coef[0], s.intercept[0])
        for key, s in solutions.items()
    }


# ------ tables


def _table(
    solved: Sequence[_Solved], tasks: Sequence[_Task], y: torch.Tensor, targets: Sequence[str]
) -> pd.DataFrame:
    rows = []
    for s in solved:
        task, r2 = tasks[s.task], s.solution.r2
        assert r2 is not None
        assert s.solution.mse is not None
        per_fold = r2.mean(1)
        row: dict[str, Any] = {
            "site": s.site,
            "tower": "" if s.control else s.site.partition(".")[0],
            "layer": _layer(s.site),
            "pool": s.pool,
            "prompt": s.prompt,
            "group": task.group,
            "split": task.split,
            "control": s.control,
            "n": int((task.fold >= 0).sum()),
            "d": s.d,
            "alpha": float(s.solution.alpha.log().mean().exp()),
            "r2": float(per_fold.mean()),
            "r2_se": _standard_error(per_fold),
        }
        for i, name in enumerate(targets):
            row[f"r2_{name}"] = float(r2[:, i].mean())
            row[f"rmse_{name}"] = float(s.solution.mse[:, i].sqrt().mean())
        rows.append(row | _row_scores(s, task, y, targets))
    return pd.DataFrame(rows)


def _row_scores(
    s: _Solved, task: _Task, y: torch.Tensor, targets: Sequence[str]
) -> dict[str, float]:
    """Scores that need predictions; none without."""
    if s.solution.predictions is None:
        return {}
    fold = task.fold
    if s.member is not None:
        y, fold = y[s.member], fold[s.member]
    place = {name: targets.index(name) for name in ("latitude", "longitude") if name in targets}
    scores = fold_scores(s.solution.predictions[None].numpy(), y.numpy(), fold.numpy(), **place)
    out = {}
    for i, name in enumerate(targets):
        out[f"mae_{name}"] = float(scores.mae[0, :, i].mean())
        out[f"spearman_{name}"] = float(scores.spearman[0, :, i].mean())
    if scores.mean_km is not None and scores.median_km is not None:
        out["mean_km"] = float(scores.mean_km.mean())
        out["median_km"] = float(scores.median_km.mean())
    return out


def _layer(site: str) -> int | None:
    parts = site.split(".")
    return int(parts[2]) if len(parts) > 2 and parts[1] == "layers" else None


def _standard_error(per_fold: torch.Tensor) -> float:
    return float(per_fold.std() / len(per_fold) ** 0.5)


def _honest(solved: Sequence[_Solved], layers: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Choose the probe on inner folds, score it on outer ones; by split, for everybody."""
    honest = {}
    for split in dict.fromkeys(layers["split"]):
        named = (layers["split"] == split) & (layers["group"] == "") & (layers["control"] == "")
        candidates = [solved[i] for i in np.flatnonzero(named).tolist()]
        if not candidates or candidates[0].solution.inner_r2 is None:
            continue
        inner = torch.stack([c.inner_r2 for c in candidates])
        outer = torch.stack([c.r2 for c in candidates])
        chosen = inner.nan_to_num(-torch.inf).argmax(0)
        r2 = outer[chosen, torch.arange(len(chosen))]
        names = [f"{candidates[int(i)].site}/{candidates[int(i)].pool}" for i in chosen]
        most = candidates[int(chosen.mode().values)]
        honest[split] = {
            "site": most.site,
            "pool": most.pool,
            "prompt": most.prompt,
            "r2": float(r2.mean()),
            "r2_se": _standard_error(r2),
            "chosen": names,
        }
    return honest


def _predictions(
    solved: Sequence[_Solved],
    tasks: Sequence[_Task],
    samples: Samples,
    y: torch.Tensor,
    targets: Sequence[str],
) -> pd.DataFrame:
    """Held-out predictions of the best probe of every split."""
    tables = [
        _best_predictions(s, tasks[s.task], samples, y, targets) for s in _bests(solved, tasks)
    ]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _bests(solved: Sequence[_Solved], tasks: Sequence[_Task]) -> Iterator[_Solved]:
    for t, task in enumerate(tasks):
        real = [
            s
            for s in solved
            if s.task == t and not s.control and s.solution.predictions is not None
        ]
        if real and not task.group:
            yield max(real, key=lambda s: float(s.r2.mean()))


def _best_predictions(
    s: _Solved, task: _Task, samples: Samples, y: torch.Tensor, targets: Sequence[str]
) -> pd.DataFrame:
    assert s.solution.predictions is not None
    guess = s.solution.predictions.numpy()
    table = pd.DataFrame({"split": task.split, "id": samples.table["id"].to_numpy()})
    table["site"], table["pool"], table["prompt"] = s.site, s.pool, s.prompt
    table["fold"] = task.fold.numpy()
    for i, name in enumerate(targets):
        table[name], table[f"{name}_predicted"] = y[:, i].numpy(), guess[:, i]
    if {"latitude", "longitude"} <= set(targets):
        table["error_km"] = great_circle_km(
            table["latitude"], table["longitude"],
            table["latitude_predicted"].clip(-90, 90), table["longitude_predicted"],
        )  # fmt: skip
    return table


def _samples_table(
    samples: Samples, tasks: Sequence[_Task], targets: Sequence[str]
) -> pd.DataFrame:
    table = samples.table.copy()
    for task in tasks:
        if not task.group:
            table[f"fold_{task.split}"] = task.fold.numpy()
    return table


class _Clock:
    """Seconds per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = round(now - self._last, 3)
        self._last = now


def _versions() -> dict[str, str]:
    import platform
    from importlib.metadata import version

    names = ("geofast", "torch", "transformers", "numpy", "scikit-learn")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
