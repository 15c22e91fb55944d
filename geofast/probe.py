"""`probe`: the main job. One forward pass, all sites, pools, prompts, folds and groups."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from numpy.typing import ArrayLike
from torch import nn

from . import _ops
from .batching import Budget
from .capture import Pools
from .checks import Check
from .controls import raw_inputs
from .data import Samples
from .doctor import examine
from .extract import Extracted, Storage, extract, lengths_like, rows_at_once, try_one
from .geo import Split
from .geo.folds import KFold
from .models import DeviceMap, Model, load
from .models.load import Loading
from .models.location import of_places
from .models.skeleton import NumbersNeededError, has_skeleton, skeleton
from .models.twin import random_twin
from .plan import Plan, Task, check_disk, gpus_of, make_plan, repeated, with_cells, without_skipped
from .report.text import fill
from .request import Labelled, Options, Request
from .ridge import ALPHAS, Select
from .rows import on_disk
from .run import Run
from .solving import FINAL_ALPHA, Solved, at_the_edge, far_out, fit_probes, solve_all
from .tables import honest_best, layers_table, predictions_table, samples_table


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
    baselines: Mapping[str, ArrayLike] | None = None,
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
        Named features [n, d] of the same samples, of torch or NumPy, probed beside the model as
        controls.
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
        Print the plan, and on stderr what is begun and a bar with the time left.

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
    clock = _Clock(progress)
    options: Options = {
        "sites": sites, "pool": pool, "prompts": prompts, "split": split, "group": group,
        "alphas": alphas, "select": select, "storage": storage, "targets": targets,
        "baselines": baselines, "controls": controls, "batch_size": batch_size,
        "workers": workers, "strict": strict,
    }  # fmt: skip
    loading: Loading = {
        "device": device, "dtype": dtype, "device_map": device_map, "adapter": adapter,
        "merge": merge, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    asked = Request.of(data, options, location=of_places(model))  # before the model is loaded
    if isinstance(model, str | Path):
        clock.say(f"loading {model}")
    _sketch(asked, model, loading)
    loaded = load(model, **loading)
    model, asked = asked.of_model(loaded)
    clock.lap("load")
    checks: list[Check] = []
    unchecked: list[str] = []
    if check:
        clock.say("checking the model on a few samples")
        checks, unchecked = examine(
            model, asked.inputs, asked.lengths, sites, batched=batch_size != 1
        )
    clock.lap("check")

    passes = _Passes.of(model, asked, scratch, progress=progress)
    found = passes.read(model)
    others, missing = passes.read_controls(model, found)
    clock.lap("forward")
    given, tasks, warned = _left(asked, passes.tasks, found)
    way: Select = select or ("loo" if found.rows is not None else "gcv")
    several = [len(one.rows or one.grams or ()) for one in (found, *others.values())]
    clock.say(f"solving {sum(several)} site x pool in {len(tasks)} cross-validation(s)")
    all_found = {"": found, **others}
    solved, unsolved = solve_all(all_found, given, tasks, asked.targets, asked.alphas, way)
    probes = fit_probes(found, given.y, tasks[0], asked.targets, asked.alphas, way)
    far = far_out(found, given.samples)
    clock.lap("solve")

    layers = layers_table(solved, tasks, given.y, asked.targets)
    info = {
        **_asked_for(asked, passes, way, data=given.samples.source),
        "sources": {"model": loaded.source, "data": given.samples.place},
        **_ran(model, passes, solved),
        **({} if found.grams is None else {"fold_of_cell": _folds_of_cells(tasks)}),
        "final_alpha": FINAL_ALPHA[way].format(split=tasks[0].split),
        "counts": {
            "read": len(given.samples),
            "skipped": len(given.samples.skipped),
            "why": [str(s) for s in given.samples.skipped],
        },
        "seconds": clock.seconds,
        "versions": _versions(),
        "honest": honest_best(solved, layers, asked.targets),
        "checks": [asdict(c) for c in checks],
        "warnings": [
            *model.notes, *unchecked, *missing, *unsolved, *passes.budget.warnings, *warned, *far,
            *repeated(asked.inputs, found.kept, tasks), *at_the_edge(solved, asked.alphas),
        ],
    }  # fmt: skip
    return Run(
        info=info,
        layers=layers,
        samples=samples_table(given.samples, tasks),
        probes=probes,
        predictions=predictions_table(solved, tasks, given, asked.targets),
        rows=None if passes.plan.on_disk else _on_cpu(found.rows),
        grams=_on_cpu(found.grams),
    )


def _on_cpu(kept: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Move rows or statistics to the CPU, where a run has them."""
    return None if kept is None else {key: one.cpu() for key, one in kept.items()}


