"""`plan`: what a probe will read, hold in memory and take, before any weight is loaded."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from numpy.typing import ArrayLike
from torch import nn

from .batching import Budget, Lengths, numbers
from .capture import Pools, pools_by_tower
from .data import Samples
from .extract import Example, first, lengths_like, rows_at_once
from .geo import Split
from .geo.folds import KFold
from .models import DeviceMap, Model, load
from .models.describe import site_range
from .models.load import Loading, default_device
from .models.location import of_places
from .models.skeleton import has_skeleton, skeleton, weight_bytes
from .plan import Plan, Task, bytes_beside, check_disk, make_plan, readable, with_cells
from .pooling import Pool
from .report.text import fill
from .request import Options, Request
from .ridge import ALPHAS, Select
from .ridge.memory import (
    at_once,
    bytes_of_rows,
    bytes_of_statistics,
    bytes_of_wide_rows,
    bytes_on_cpu,
)
from .ridge.training import is_small
from .speed import multiply_rate, pool_seconds, solve_rate, solve_work
from .survey import Survey, survey, token_count, up_to

_NARROWEST = 44  # column of sites


@dataclass(frozen=True)
class Solving:
    """Memory of the layers that take most of it while they are solved."""

    device: str
    layer: int
    """Bytes that one takes at most, beside its rows or statistics."""
    at_once: int
    """How many are solved at once."""

    @property
    def size(self) -> int:
        """Bytes of all of them."""
        return self.at_once * self.layer

    def __str__(self) -> str:
        where = "CPU" if self.device == "cpu" else "GPU"
        each = f"{readable(self.layer)} a layer, at most, on the {where}"
        if self.at_once == 1:
            return f"{each}, one after the other"
        return f"{each}, {self.at_once} at once: {readable(self.size)}"


@dataclass(frozen=True)
class Forecast:
    """What a probe will do; `str` prints it."""

    model: str
    loaded: bool
    """Whether the model was loaded with its weights to know this."""
    device: str
    dtype: str
    sites: dict[str, tuple[int, int]]
    """Tokens of one sample, of texts the longest, and their width, by site."""
    pools: dict[str, tuple[str, ...]]
    """By tower."""
    samples: int
    skipped: int
    """Samples that are known to be left out before the model has read any."""
    prompts: int
    batch: int
    """Samples in the batch of the longest."""
    tokens: int
    """The budget of tokens that forms batches."""
    batches: str
    """A sentence about the batches."""
    twin: bool
    """Whether a twin with random weights is probed too: all that follows counts both."""
    weights: dict[str, int]
    """Bytes of parameters and buffers, by dtype."""
    activations: int
    """Bytes of all tensors that are alive at once in the largest batch, the weights apart."""
    storage: Plan
    """Where pooled rows go, and how many bytes they or the statistics take."""
    probing: int
    """Bytes that probing takes beside the model on a GPU, at most; 0 on the CPU."""
    solving: Solving
    flops: float
    """Operations of all forward passes."""
    seconds: dict[str, float]
    """Expected: `forward`, `pool`, `solve`; decoding goes on beside them and is not counted."""
    how: str
    """How tokens, operations and activations were found."""

    @property
    def share(self) -> float:
        """Expected share of the time that is spent on probing: pooling and solving."""
        probing = self.seconds["pool"] + self.seconds["solve"]
        return probing / (probing + self.seconds["forward"])

    def __str__(self) -> str:
        weights = ", ".join(f"{readable(n)} of {name}" for name, n in self.weights.items())
        kept = "statistics" if self.storage.kind == "gram" else "rows"
        where = "on the GPU" if self.storage.stay else "in memory"
        where = "on disk" if self.storage.on_disk else where
        loaded = "; planned from the loaded model"
        twin = ", half of it the twin's" if self.twin else ""
        left_out = f" ({self.skipped} more cannot be used)" if self.skipped else ""
        waiting = f"{readable(self.storage.waiting)}, at most, that wait to be added to them"
        beside = f"{readable(self.probing)} on the GPU beside the model, at most"
        if self.storage.pinned:
            beside += f"; {readable(self.storage.pinned)} of pinned memory for rows"
        return "\n".join(
            [
                f"{self.model} on {self.device} in {self.dtype}{loaded if self.loaded else ''}",
                fill(f"{self.samples} samples{left_out}, {self.prompts} prompt(s); {self.batches}"),
                "",
                *self._site_lines(),
                "",
                f"memory   weights      {weights}{twin}",
                f"         activations  {readable(self.activations)}, most at once in a batch",
                f"         {kept:12} {readable(self.storage.size)} {where}{twin}",
                *([f"         rows         {waiting}"] if self.storage.waiting else []),
                *([f"         probing      {beside}"] if self.probing else []),
                f"         solving      {self.solving}",
                f"time     forward      {_time(self.seconds['forward'])} "
                f"({_operations(self.flops / self.samples)} a sample)",
                f"         probing      {_time(self.seconds['pool'])} of pooling and "
                f"{_time(self.seconds['solve'])} of solving: {self.share:.1%} of all",
                fill(f"Tokens, operations and activations: {self.how}."),
                fill(
                    "Times are by this machine's speed, measured now, and good to a factor of "
                    "three; decoding is not counted."
                ),
            ]
        )

    def _site_lines(self) -> list[str]:
        groups: list[tuple[str, tuple[int, int], list[str]]] = []
        for name, shape in self.sites.items():
            tower = _tower(name, self.pools)
            if not groups or groups[-1][:2] != (tower, shape):
                groups.append((tower, shape, []))
            groups[-1][2].append(name)
        lines = [("site", "tokens x width", "pool")]
        lines += [
            (site_range(names), f"{tokens:,} x {width:,}", ", ".join(self.pools[tower]))
            for tower, (tokens, width), names in groups
        ]
        wide = max(_NARROWEST, *(len(names) for names, _, _ in lines))
        return [f"{names:{wide}}{shape:>18}   {pools}" for names, shape, pools in lines]


def _tower(site: str, towers: Iterable[str]) -> str:
    """Return the one of `towers` that a site is of; GeoCLIP's are location.capsules.0 and so on."""
    return max((t for t in towers if f"{site}.".startswith(f"{t}.")), key=len)


