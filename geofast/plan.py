"""What a probe will do: its cross-validations, and where the pooled rows go."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from ._folder import check_space
from .data import Samples
from .data.samples import Lazy
from .geo import Split
from .models import Model

_GPU_SHARE = 0.5  # of what is free beside the weights; activations need the rest
_MEMORY_SHARE = 0.25  # of the machine's memory, for pooled rows


@dataclass(frozen=True)
class Task:
    """One cross-validation: a split, of everybody or of one group."""

    split: str
    group: str
    fold: torch.Tensor
    """int64 [n]; -1 outside the group."""
    fold_of_cell: torch.Tensor | None = None
    """int64 [cells]; -1 outside the group."""

    @property
    def folds(self) -> int:
        """Number of folds; a sample that was skipped does not change it."""
        return int((self.fold if self.fold_of_cell is None else self.fold_of_cell).max()) + 1


def make_tasks(
    table: pd.DataFrame,
    splits: Sequence[Split],
    group: str | None,
    y: torch.Tensor,
    targets: Sequence[str],
) -> tuple[list[Task], list[str]]:
    """Return every split of everybody, then of every group, and warnings of groups left out.

    Raises
    ------
    ValueError
        When there is no such column, or a split of everybody cannot be scored.
    """
    tasks = [Task(s.name, "", torch.from_numpy(s.assign(table))) for s in splits]
    for task in tasks:
        _require_scores(task, y, targets)
    if group is None:
        return tasks, []
    if group not in table:
        raise ValueError(
            f"there is no column {group!r} to group by; the samples have {', '.join(table)}"
        )
    left_out = {}
    for value in sorted(table[group].dropna().unique(), key=str):
        member = (table[group] == value).to_numpy(copy=True)
        for split in splits:
            fold = torch.full((len(table),), -1)
            try:
                fold[torch.from_numpy(member)] = torch.from_numpy(split.assign(table[member]))
                task = Task(split.name, str(value), fold)
                _require_scores(task, y, targets)
            except ValueError as error:
                left_out[f"{value} ({split.name})"] = str(error)
            else:
                tasks.append(task)
    return tasks, _warnings(left_out)


def without_skipped(
    tasks: Sequence[Task], kept: NDArray[np.int64], y: torch.Tensor, targets: Sequence[str]
) -> tuple[list[Task], list[str]]:
    """Return the tasks of the samples that went through, in the folds they had.

    The statistics were gathered in those folds; other folds would be others' numbers.
    """
    good, left_out = [], {}
    for task in tasks:
        task = replace(task, fold=task.fold[torch.from_numpy(kept)])
        try:
            _require_scores(task, y[torch.from_numpy(kept)], targets)
        except ValueError as error:
            if not task.group:
                raise
            left_out[f"{task.group} ({task.split})"] = str(error)
        else:
            good.append(task)
    return good, _warnings(left_out)


def _require_scores(task: Task, y: torch.Tensor, targets: Sequence[str]) -> None:
    """Refuse folds without an R2: of fewer than two samples, or where a target never varies."""
    for f in range(task.folds):
        part = y[task.fold == f]
        if len(part) < 2:
            msg = (
                f"fold {f} of split {task.split!r} has too few samples ({len(part)}), R² needs "
                "two; take fewer folds or more samples"
            )
            raise ValueError(msg)
        constant = (part == part[0]).all(0).nonzero()[:, 0].tolist()
        if constant:
            name, value = targets[constant[0]], float(part[0, constant[0]])
            msg = (
                f"target {name!r} is {value:g} for all {len(part)} samples of fold {f} of split "
                f"{task.split!r}, so it has no R²; take fewer folds or another split, or leave "
                "the target out"
            )
            raise ValueError(msg)


def _warnings(left_out: Mapping[str, str]) -> list[str]:
    if not left_out:
        return []
    names = [*left_out]
    some = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    why = left_out[names[0]].rstrip(".")
    return [f"Groups left out: {some}; the first, because {why}"]


def repeated(
    inputs: Mapping[str, Samples], kept: NDArray[np.int64], tasks: Sequence[Task]
) -> list[str]:
    """Warn where a sample, input and place, is in other folds of a split too.

    Parameters
    ----------
    inputs
        The samples as the model reads them, by prompt.
    kept
        int [n]: which of them went through.
    tasks
        Their cross-validations.
    """
    if any(isinstance(samples.inputs, Lazy) for samples in inputs.values()):
        return []  # to compare them would be to read them all again
    table = next(iter(inputs.values())).table
    places = (table[name] for name in ("latitude", "longitude"))
    given = (map(_identity, samples.inputs) for samples in inputs.values())
    read = zip(*places, *given, strict=True)
    number: dict[Any, int] = {}
    same = np.array([number.setdefault(one, len(number)) for one in read])[kept]
    apart = {}
    for task in tasks:
        if not task.group:
            folds = pd.Series(task.fold.numpy()).groupby(same).transform("nunique")
            apart[task.split] = int((folds > 1).sum())
    if not any(apart.values()):
        return []
    split, count = max(apart.items(), key=lambda one: one[1])
    return [
        f"{count:,} of {len(same):,} samples have the same input and place as one in another fold "
        f"of split {split!r}: what a probe was trained on is no test of it, and R² is too high. "
        "Keep each once, or hold them out together (--split group:COLUMN)"
    ]


def _identity(given: Any) -> Any:
    return given if isinstance(given, str | Path | bytes | tuple) else id(given)


def with_cells(tasks: Sequence[Task]) -> tuple[torch.Tensor, list[Task]]:
    """Return the cell of every sample [n], and the tasks with the fold of every cell."""
    folds = torch.stack([t.fold for t in tasks], 1)
    combinations, cell = folds.unique(dim=0, return_inverse=True)
    fold_of_cell = combinations.unbind(1)
    return cell, [
        replace(t, fold_of_cell=f.clone()) for t, f in zip(tasks, fold_of_cell, strict=True)
    ]


# ------ storage


@dataclass(frozen=True)
class Plan:
    """Where the pooled rows go, and why."""

    kind: Literal["rows", "gram"]
    on_disk: bool
    floats: int
    """Numbers that the rows of one prompt take."""
    size: int
    """Bytes of the rows or statistics of all prompts, and of the twin."""
    kept: int
    """Bytes of the rows or statistics that the run's folder will hold."""
    waiting: int
    """Bytes of the rows, at most, that wait to be added to statistics, where those are."""
    pinned: int
    """Bytes of the pinned memory that takes rows from a GPU, a power of two for each site and pool;
    0 where none do."""
    stay: bool
    """Whether rows or statistics live on the device of their layer until they are solved."""
    sentence: str