def _sketch(asked: Request, model: str | Path | nn.Module | Model, loading: Loading) -> None:
    """Refuse what the model cannot do before its weights are loaded, which may take minutes.

    Without them a checkpoint is there in less than a second, 0.04 s of DINOv2-S; of GGUF files,
    whose tokenizer takes eight, and of other libraries' models, it is told once they are loaded.
    """
    if not has_skeleton(model) or str(model).endswith(".gguf"):
        return
    try:
        bare = skeleton(model, twin="random-weights" in asked.controls, **loading)
    except NumbersNeededError:
        return
    asked.read_by(bare)


# ------ passes


@dataclass(frozen=True)
class _Passes:
    """How the samples are read, by the model and by what it is probed beside."""

    asked: Request
    budget: Budget
    plan: Plan
    cells: torch.Tensor
    """int64 [n]: the cell of every sample."""
    count: int
    """Number of cells."""
    tasks: list[Task]
    scratch: str | Path | None
    progress: bool

    @classmethod
    def of(
        cls, model: Model, asked: Request, scratch: str | Path | None, *, progress: bool
    ) -> _Passes:
        """Try one sample, and settle what comes of it; says so with `progress`."""
        options = asked.options
        cells, tasks = with_cells(asked.tasks)
        count = int(cells.max()) + 1
        example = try_one(model, asked.inputs, asked.lengths, options["sites"], options["pool"])
        lengths = asked.lengths or lengths_like(example, len(asked.given.samples))
        asked = replace(asked, lengths=lengths)
        budget = Budget.of(model.device, options["batch_size"])
        plan = make_plan(
            model, asked.inputs, example.widths, targets=len(asked.targets),
            cells=count, storage=asked.storage, select=options["select"],
            passes=asked.passes, waiting=rows_at_once(budget, lengths), gpus=gpus_of(model),
        )  # fmt: skip
        if progress:
            print(fill(f"{plan.sentence}; {budget.sentence(lengths.values())}"), flush=True)
        check_disk(plan, scratch)
        return cls(asked, budget, plan, cells, count, tasks, scratch, progress)

    @property
    def workers(self) -> int:
        """Processes that decode ahead of the model."""
        asked, kind = self.asked.options["workers"], self.asked.given.samples.kind
        return asked if asked is not None else int(kind == "image")

    def read(self, model: Model) -> Extracted:
        """Run a model over all samples, and skip those that cannot be used."""
        asked, options, room = self.asked, self.asked.options, None
        if self.plan.on_disk:
            folder, floats = Path(self.scratch or tempfile.gettempdir()), self.plan.floats
            room = on_disk(folder, floats * len(asked.inputs)).view(len(asked.inputs), floats)
        place = Storage(self.plan.kind, asked.given.y, self.cells, room, self.plan.stay, self.count)
        return extract(
            model, asked.inputs, place, sites=options["sites"], pool=options["pool"],
            lengths=asked.lengths, budget=self.budget, workers=self.workers,
            strict=options["strict"], progress=self.progress,
        )  # fmt: skip

    def read_controls(
        self, model: Model, found: Extracted
    ) -> tuple[dict[str, Extracted], list[str]]:
        """Read what the model is probed beside, of the very samples that went through it.

        Also a warning for every control that could not be read: the model's own pass is over by
        then, and is not thrown away.
        """
        others, missing = {}, []
        for name in self.asked.controls:
            try:
                others[name] = self._control(name, model, found)
            except Exception as error:  # whatever it is: the pass that is over is worth more
                why = f"{type(error).__name__}: {error}".rstrip(".")
                missing.append(f"the control {name!r} is not in this run: {why}")
        return others, missing

    def _control(self, name: str, model: Model, found: Extracted) -> Extracted:
        if name == "random-weights":
            twin = replace(random_twin(model), name=f"{model.name}, random weights")
            return self._of(found).read(twin)
        storage = Storage(self.plan.kind, self.asked.given.y, self.cells)
        return raw_inputs(name, model, self.asked.inputs, storage, found.kept, self.workers)

    def _of(self, found: Extracted) -> _Passes:
        """Return the same for the samples that were found good; all of them have to be again."""
        asked = self.asked.take(found.kept)
        options: Options = {**asked.options, "strict": True}
        cells = self.cells[torch.from_numpy(found.kept)]
        return replace(self, asked=replace(asked, options=options), cells=cells)