def _time(seconds: float) -> str:
    if seconds < 0.1:
        return "under 0.1 s"
    if seconds < 120:
        return f"about {seconds:.2g} s" if seconds < 10 else f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 7200 else f"about {seconds / 3600:.1f} h"


def _operations(flops: float) -> str:
    return "under 0.01 GFLOP" if flops < 1e7 else f"{flops / 1e9:,.2f} GFLOP"


def plan(
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
) -> Forecast:
    """Say what `probe` would do with the same arguments, before any weight is loaded.

    A checkpoint of transformers is planned from its configuration and its processors alone. Models
    of open_clip, timm and location encoders are loaded, for their libraries build none without
    weights; a module or `Model` is taken as it is, and runs over one sample.

    Parameters
    ----------
    model, data, sites, pool, prompts, split, group, alphas, select, storage, targets, baselines
        As for `probe`, and so are all others. What does not go together is refused as there;
        else `device_map`, `merge` and `check` change nothing here, and the weights of an adapter
        are not counted.
    progress
        Say on stderr when the machine's speed is measured, which takes a few seconds.

    Returns
    -------
    Forecast
        Sites, batches, memory and times; `str` prints them.

    Raises
    ------
    ValueError, OSError, RuntimeError
        What `probe` would raise before its pass.
    """
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
    asked = Request.of(data, options, location=of_places(model))
    if has_skeleton(model):
        made = skeleton(model, twin="random-weights" in asked.controls, **loading)
        where = default_device(device)
    else:
        made = load(model, **loading)
        where = made.device
    made, asked = asked.of_model(made)
    return _forecast(made, asked, where, scratch, progress=progress)


