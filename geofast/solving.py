"""Every site, pool, control and cross-validation of a probe, solved."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from .data import Samples
from .extract import Extracted, add_sentence
from .gram import Gram
from .plan import Task
from .request import Labelled
from .ridge import (
    Select,
    Solution,
    cross_validate,
    cross_validate_many,
    fit,
    fit_many,
    fold_errors,
    solve,
    solve_many,
)
from .run import Probe, key

Name = TypeVar("Name")
Source = TypeVar("Source", torch.Tensor, Gram)


@dataclass(frozen=True)
class Solved:
    """One site, pool, prompt and control in one cross-validation."""

    site: str
    pool: str
    prompt: str
    control: str
    task: int
    n: int
    """Rows: samples, or tokens of the pool `each`."""
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


def solve_all(
    found: Mapping[str, Extracted],
    given: Labelled,
    tasks: Sequence[Task],
    targets: Sequence[str],
    alphas: Sequence[float],
    select: Select,
) -> tuple[list[Solved], list[str]]:
    """Solve what was `found`, by the name of the control, and the baselines, in every task.

    Also a warning of every control that cannot be solved somewhere: it lacks those places alone.

    Raises
    ------
    ValueError, RuntimeError
        When the model's own cannot be solved; says which site, split and group.
    """
    sources: list[tuple[str, str, str, str, torch.Tensor | Gram]]
    sources = [("input", name, "", name, x) for name, x in given.baselines.items()]
    for control, one in found.items():
        both: dict[str, torch.Tensor | Gram] = {**(one.rows or {}), **(one.grams or {})}
        sources += [(*_parts(name), control, x) for name, x in both.items()]
    solved: list[Solved] = []
    failed: dict[str, list[str]] = {}
    of_all = [source[-1] for source in sources]
    together = [_solve_together(of_all, given.y, task, alphas, select) for task in tasks]
    for i, (site, pool, prompt, control, x) in enumerate(sources):
        for t, task in enumerate(tasks):  # one after the other, so that rows on disk are read once
            try:
                member, solution = _member(x, task), together[t].get(i)
                if solution is None:
                    solution = _solve_rows(x, given.y, task, member, alphas, select)
                if isinstance(solution, Exception):
                    raise solution
                _require_finite(solution)
            except (ValueError, RuntimeError, MemoryError) as error:
                who = f", group {task.group!r}" if task.group else ""
                where = f"{key(site, pool, prompt)}, split {task.split!r}{who}"
                if not control:
                    add_sentence(error, f"While solving {where}, targets {', '.join(targets)}.")
                    raise
                failed.setdefault(control, []).append(f"{where}: {error}".rstrip("."))
                continue
            n, d = _shape(x, task)
            solved.append(Solved(site, pool, prompt, control, t, n, d, solution, member))
    return sorted(solved, key=lambda s: s.task), [_missing(*item) for item in failed.items()]


def _missing(control: str, where: Sequence[str]) -> str:
    several = f"{len(where)} places, the first " if len(where) > 1 else ""
    return f"the control {control!r} could not be solved at {several}{where[0]}"


def _solve_together(
    sources: Sequence[torch.Tensor | Gram],
    y: torch.Tensor,
    task: Task,
    alphas: Sequence[float],
    select: Select,
) -> dict[int, Solution | Exception]:
    """Solve statistics, and rows on a GPU, all of one kind at once; by their place in `sources`."""
    grams = {i: x for i, x in enumerate(sources) if isinstance(x, Gram)}
    assert not grams or select != "loo"  # refused before the model was loaded
    options: dict[str, Any] = {"alphas": alphas, "select": select, "inner": task.folds >= 3}
    from_grams = partial(solve_many, folds=task.fold_of_cell, **options)
    from_rows = partial(cross_validate_many, y=y, fold=task.fold, **options)
    found: dict[int, Solution | Exception] = {}
    for alike in _alike(grams):
        found |= zip(alike, _each_solved([*alike.values()], from_grams), strict=True)
    for rows in _alike_on_gpu(enumerate(sources)):
        found |= zip(rows, _each_solved([*rows.values()], from_rows), strict=True)
    return found


def _alike(grams: Mapping[Name, Gram]) -> list[dict[Name, Gram]]:
    """Part statistics into those that can be solved together."""
    parts: defaultdict[object, dict[Name, Gram]] = defaultdict(dict)
    for name, gram in grams.items():
        parts[gram.dim, gram.targets, gram.cells, gram.matrix.device][name] = gram
    return [*parts.values()]


def _alike_on_gpu(
    sources: Iterable[tuple[Name, torch.Tensor | Gram]],
) -> list[dict[Name, torch.Tensor]]:
    """Part the rows that are on a GPU into those that can be solved together."""
    parts: defaultdict[object, dict[Name, torch.Tensor]] = defaultdict(dict)
    for name, x in sources:
        if isinstance(x, torch.Tensor) and not x.is_cpu:
            parts[x.shape, x.dtype, x.device][name] = x
    return [*parts.values()]


def _each_solved(
    sources: Sequence[Source], solved: Callable[[Sequence[Source]], Sequence[Solution | ValueError]]
) -> Sequence[Solution | Exception]:
    try:
        return solved(sources)
    except (ValueError, RuntimeError, MemoryError) as error:
        if len(sources) == 1:
            return [error]
    # One of them is to blame: the others need not go with it.
    return [one for source in sources for one in _each_solved([source], solved)]


def _solve_rows(
    x: torch.Tensor | Gram,
    y: torch.Tensor,
    task: Task,
    member: torch.Tensor | None,
    alphas: Sequence[float],
    select: Select,
) -> Solution:
    assert isinstance(x, torch.Tensor)
    fold = task.fold
    if member is not None:
        x, y, fold = x[member], y[member], fold[member]
    return cross_validate(x, y, fold, alphas, select=select, inner=task.folds >= 3)


def _member(x: torch.Tensor | Gram, task: Task) -> torch.Tensor | None:
    """Return the samples of the task's group, None for all; statistics know them by their cells."""
    left_out = task.fold < 0
    if isinstance(x, Gram) or not bool(left_out.any()):
        return None
    return (~left_out).nonzero()[:, 0]