def _left(
    asked: Request, tasks: list[Task], found: Extracted
) -> tuple[Labelled, list[Task], list[str]]:
    """Return the samples that went through, what is cross-validated of them, and warnings.

    From rows, new folds are dealt; statistics were gathered in the folds that there were.
    """
    if len(found.kept) == len(asked.given.samples):
        return asked.given, tasks, asked.warned
    given = asked.given.take(found.kept)
    given = replace(given, samples=given.samples.skipping(found.skipped))
    if found.rows is not None:
        again = asked.with_samples(given)
        return given, again.tasks, again.warned
    tasks, more = without_skipped(tasks, found.kept, asked.given.y, asked.targets)
    return given, tasks, asked.warned + more


# ------ what the run says of itself


def _asked_for(asked: Request, passes: _Passes, select: Select, data: str) -> dict[str, Any]:
    options = asked.options
    prompts = options["prompts"]
    return {
        "data": data,
        "kind": asked.given.samples.kind,
        "arguments": {
            "sites": options["sites"], "pool": options["pool"], "group": options["group"],
            "prompts": [prompts] if isinstance(prompts, str) else prompts,
            "split": {s.name: repr(s) for s in asked.splits},
            "alphas": asked.alphas, "select": select, "storage": passes.plan.kind,
            "targets": asked.targets, "baselines": [*asked.given.baselines],
            "controls": asked.controls, "batch_size": options["batch_size"],
            "workers": passes.workers,
        },
        "seeds": {s.name: s.seed for s in asked.splits if hasattr(s, "seed")},
    }  # fmt: skip


def _folds_of_cells(tasks: Sequence[Task]) -> dict[str, list[int]]:
    """Return which fold of a split holds out each cell of the statistics, by split."""
    return {
        t.split: t.fold_of_cell.tolist()
        for t in tasks
        if not t.group and t.fold_of_cell is not None
    }


def _ran(model: Model, passes: _Passes, solved: Sequence[Solved]) -> dict[str, Any]:
    return {
        "model": model.name,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "backend": _ops.describe(model.device),
        "methods": sorted({s.solution.method for s in solved}),
        "storage": passes.plan.sentence,
        "batch": {"samples": passes.budget.largest, "tokens": passes.budget.tokens},
    }


class _Clock:
    """Seconds per stage, and what is begun."""

    def __init__(self, progress: bool) -> None:
        self._progress = progress
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def say(self, what: str) -> None:
        """Say what is begun, where progress is asked for: on stderr, as the bar is."""
        if self._progress:
            print(f"{what} ...", file=sys.stderr, flush=True)

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = round(now - self._last, 3)
        self._last = now


def _versions() -> dict[str, str]:
    import platform
    from importlib.metadata import version

    names = ("geofast", "torch", "transformers", "numpy", "scikit-learn")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