def _forecast(
    model: Model,
    asked: Request,
    where: torch.device,
    scratch: str | Path | None,
    *,
    progress: bool,
) -> Forecast:
    options, samples = asked.options, asked.given.samples
    seen, example, pools = _look(
        model, asked.inputs, asked.lengths, options["sites"], options["pool"]
    )
    lengths = asked.lengths or lengths_like(example, len(samples))
    budget = Budget.of(where, options["batch_size"])
    cells, _ = with_cells(asked.tasks)
    weights, waiting = weight_bytes(model.module), rows_at_once(budget, lengths)
    to_load = 0 if model.device.type == where.type else sum(weights.values())
    kept = make_plan(
        model, asked.inputs, example.widths, targets=len(asked.targets),
        cells=int(cells.max()) + 1, storage=asked.storage, select=options["select"],
        passes=asked.passes, waiting=waiting, gpus=[where] if where.type == "cuda" else [],
        weights=to_load,
    )  # fmt: skip
    check_disk(kept, scratch)
    batch = min(budget.fit(example.tokens), len(samples))
    probing = 0
    if where.type == "cuda":
        probing = _beside(model, asked, kept, batch, waiting, seen, example, pools)
    if progress:
        print("measuring how fast this machine is ...", file=sys.stderr, flush=True)
    return Forecast(
        model=model.name,
        loaded=model.device.type != "meta",
        device=str(where),
        dtype=_name(model.dtype),
        sites=dict(seen.shapes),
        pools={tower: tuple(p.name for p in parsed) for tower, parsed in pools.items()},
        samples=len(samples),
        skipped=len(samples.skipped),
        prompts=max(len(asked.inputs), len(model.prompts)),
        batch=batch,
        tokens=budget.tokens,
        batches=budget.sentence(lengths.values()),
        twin=asked.passes > 1,
        weights={_name(kind): asked.passes * n for kind, n in weights.items()},
        activations=seen.peak * batch,
        storage=kept,
        probing=probing,
        solving=_memory_of_solving(asked, kept, example.widths, where, to_load),
        flops=asked.passes * _flops(seen, example, lengths),
        seconds=_seconds(model, asked, where, batch, kept, seen, example, pools, lengths),
        how=seen.how,
    )


def _beside(
    model: Model,
    asked: Request,
    kept: Plan,
    batch: int,
    waiting: int,
    seen: Survey,
    example: Example,
    pools: Mapping[str, tuple[Pool, ...]],
) -> int:
    """Bytes that probing takes beside the model during the pass."""
    towers = [(_tower(site, pools), *shape) for site, shape in seen.shapes.items()]
    layouts = {(tower, count) for tower, count, _ in towers}
    tokens = sum(count for _, count in layouts)
    roles = sum(len({role for p in pools[t] for _, role in p.parts}) for t, _ in layouts)
    rows = sum(p.width(width) for tower, _, width in towers for p in pools[tower])
    each = asked.storage == "each"
    state = max(count * width for _, count, width in towers) * model.dtype.itemsize
    return bytes_beside(
        batch=batch, tokens=tokens, state=state, rows=rows, travel=not kept.stay,
        unseen=waiting * (len(example.widths) + roles),
        added=2 * batch * tokens if each else waiting * (kept.kind == "gram" and kept.stay),
        targets=len(asked.targets),
    )  # fmt: skip


def _memory_of_solving(
    asked: Request, kept: Plan, widths: Sequence[int], where: torch.device, to_load: int
) -> Solving:
    """What solving takes, and where."""
    select = asked.options["select"] or ("loo" if kept.kind == "rows" else "gcv")
    targets, alphas, free = len(asked.targets), len(asked.alphas), 0
    if kept.stay:
        free = max(0, torch.cuda.mem_get_info(where)[0] - to_load - kept.size)
    found = []
    for width, task in product(Counter(widths).items(), asked.tasks):
        (dim, count), sizes = width, torch.bincount(task.fold[task.fold >= 0])
        n, on_gpu = int(sizes.sum()), kept.stay and not is_small(dim)
        shape = targets, task.folds, alphas
        if kept.kind == "rows" and n - int(sizes.min()) < dim:
            each = bytes_of_wide_rows(n, dim, 4, *shape)
        elif not on_gpu:
            each = bytes_on_cpu(n, dim, *shape, select, rows=kept.kind == "rows")
        elif kept.kind == "rows":
            each = bytes_of_rows(n, dim, 4, *shape, select)
        else:
            each = bytes_of_statistics(dim, *shape, select)
        layers = count * len(asked.inputs) * asked.passes
        many = at_once(layers, free, each) if on_gpu else 1
        found.append(Solving(str(where) if on_gpu else "cpu", each, many))
    return max(found, key=lambda one: one.size)