def make_plan(
    model: Model,
    inputs: Mapping[str, Samples],
    widths: Sequence[int],
    *,
    targets: int,
    cells: int,
    storage: str,
    select: str | None,
    passes: int,
    waiting: int,
    gpus: Sequence[torch.device],
    weights: int = 0,
) -> Plan:
    """Choose where pooled rows go, from their widths at every site and pool.

    `auto` keeps rows while they fit the budget or are smaller than the statistics, because only
    rows give kilometres, MAE, Spearman and leave-one-out. `passes` models leave rows or statistics,
    the one that is probed and its twin; `gpus` are those of the layers. `storage` may also be
    `each`, for tokens, whose rows nobody keeps. `waiting` is how many rows of a site are added to
    statistics at once, and `weights` the bytes that are not on the GPUs yet.

    Raises
    ------
    ValueError
        When statistics were asked for and the machine's memory cannot hold them.
    """
    samples = next(iter(inputs.values()))
    floats = len(samples) * sum(widths)
    as_rows = 4 * floats * len(inputs) * passes
    as_grams = 8 * cells * sum((w + 1 + targets) ** 2 for w in widths) * len(inputs) * passes
    memory = _memory()
    budget = int(_MEMORY_SHARE * memory)
    if storage in ("gram", "each") and as_grams > memory:
        raise ValueError(
            f"statistics need {readable(as_grams)}, more than the machine's {readable(memory)}; "
            "use storage='rows' (--storage), which may lie on disk, or fewer sites, pools, "
            "prompts or groups"
        )
    kind: Literal["rows", "gram"] = "gram" if storage in ("gram", "each") else "rows"
    why = f"as asked: {readable(as_grams if kind == 'gram' else as_rows)}"
    if storage == "each":
        why = f"every token is a row: {readable(as_grams)}"
    if storage == "auto" and select == "loo":
        why = f"select='loo' needs them: {readable(as_rows)}"
    elif storage == "auto":
        smaller = as_rows <= max(budget, as_grams) or as_grams > memory
        kind = "rows" if smaller else "gram"
        why = (
            f"chosen: rows need {readable(as_rows)}, statistics {readable(as_grams)}, "
            f"memory for them is {readable(budget)}"
        )
    on_disk = kind == "rows" and as_rows > budget
    if kind == "gram" and as_grams > budget:
        why += f"; warning: statistics take more than {_MEMORY_SHARE:.0%} of the machine's memory"
    # Layers are spread evenly over the GPUs, and the fullest of them decides.
    free = min((torch.cuda.mem_get_info(gpu)[0] for gpu in gpus), default=0)
    free = max(0, free - weights // max(1, len(gpus)))
    on_gpus = as_grams + 4 * waiting * sum(widths) if kind == "gram" else as_rows
    stay = not on_disk and 0 < on_gpus <= _GPU_SHARE * free * len(gpus)
    if gpus and not stay and not on_disk:
        why += f"; on the CPU, because more than {_GPU_SHARE:.0%} of the {readable(free)} that are "
        why += "free on a GPU"
    what = {"gram": "statistics (Gram matrices)", "rows": "pooled rows"}[kind]
    where = " on disk" if on_disk else " on the GPU" if stay else ""
    prompts = max(len(inputs), len(model.prompts))
    asked = f", {prompts} prompts" if prompts > 1 else ""
    sentence = (
        f"{model.name}: {len(widths)} site x pool, {len(samples)} samples{asked}; "
        f"keeping {what}{where} ({why})"
    )
    size = as_grams if kind == "gram" else as_rows
    kept, buffer = 0 if on_disk else size // passes, 4 * waiting * sum(widths)
    waiting_bytes = buffer if kind == "gram" else 0
    pinned = 0
    if gpus and not stay and not on_disk:
        n = waiting if kind == "gram" else len(samples)
        blocks = sum(1 << (4 * n * width - 1).bit_length() for width in widths)  # as torch does
        pinned = blocks * (1 if kind == "gram" else len(inputs) * passes)
    return Plan(kind, on_disk, floats, size, kept, waiting_bytes, pinned, stay, sentence)


def check_disk(plan: Plan, scratch: str | Path | None) -> None:
    """Refuse what the disk has no room for, the run in `scratch` and rows that lie on disk.

    Raises
    ------
    OSError
        When there is too little room.
    """
    needed = (plan.size if plan.on_disk else 0) + (plan.kept if scratch else 0)
    if needed:
        check_space(Path(scratch or tempfile.gettempdir()), needed)


def bytes_beside(
    *,
    batch: int,
    tokens: int,
    state: int,
    rows: int,
    travel: bool,
    unseen: int,
    added: int,
    targets: int,
) -> int:
    """Bytes that probing takes at most beside a model on a GPU, during the pass.

    Rows or statistics that are kept are not in it, nor what the allocator rounds up.

    Parameters
    ----------
    batch, tokens
        Samples of a batch, and tokens of a sample in all towers: a byte of roles each.
    state
        Bytes of a sample's hidden state at the largest site: one is kept until the next is read.
    rows
        Numbers that all sites leave of a sample. When a pass ends they are looked into together,
        which takes them twice; where they `travel` to the CPU, they are pooled beside.
    unseen
        Rows of all sites, and samples for each role, that were not looked into yet: a float32 each,
        and thrice as much when they are.
    added, targets
        Rows of a site that are added to statistics at once: ones, targets and an order.
    """
    pooled = 4 * batch * rows * (3 if travel else 2)
    return batch * (tokens + state) + pooled + 16 * unseen + 8 * added * (targets + 2)


def gpus_of(model: Model) -> list[torch.device]:
    """Return the GPUs where the model's parameters live."""
    return list({p.device for p in model.module.parameters() if p.is_cuda})


def _memory() -> int:
    """Bytes of the machine's physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def readable(n: int) -> str:
    """Write a number of bytes for people."""
    if 0 < n < 2**20:
        return "under 1 MB"
    return f"{n / 2**20:,.0f} MB" if n < 2**30 else f"{n / 2**30:,.1f} GB"