def _require_finite(solution: Solution) -> None:
    if not bool(solution.coef.isfinite().all()):
        raise ValueError("the features are too large for float64: scale them down")


def _shape(x: torch.Tensor | Gram, task: Task) -> tuple[int, int]:
    """Return how many rows the task has, and their width."""
    if not isinstance(x, Gram):
        return int((task.fold >= 0).sum()), x.shape[1]
    assert task.fold_of_cell is not None
    return int(x.count.cpu()[task.fold_of_cell >= 0].sum()), x.dim


def _parts(name: str) -> tuple[str, str, str]:
    site, pool, *prompt = name.split("/", 2)
    return site, pool, prompt[0] if prompt else ""


def fit_probes(
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
    grid, by_folds = sorted(alphas), select == "folds"
    solutions: dict[str, Solution] = {}
    way: Any = "gcv" if by_folds else select  # of a single alpha there is nothing to choose
    rows = dict(found.rows or {})
    for alike in [] if by_folds else _alike_on_gpu(rows.items()):  # as below
        fitted = fit_many([*alike.values()], y, grid, select=way)
        solutions |= zip(alike, map(_or_raise, alike, fitted), strict=True)
    for name, x in rows.items():
        if name in solutions:
            continue
        errors = fold_errors(x, y, task.fold, grid).mean(0) if by_folds else None
        solutions[name] = fit(x, y, _least(grid, errors), select=way)
    for kind in _alike(found.grams or {}):
        # By folds, each has an alpha of its own.
        groups = [{name: gram} for name, gram in kind.items()] if by_folds else [kind]
        for group in groups:
            grams = [*group.values()]
            errors = _errors(grams[0], task, grid) if by_folds else None
            everyone = torch.zeros(grams[0].cells, dtype=torch.int64)
            solved = solve_many(grams, _least(grid, errors), folds=everyone)
            solutions |= zip(group, map(_or_raise, group, solved), strict=True)
    probes = {}
    for name in found.rows or found.grams or {}:
        s = solutions[name]
        alpha = float(s.alpha[0])
        probes[name] = Probe(*_parts(name), tuple(targets), alpha, s.coef[0], s.intercept[0])
    return probes


def _or_raise(name: str, solved: Solution | Exception) -> Solution:
    if isinstance(solved, Exception):
        add_sentence(solved, f"While fitting {name} to all samples.")
        raise solved
    return solved


def _errors(gram: Gram, task: Task, alphas: Sequence[float]) -> torch.Tensor:
    """Held-out squared error of every alpha, over folds and targets: [A]."""
    solved = [solve(gram, [a], folds=task.fold_of_cell) for a in alphas]
    return torch.stack([s.mse.mean() for s in solved if s.mse is not None])


def _least(alphas: Sequence[float], errors: torch.Tensor | None) -> Sequence[float]:
    return alphas if errors is None else [alphas[int(errors.argmin())]]


_FAR = 20
"""How many times as long as the median row a row is that is warned of: in sound runs 4 at most."""

FINAL_ALPHA = {
    "loo": "by exact leave-one-out over all samples",
    "gcv": "by generalised cross-validation over all samples",
    "folds": "by the least held-out squared error over the folds of split {split}",
}
"""How the penalty of the probes that are saved was chosen, by `select`."""


def at_the_edge(solved: Sequence[Solved], alphas: Sequence[float]) -> list[str]:
    """Warn where the best penalty may lie beyond those that were tried."""
    real = [s.solution.alpha for s in solved if not s.control]
    edges = {"smallest": min(alphas), "largest": max(alphas)}
    many = {which: sum(bool((a == edge).all()) for a in real) for which, edge in edges.items()}
    return [
        f"alpha is the {which} that was tried, {edges[which]:g}, for {n} of {len(real)} probes: "
        "with others in alphas= (--alphas) their R² may be higher"
        for which, n in many.items()
        if 10 * n >= len(real) and len(alphas) > 1
    ]


def far_out(found: Extracted, samples: Samples) -> list[str]:
    """Warn of rows much longer than the others of their site: one can decide every R² there.

    A language model's first token often has such a row, and in a text of one token it is the last
    one too. Statistics have no rows to look at.
    """
    if not found.rows:
        return []
    lengths = torch.stack([torch.linalg.vector_norm(x, dim=1).cpu() for x in found.rows.values()])
    times = (lengths / lengths.median(1, keepdim=True).values).nan_to_num(0, 0)  # of zeros, none
    far = times > _FAR
    if not far.any():
        return []
    who = [_named(samples, i) for i in far.any(0).nonzero()[:, 0].tolist()]
    more = f" and {len(who) - 3} more" if len(who) > 3 else ""
    where = [_parts(name) for name, one in zip(found.rows, far.any(1).tolist(), strict=True) if one]
    sites, pools, prompts = (list(dict.fromkeys(part)) for part in zip(*where, strict=True))
    words = f", {_several('prompt', prompts)} {', '.join(map(repr, prompts))}" if prompts[0] else ""
    leave = f"leave the {_several('sample', who)} out"
    in_words = "put words before the text in the prompt, or " if samples.kind == "text" else ""
    return [
        f"{len(who)} of {len(samples)} samples {'has' if len(who) == 1 else 'have'} a row more "
        f"than {_FAR} times as long as the median row, up to {float(times.max()):.0f} times, at "
        f"{len(sites)} {_several('site', sites)} ({_several('pool', pools)} {', '.join(pools)}"
        f"{words}): {', '.join(who[:3])}{more}. Such a row can decide an R²: {in_words}{leave}"
    ]


def _several(word: str, of: Sequence[str]) -> str:
    return word if len(of) == 1 else f"{word}s"


def _named(samples: Samples, index: int) -> str:
    """Name a sample, a text by its beginning too."""
    where = samples.where(index)
    return f"{where} ({samples.inputs[index][:40]!r})" if samples.kind == "text" else where