def _tokens(lengths: Mapping[str, Lengths]) -> int:
    return sum(int(one.expected.sum()) for one in lengths.values())


def _flops(seen: Survey, example: Example, lengths: Mapping[str, Lengths]) -> float:
    return seen.flops / example.tokens * _tokens(lengths)


def _seconds(
    model: Model,
    asked: Request,
    where: torch.device,
    batch: int,
    kept: Plan,
    seen: Survey,
    example: Example,
    pools: Mapping[str, tuple[Pool, ...]],
    lengths: Mapping[str, Lengths],
) -> dict[str, float]:
    select = asked.options["select"] or ("loo" if kept.kind == "rows" else "gcv")
    rate = multiply_rate(where, model.dtype, batch * example.tokens, max(example.widths))
    count = _tokens(lengths) / (batch * example.tokens)
    one = _solving(example, asked.tasks, len(asked.targets), asked.alphas, select)
    seconds = {
        "forward": _flops(seen, example, lengths) / rate,
        "pool": count * _pooling(seen, pools, batch, where, model.dtype),
        "solve": len(asked.inputs) * one,
    }
    return {stage: asked.passes * each for stage, each in seconds.items()}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _look(
    model: Model,
    inputs: Mapping[str, Samples],
    lengths: Mapping[str, Lengths],
    sites: str | Sequence[str] | None,
    pool: Pools,
) -> tuple[Survey, Example, dict[str, tuple[Pool, ...]]]:
    """Survey one sample, of texts the longest, and the rows that it will leave."""
    _, _, (sample,) = first(model, inputs, lengths)
    wanted = model.sites(sites)
    seen = survey(model, up_to(model, wanted), model.collate([sample]))
    tokens = token_count(seen.shapes)
    seen = replace(seen, shapes={site.name: seen.shapes[site.name] for site in wanted})
    pools = pools_by_tower(model.towers, wanted, pool)
    widths: list[int] = []
    for site in wanted:
        width = seen.shapes[site.name][1]
        mine = pools[site.tower][:1] if site.is_vector else pools[site.tower]
        # Of several prompts about an image, every one leaves a row of the language model.
        times = len(model.prompts) if site.tower == "lm" and model.prompts else 1
        widths += [p.width(width) for p in mine] * times
    return seen, Example(tuple(widths), tokens, numbers(sample)), pools


def _pooling(
    seen: Survey,
    pools: Mapping[str, tuple[Pool, ...]],
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """Seconds of pooling one batch at all sites."""
    kinds: dict[tuple[str, tuple[int, int]], int] = {}
    for site, shape in seen.shapes.items():
        kind = _tower(site, pools), shape
        kinds[kind] = kinds.get(kind, 0) + 1
    return sum(
        times * pool_seconds(device, dtype, (batch, *shape), [p.name for p in pools[tower]])
        for (tower, shape), times in kinds.items()
    )


def _solving(
    example: Example, tasks: Sequence[Task], targets: int, alphas: Sequence[float], select: Select
) -> float:
    """Seconds of solving every site and pool, in every cross-validation and for all samples."""
    sizes = [
        (int((task.fold >= 0).sum()), width, task.folds)
        for task in tasks
        for width in example.widths
    ]
    n, width, folds = max(sizes, key=lambda size: solve_work(*size))
    rate = solve_rate(n, width, targets, folds, alphas, select)
    total = sum(solve_work(*size) for size in sizes) / rate
    return total * (1 + 1 / sum(task.folds for task in tasks))  # a last fit, to everybody
