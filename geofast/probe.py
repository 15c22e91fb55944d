"""`probe`: the main job. One forward pass, all sites, pools, prompts, folds and groups."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import nn

from . import _ops
from ._folder import check_space
from .batching import Budget, Lengths
from .capture import Pools
from .checks import Check
from .controls import check_controls, raw_inputs
from .data import Samples, read
from .data.stream import batches
from .doctor import quick
from .extract import (
    Extracted,
    Storage,
    add_sentence,
    extract,
    lengths_like,
    ready,
    try_one,
    usable,
    worded,
)
from .geo import Split, fold_scores, great_circle_km
from .geo.folds import KFold
from .gram import Gram
from .models import DeviceMap, Model, load
from .models.location import of_places
from .models.twin import random_twin
from .plan import Task, make_plan, with_cells, without_skipped
from .report.text import beside
from .request import (
    Given,
    as_list,
    as_splits,
    check_options,
    check_pools,
    read_targets,
    scored_tasks,
)
from .ridge import ALPHAS, Select, Solution, cross_validate, fit, fold_errors, solve
from .rows import on_disk
from .run import Probe, Run, key


def probe(
    model: str | Path | nn.Module | Model,
    data: str | Path | Samples,
    *,
    sites: str | Sequence[str] | None = None,
    pool: Pools = None,
    prompts: str | Sequence[str] | None = None,
    split: Split | Any | Sequence[Split | Any] = KFold(),  # noqa: B008 - frozen
    group: str | None = None,
    alphas: Sequence[float] = ALPHAS,
    select: Select | None = None,
    storage: Literal["auto", "rows", "gram"] = "auto",
    targets: str | Sequence[str] = ("latitude", "longitude"),
    baselines: Mapping[str, torch.Tensor] | None = None,
    controls: str | Sequence[str] = (),
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    device_map: DeviceMap | None = None,
    adapter: str | Path | None = None,
    merge: bool = False,
    trust_remote_code: bool = False,
    batch_size: int | None = None,
    workers: int | None = None,
    scratch: str | Path | None = None,
    strict: bool = False,
    check: bool = True,
    progress: bool = False,
) -> Run:
    """Probe every site of a model for where its samples are.

    Parameters
    ----------
    model
        What `load` takes.
    data
        What `data.read` takes, or `Samples`. A location encoder reads the places of any samples.
    sites
        Names or globs; None takes `embed` and every layer of every tower.
    pool
        A pool or several, or a mapping from tower to such; None for each tower's default.
    prompts
        For text: one template or several that name columns, `{text}` being the input itself,
        which is what None takes. For images: what a model that talks about them is asked, one
        prompt or several; None shows it the image alone. The image is looked at once for all.
    split
        One or several ways to make folds: ours (`KFold`, `Blocks`, `GroupKFold`) or any
        scikit-learn splitter.
    group
        A column; each of its values is also probed on its own, with folds of its own. Values that
        cannot be scored are left out with a warning in `Run.info`.
    alphas, select
        Penalties, and how one is chosen: `loo`, `gcv` or `folds`. None takes `loo` where rows are
        kept and `gcv` where only statistics are.
    storage
        `rows`, `gram`, or `auto`: rows while they fit a quarter of the machine's memory, else
        whichever of rows on disk and statistics is smaller. Kilometres, MAE, Spearman and `loo`
        need rows. Rows on disk are not in the run's folder.
    targets
        Numeric columns to regress, degrees or any other unit.
    baselines
        Named features [n, d] of the same samples, probed beside the model as controls.
    controls
        One or several, probed beside the model. `random-weights`: a twin of the model whose weights
        nobody trained, at every site. `pixels`: an image's 16 x 16 RGB thumbnail. `tokens`: how
        often a text, prompt included, has each of the 1024 most frequent token ids.
    device, dtype, device_map, adapter, merge, trust_remote_code
        What `load` takes.
    batch_size
        At most so many samples in a forward pass; None leaves it to the budget of tokens that
        forms batches, largest first. Where memory runs out, the batch is halved and run again.
    workers
        Processes that decode ahead of the model; None takes one for images, none for text.
    scratch
        Folder for rows that memory is too small for, on the disk where the run will be saved:
        what it will need there is held against the free space before the pass. None takes the
        system's temporary folder for such rows, and holds nothing.
    strict
        Stop at the first sample that cannot be used instead of counting it as skipped.
    check
        Stop before the pass when the model fails the quick checks of `doctor` on the first
        samples: two passes differ, or a batch differs from its samples alone.
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
    OSError
        When `scratch` has no room for the run or for rows that must go to disk.
    """
    clock = _Clock()
    places = of_places(model)
    samples = data if isinstance(data, Samples) else read(data, location=places, strict=strict)
    samples = samples.as_locations() if places else samples
    splits = as_splits(split)
    targets = [targets] if isinstance(targets, str) else list(targets)
    given = Given(samples, read_targets(samples, targets), dict(baselines or {}))
    alphas = as_list(alphas)
    check_options(given, sites, alphas, select, storage, batch_size, workers)
    controls = [controls] if isinstance(controls, str) else list(dict.fromkeys(controls))
    check_controls(controls, samples.kind, given.baselines)
    inputs = worded(samples, prompts)
    tasks, warned = scored_tasks(
        given, splits, group, targets, select
    )  # before the model is loaded
    loaded = load(
        model, device=device, dtype=dtype, device_map=device_map, adapter=adapter, merge=merge,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    model = ready(loaded, samples, prompts, sites)
    check_pools(model, pool)
    lengths: Mapping[str, Lengths] = {}
    if samples.kind == "text":
        good, unfit, lengths = usable(model, inputs, strict)
        if unfit:
            given, inputs = given.take(good), {k: s.take(good) for k, s in inputs.items()}
            given = replace(given, samples=given.samples.skipping(unfit))
            tasks, warned = scored_tasks(given, splits, group, targets, select)
    clock.lap("load")
    checks = _examine(model, inputs, batch_size) if check else []
    clock.lap("check")

    cells, tasks = with_cells(tasks)
    example = try_one(model, inputs, lengths, sites, pool)
    lengths = lengths or lengths_like(example, len(samples))
    budget = Budget.of(model.device, batch_size)
    plan = make_plan(
        model, inputs, example.widths, targets=len(targets), cells=int(cells.max()) + 1,
        storage=storage, select=select,
    )  # fmt: skip
    if progress:
        print(f"{plan.sentence}; {budget.sentence(lengths.values())}", flush=True)
    if scratch:
        check_space(Path(scratch), plan.kept)

    def one_pass(model: Model) -> Extracted:
        room = None
        if plan.on_disk:
            folder = Path(scratch or tempfile.gettempdir())
            room = on_disk(folder, plan.floats * len(inputs)).view(len(inputs), plan.floats)
        place = Storage(plan.kind, given.y, cells, room, plan.stay)
        return extract(
            model, inputs, place, sites=sites, pool=pool,
            lengths=lengths, budget=budget, workers=_workers(samples, workers), strict=strict,
            progress=progress,
        )  # fmt: skip

    def control(name: str, kept: NDArray[np.int64]) -> Extracted:
        if name == "random-weights":
            return one_pass(replace(random_twin(model), name=f"{model.name}, random weights"))
        room = Storage(plan.kind, given.y, cells)
        return raw_inputs(name, model, inputs, room, kept, _workers(samples, workers))

    found = one_pass(model)
    others = {name: control(name, found.kept) for name in controls}
    clock.lap("forward")
    if len(found.kept) < len(given.samples):
        kept = given.take(found.kept)
        if found.rows is not None:
            tasks, warned = scored_tasks(kept, splits, group, targets, select)
        else:
            tasks, more = without_skipped(tasks, found.kept, given.y, targets)
            warned = warned + more
        given = replace(kept, samples=kept.samples.skipping(found.skipped))
    select = select or ("loo" if found.rows is not None else "gcv")
    solved = _solve_all({"": found, **others}, given, tasks, targets, alphas, select)
    probes = _probes(found, given.y, tasks[0], targets, alphas, select)
    clock.lap("solve")

    layers = _table(solved, tasks, given.y, targets)
    info = {
        "model": model.name,
        "data": samples.source,
        "arguments": {
            "sites": sites, "pool": pool, "group": group,
            "prompts": [prompts] if isinstance(prompts, str) else prompts,
            "split": {s.name: repr(s) for s in splits},
            "alphas": alphas, "select": select, "storage": plan.kind,
            "targets": targets, "baselines": [*given.baselines], "controls": controls,
            "batch_size": batch_size,
            "workers": _workers(samples, workers),
        },
        "seeds": {s.name: s.seed for s in splits if hasattr(s, "seed")},
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "backend": _ops.describe(model.device),
        "methods": sorted({s.solution.method for s in solved}),
        "final_alpha": _FINAL_ALPHA[select].format(split=tasks[0].split),
        "storage": plan.sentence,
        "batch": {"samples": budget.largest, "tokens": budget.tokens},
        "counts": {
            "read": len(given.samples),
            "skipped": len(given.samples.skipped),
            "why": [str(s) for s in given.samples.skipped],
        },
        "seconds": clock.seconds,
        "versions": _versions(),
        "honest": _honest(solved, layers),
        "checks": [asdict(c) for c in checks],
        "warnings": [*model.notes, *budget.warnings, *warned, *_at_the_edge(solved, alphas)],
    }  # fmt: skip
    return Run(
        info=info,
        layers=layers,
        samples=_samples_table(given.samples, tasks),
        probes=probes,
        predictions=_predictions(solved, tasks, given, targets),
        rows=found.rows if not plan.on_disk else None,
        grams=found.grams,
    )


# ------ before the pass


def _examine(model: Model, inputs: Mapping[str, Samples], batch_size: int | None) -> list[Check]:
    """Make the quick checks on the first samples; refuse a model that fails one."""
    samples = next(iter(inputs.values()))
    stream = batches(samples, range(min(3, len(samples))), 3, transform=model.transform)
    try:
        few = [x for batch in stream for x in batch.inputs]
        checks = quick(model, few, batched=batch_size != 1)
    except (ValueError, RuntimeError, FloatingPointError):
        return []  # what is wrong with a sample, the pass itself says, and of which
    for check in checks:
        if check.outcome == "fail":
            raise ValueError(
                f"{model.name} fails the check {check.name!r}: {check.detail}; {check.advice}. "
                "`geofast doctor` examines the whole model; check=False (--unchecked) goes on"
            )
    return checks


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
    found: Mapping[str, Extracted],
    given: Given,
    tasks: Sequence[Task],
    targets: Sequence[str],
    alphas: Sequence[float],
    select: Select,
) -> list[_Solved]:
    solved = []
    for t, task in enumerate(tasks):
        inner = task.folds >= 3
        sources = [("input", name, "", name, x) for name, x in given.baselines.items()]
        for control, one in found.items():
            sources += [(*_parts(name), control, x) for name, x in (one.rows or {}).items()]
            for name, gram in (one.grams or {}).items():
                solution = solve(
                    gram, alphas, folds=task.fold_of_cell, select=_of_grams(select), inner=inner
                )
                solved.append(_Solved(*_parts(name), control, t, gram.dim, solution, None))
        for site, pool, prompt, control, x in sources:
            try:
                solution, member = _solve_rows(x, given.y, task.fold, alphas, select, inner)
            except ValueError as error:
                who = f", group {task.group!r}" if task.group else ""
                where = f"{key(site, pool, prompt)}, split {task.split!r}{who}"
                add_sentence(error, f"While solving {where}, targets {', '.join(targets)}.")
                raise
            solved.append(_Solved(site, pool, prompt, control, t, x.shape[1], solution, member))
    return solved


def _solve_rows(
    x: torch.Tensor,
    y: torch.Tensor,
    fold: torch.Tensor,
    alphas: Sequence[float],
    select: Select,
    inner: bool,
) -> tuple[Solution, torch.Tensor | None]:
    member = None
    if bool((fold < 0).any()):
        member = (fold >= 0).nonzero()[:, 0]
        x, y, fold = x[member], y[member], fold[member]
    return cross_validate(x, y, fold, alphas, select=select, inner=inner), member


def _of_grams(select: Select) -> Literal["gcv", "folds"]:
    assert select != "loo"  # refused before the model was loaded
    return select


def _parts(name: str) -> tuple[str, str, str]:
    site, pool, *prompt = name.split("/", 2)
    return site, pool, prompt[0] if prompt else ""


def _probes(
    found: Extracted,
    y: torch.Tensor,
    task: Task,
    targets: Sequence[str],
    alphas: Sequence[float],
    select: Select,
) -> dict[str, Probe]:
    """Fit every site to all samples: the probes that are saved.

    With all samples in one training part, `loo` and `gcv` choose alpha as they did in the folds.
    `folds` takes the alpha of least error over the folds of `task`, the first split.
    """
    grid, by_folds, solutions = sorted(alphas), select == "folds", {}
    way: Any = "gcv" if by_folds else select  # of a single alpha there is nothing to choose
    for name, x in (found.rows or {}).items():
        errors = fold_errors(x, y, task.fold, grid).mean(0) if by_folds else None
        solutions[name] = fit(x, y, _least(grid, errors), select=way)
    for name, gram in (found.grams or {}).items():
        errors = _errors(gram, task, grid) if by_folds else None
        everyone = torch.zeros(gram.cells, dtype=torch.int64)
        solutions[name] = solve(gram, _least(grid, errors), folds=everyone)
    return {
        name: Probe(*_parts(name), tuple(targets), float(s.alpha[0]), s.coef[0], s.intercept[0])
        for name, s in solutions.items()
    }


def _errors(gram: Gram, task: Task, alphas: Sequence[float]) -> torch.Tensor:
    """Held-out squared error of every alpha, over folds and targets: [A]."""
    solved = [solve(gram, [a], folds=task.fold_of_cell) for a in alphas]
    return torch.stack([s.mse.mean() for s in solved if s.mse is not None])


def _least(alphas: Sequence[float], errors: torch.Tensor | None) -> Sequence[float]:
    return alphas if errors is None else [alphas[int(errors.argmin())]]


_FINAL_ALPHA = {
    "loo": "by exact leave-one-out over all samples",
    "gcv": "by generalised cross-validation over all samples",
    "folds": "by the least held-out squared error over the folds of split {split}",
}


def _at_the_edge(solved: Sequence[_Solved], alphas: Sequence[float]) -> list[str]:
    """Warn where the best penalty may lie beyond those that were tried."""
    real = [s.solution.alpha for s in solved if not s.control]
    edges = {"smallest": min(alphas), "largest": max(alphas)}
    many = {which: sum(bool((a == edge).all()) for a in real) for which, edge in edges.items()}
    return [
        f"alpha is the {which} that was tried, {edges[which]:g}, for {n} of {len(real)} probes: "
        "with others in alphas= (--alphas) their R2 may be higher"
        for which, n in many.items()
        if 10 * n >= len(real) and len(alphas) > 1
    ]


# ------ tables


def _table(
    solved: Sequence[_Solved], tasks: Sequence[Task], y: torch.Tensor, targets: Sequence[str]
) -> pd.DataFrame:
    rows = []
    for s in solved:
        task, r2 = tasks[s.task], s.solution.r2
        assert r2 is not None
        assert s.solution.mse is not None
        per_fold = r2.mean(1)
        row: dict[str, Any] = {
            "site": s.site,
            "tower": "" if s.site == "input" else s.site.partition(".")[0],
            "layer": _layer(s.site),
            "pool": s.pool,
            "prompt": s.prompt,
            "group": task.group,
            "split": task.split,
            "control": s.control,
            "n": int((task.fold >= 0).sum()),
            "d": s.d,
            "alpha": _common_alpha(s.solution.alpha),
            "r2": float(per_fold.mean()),
            "r2_se": _standard_error(per_fold),
        }
        for i, name in enumerate(targets):
            row[f"r2_{name}"] = float(r2[:, i].mean())
            row[f"rmse_{name}"] = float(s.solution.mse[:, i].sqrt().mean())
        rows.append(row | _row_scores(s, task, y, targets))
    table = pd.DataFrame(rows)
    return table.join(beside(table).add_prefix("r2:"))


def _row_scores(
    s: _Solved, task: Task, y: torch.Tensor, targets: Sequence[str]
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


def _common_alpha(alpha: torch.Tensor) -> float:
    """Return the alpha of all folds, exactly; where they differ, their geometric mean."""
    first = float(alpha[0])
    return first if bool((alpha == first).all()) else float(alpha.log().mean().exp())


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
        names = [key(c.site, c.pool, c.prompt) for c in (candidates[int(i)] for i in chosen)]
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
    tasks: Sequence[Task],
    given: Given,
    targets: Sequence[str],
) -> pd.DataFrame:
    """Held-out predictions of the best probe of every split."""
    tables = [_best_predictions(s, tasks[s.task], given, targets) for s in _bests(solved, tasks)]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _bests(solved: Sequence[_Solved], tasks: Sequence[Task]) -> Iterator[_Solved]:
    for t, task in enumerate(tasks):
        real = [
            s
            for s in solved
            if s.task == t and not s.control and s.solution.predictions is not None
        ]
        if real and not task.group:
            yield max(real, key=lambda s: float(s.r2.mean()))


def _best_predictions(s: _Solved, task: Task, given: Given, targets: Sequence[str]) -> pd.DataFrame:
    assert s.solution.predictions is not None
    guess = s.solution.predictions.numpy()
    table = pd.DataFrame({"split": task.split, "id": given.samples.table["id"].to_numpy()})
    table["site"], table["pool"], table["prompt"] = s.site, s.pool, s.prompt
    table["fold"] = task.fold.numpy()
    for i, name in enumerate(targets):
        table[name], table[f"{name}_predicted"] = given.y[:, i].numpy(), guess[:, i]
    if {"latitude", "longitude"} <= set(targets):
        table["error_km"] = great_circle_km(
            table["latitude"], table["longitude"],
            table["latitude_predicted"].clip(-90, 90), table["longitude_predicted"],
        )  # fmt: skip
    return table


def _samples_table(samples: Samples, tasks: Sequence[Task]) -> pd.DataFrame:
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
