"""The curves of every layer, from statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch

from ..gram import Gram, Totals, totals
from ..models.structure import matches
from ..ridge.factor import Factor
from ..ridge.scores import scores_on
from ..ridge.solution import ALPHAS, penalties
from ..ridge.solve import solve
from ..ridge.training import NotPositiveError, Statistics, Training, subset, training_sets
from .nested import Room, refits
from .ranking import RANKINGS, orders, random_orders
from .result import Layer, Subspace, collect
from .study import by_gcv, by_leave_one_out

if TYPE_CHECKING:
    from ..run import Run

FRACTIONS = tuple(i / 10 for i in range(1, 11))
"""Those of Locatelli et al. (ICML 2026): a tenth of the dimensions to all."""

Protocol = Literal["corrected", "study"]
_BYTES = 512 << 20  # of the matrices that are ranked at once
_ALONE = 640  # dimensions: up to here one thread does a layer


@dataclass(frozen=True)
class _Asked:
    """What is measured of every layer."""

    fractions: tuple[float, ...]
    rankings: tuple[str, ...]
    random: int
    seed: int
    study: bool
    alphas: tuple[float, ...]


class _Kept(NamedTuple):
    """What is kept of one layer."""

    name: str
    gram: Gram
    folds: torch.Tensor | None = None  # of the cells
    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None  # x, y, fold of each


def of_run(
    run: Run,
    *,
    fractions: Sequence[float] = FRACTIONS,
    split: str | None = None,
    sites: str | Sequence[str] | None = None,
    rankings: Sequence[str] = RANKINGS,
    random: int = 5,
    seed: int = 0,
    protocol: Protocol = "corrected",
    progress: bool = False,
) -> Subspace:
    """Measure the layers of a run; see `Run.subspace`."""
    asked = _asked(fractions, rankings, random, seed, protocol, _alphas(run))
    split = split or next(iter(run.splits), "")
    run.rows_of(split)  # says which splits there are
    names = _chosen(run, sites)
    many = _bar(names, progress)
    select = str(run.info.get("arguments", {}).get("select") or "")
    return _measure(_statistics(run, many, split), run.targets, split, asked, select)


def of_grams(
    grams: Mapping[str, Gram],
    targets: Sequence[str],
    *,
    folds: torch.Tensor | None = None,
    alphas: Sequence[float] = ALPHAS,
    fractions: Sequence[float] = FRACTIONS,
    rankings: Sequence[str] = RANKINGS,
    random: int = 5,
    seed: int = 0,
    protocol: Protocol = "corrected",
) -> Subspace:
    """Measure layers from their statistics.

    Parameters
    ----------
    grams
        Statistics by cell, float64 products, under names `site/pool` or `site/pool/prompt`.
    targets
        Names of the k targets.
    folds
        int64 [cells]: the fold of each cell, -1 for none; None makes every cell a fold.
    alphas, fractions, rankings, random, seed, protocol
        As for `Run.subspace`.

    Raises
    ------
    ValueError
        As `Run.subspace`, and when the names are not of that form or the targets not k.
    """
    asked = _asked(fractions, rankings, random, seed, protocol, alphas)
    for name, gram in grams.items():
        if "/" not in name or len(targets) != gram.targets:
            raise ValueError(
                f"statistics must be named site/pool and have as many targets as there are names; "
                f"got {name!r} with {gram.targets} targets for {list(targets)}"
            )
    layers = (_Kept(name, gram, folds) for name, gram in grams.items())
    return _measure(layers, tuple(targets), "", asked)


def _asked(
    fractions: Sequence[float],
    rankings: Sequence[str],
    random: int,
    seed: int,
    protocol: str,
    alphas: Sequence[float],
) -> _Asked:
    shares = [float(f) for f in fractions]
    if not shares or not all(0 < f <= 1 for f in shares):
        raise ValueError(f"fractions must be above 0 and at most 1; got {shares}")
    unknown = [r for r in rankings if r not in RANKINGS]
    if unknown or isinstance(rankings, str):
        raise ValueError(f"rankings must be some of {list(RANKINGS)}; got {rankings!r}")
    if protocol not in get_args(Protocol):
        raise ValueError(f"protocol must be one of {get_args(Protocol)}; got {protocol!r}")
    if not rankings and not random and protocol != "study":
        raise ValueError("there is nothing to measure: name rankings, or draw random orders")
    if random < 0:
        raise ValueError(f"random must be a number of draws, 0 for none; got {random}")
    # A share of R2 needs the R2 on all dimensions, so that is always measured.
    every = tuple(sorted({*shares, 1.0}))
    grid = tuple(penalties(alphas).tolist())
    once = tuple(dict.fromkeys(rankings))
    return _Asked(every, once, random, seed, protocol == "study", grid)


# ------ what a run keeps


def _alphas(run: Run) -> Sequence[float]:
    found: Sequence[float] = run.info.get("arguments", {}).get("alphas") or ALPHAS
    return found


def _chosen(run: Run, sites: str | Sequence[str] | None) -> list[str]:
    """Names of the probes at `sites`, all for None."""
    names = [*(run.rows or run.grams or {})]
    if not names:
        raise ValueError(
            "this run keeps neither rows nor statistics to search for dimensions: probe again "
            "with storage='gram' (--storage gram), or with room for rows in memory"
        )
    # A file has them in the order of the alphabet, probes in that of the pass.
    place = {name: i for i, name in enumerate(run.probes)}
    names.sort(key=lambda name: place.get(name, len(place)))
    if sites is None:
        return names
    wanted = [sites] if isinstance(sites, str) else list(sites)
    for pattern in wanted:
        if not any(matches(name.split("/", 1)[0], pattern) for name in names):
            there = dict.fromkeys(name.split("/", 1)[0] for name in names)
            raise ValueError(f"the run has no site {pattern!r}; it has {', '.join(there)}")
    return [n for n in names if any(matches(n.split("/", 1)[0], p) for p in wanted)]


def _bar(names: Sequence[str], progress: bool) -> Iterable[str]:
    from tqdm import tqdm

    return tqdm(names, "dimensions", unit="layer", leave=False) if progress else names


def _statistics(run: Run, names: Iterable[str], split: str) -> Iterator[_Kept]:
    """Statistics of one layer after the other, with the fold of every cell or with the rows."""
    column = f"fold_{split}"
    if column not in run.samples:
        raise ValueError(f"the run's samples have no column {column!r}, which says their folds")
    fold = torch.from_numpy(run.samples[column].to_numpy("int64", copy=True))
    if run.rows is None:
        assert run.grams is not None
        of_cell = None
        for name in names:
            if of_cell is None:
                of_cell = _fold_of_cell(run, split, run.grams[name])
            yield _Kept(name, run.grams[name], of_cell)
        return
    y = torch.from_numpy(run.samples[list(run.targets)].to_numpy("float64", copy=True))
    for name in names:
        x = run.rows[name]
        if len(x) != len(y):
            raise ValueError(
                f"{name} has {len(x)} rows for {len(y)} samples: the table of samples is not theirs"
            )
        gram = Gram(x.shape[1], y.shape[1], int(fold.max()) + 1)
        yield _Kept(name, gram.update(x, y, fold), rows=(x, y, fold))


def _fold_of_cell(run: Run, split: str, gram: Gram) -> torch.Tensor:
    """Find the fold of every cell of a run's statistics, which older runs do not tell.

    A cell is a combination of the folds of all splits, and of those of the groups; they are in
    the order of the combinations, the first split first.
    """
    told = run.info.get("fold_of_cell", {}).get(split)
    if told is not None:
        if len(told) != gram.cells:
            raise ValueError(
                f"the run tells the folds of {len(told)} cells, and its statistics have "
                f"{gram.cells}: they are not of one probe"
            )
        return torch.tensor(told)
    columns = [f"fold_{s}" for s in run.splits]
    folds = torch.from_numpy(run.samples[columns].to_numpy("int64", copy=True))
    cells = folds.unique(dim=0)
    here = run.splits.index(split)
    if len(cells) == gram.cells:
        of_cell: torch.Tensor = cells[:, here].clone()
        return of_cell
    if here == 0:
        # With groups, or without some samples, cells are split further but stay in this order.
        ends = torch.bincount(folds[:, 0]).cumsum(0)
        before = gram.count.cumsum(0) - gram.count
        if int(ends[-1]) == int(gram.count.sum()):
            at: torch.Tensor = torch.searchsorted(ends, before.long(), right=True)
            return at.clamp_max(len(ends) - 1)
    raise ValueError(
        f"the statistics of this run have {gram.cells} cells, of groups too, and its samples tell "
        f"{len(cells)}: which of them split {split!r} holds out cannot be told; probe again "
        "without group="
    )


# ------ layers


def _measure(
    layers: Iterable[_Kept],
    targets: Sequence[str],
    split: str,
    asked: _Asked,
    select: str = "",
) -> Subspace:
    found, rooms = {}, dict[tuple[int, int, int], Room]()
    for kept in layers:
        name = kept.name
        try:
            with _threads(kept.gram, asked):
                found[name] = _layer(kept, targets, asked, rooms)
        except NotPositiveError:
            raise ValueError(
                f"{name}: X'X + alpha I is not positive definite in float64: the features are too "
                "badly scaled for so small a penalty; raise the smallest alpha"
            ) from None
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return collect(found, tuple(targets), split, asked.fractions, select)


@contextmanager
def _threads(gram: Gram, asked: _Asked) -> Iterator[None]:
    """One thread for layers of few dimensions, where steps are thousands and short.

    Those are the greedy rankings, and spectra of few rows. After each step threads wait for each
    other: of d = 576 that wins nothing where every core is free, and where others compute too a
    layer took 27 s instead of 1.5.
    """
    short = {"forward", "backward"} & {*asked.rankings} or int(gram.count.sum()) < 2 * gram.dim
    before = torch.get_num_threads()
    try:
        if short and gram.dim <= _ALONE:
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)


def _layer(
    kept: _Kept,
    targets: Sequence[str],
    asked: _Asked,
    rooms: dict[tuple[int, int, int], Room],
) -> Layer:
    """Rank, refit and score one layer, in the room that the last one left if it is as large."""
    gram = kept.gram.cpu()
    sums = totals(gram, kept.folds)
    count = len(sums.held)
    if count < 2:
        raise ValueError(f"held-out R² needs two folds or more; got {count}")
    sizes, step = _sizes(gram.dim, asked.fractions), _at_once(gram, count, asked)
    shape = gram.dim, step, gram.targets
    if shape not in rooms:
        rooms.clear()
        rooms[shape] = Room(*shape)
    room = rooms[shape]
    solved = solve(_gram(gram, sums.held), asked.alphas)
    assert solved.r2 is not None
    alpha, coef = solved.alpha, solved.coef.mT.contiguous()
    drawn = random_orders(gram.dim, asked.random, asked.seed)
    beside = {f"random {i}": one[None] for i, one in enumerate(drawn)}
    train = training_sets(Statistics.of([sums]), gram.targets)
    order, r2 = list[_Named](), list[_Named]()
    for sets in [slice(f, min(f + step, count)) for f in range(0, count, step)]:
        part = subset(train, sets)
        matrices = room.symmetric(part, alpha[sets])
        ranked = _ranked(asked, part, matrices, alpha[sets], coef[sets], room)
        order.append(ranked)
        for i, f in enumerate(range(sets.start, sets.stop)):
            one, held = subset(train, slice(f, f + 1)), sums.held[f : f + 1]
            named = {name: found[i] for name, found in ranked.items()} | beside
            r2.append(_curves(named, one, matrices[i], held, coef[f], sizes, room))
    if beside:
        for found in r2:
            found["random"] = torch.stack([found.pop(draw) for draw in beside], -1)
    names = [*asked.rankings, *(["random"] if beside else [])]
    curves = {name: torch.stack([found[name] for found in r2]) for name in names}
    if asked.study:
        latitude = targets.index("latitude") if "latitude" in targets else 0
        if kept.rows is None:
            curves["study"] = by_gcv(train, sums.held, solved, asked.alphas, sizes, latitude, room)
        else:
            curves["study"] = by_leave_one_out(*kept.rows, asked.alphas, sizes, latitude)
    return Layer(
        sizes,
        curves,
        {name: torch.cat([found[name] for found in order]) for name in asked.rankings},
        _final(asked, gram, sums, alpha, room),
        "" if not asked.study else "gcv" if kept.rows is None else "loo",
        int(train.n.min()),
    )


def _at_once(gram: Gram, count: int, asked: _Asked) -> int:
    """How many training sets are ranked at once: one is in the cache, and greedy steps are small.

    Of all five folds at once, d = 384, forward selection takes 84 ms instead of 218.
    """
    if not {"forward", "backward"} & {*asked.rankings}:
        return 1
    return max(1, min(count, _BYTES // (8 * gram.dim**2 * (1 + gram.targets))))


_Named = dict[str, torch.Tensor]


def _ranked(
    asked: _Asked,
    part: Training,
    matrices: torch.Tensor,
    alpha: torch.Tensor,
    coef: torch.Tensor,
    room: Room,
) -> _Named:
    """Orders [m, k, d] of training sets."""
    return {r: orders(r, part, matrices, alpha, coef, room) for r in asked.rankings}


def _curves(
    order: Mapping[str, torch.Tensor],
    part: Training,
    matrix: torch.Tensor,
    held: torch.Tensor,
    coef: torch.Tensor,
    sizes: torch.Tensor,
    room: Room,
) -> _Named:
    """Held-out R2 of a training set by size, for every order; `coef` [k, d] is of all sizes."""
    few = sizes[sizes < part.dim]
    w = [refits(matrix, part.b[0], one, few, room) for one in order.values()]
    every = coef.expand(len(sizes) - len(few), -1, -1)
    *r2, full = scores_on(held, part, torch.cat([*w, every])[None])[0][0].split(
        [len(few)] * len(w) + [len(every)]
    )
    return {name: torch.cat([one, full]) for name, one in zip(order, r2, strict=True)}


def _final(asked: _Asked, gram: Gram, sums: Totals, alphas: torch.Tensor, room: Room) -> _Named:
    """Orders of all rows, at the best of the alphas of the folds: mostly there is one."""
    alpha = alphas.unique()
    if len(alpha) > 1:
        alpha = solve(_gram(gram, sums.total[None]), alpha.tolist()).alpha
    nothing = replace(sums, held=torch.zeros_like(sums.held[:1]))  # is left out
    part = training_sets(Statistics.of([nothing]), gram.targets)
    matrices = room.symmetric(part, alpha)
    factor, info = Factor.of(room.copy(matrices))
    if info.any():
        raise NotPositiveError([0])
    found = _ranked(asked, part, matrices, alpha, factor.solve(part.b), room)
    return {ranking: one[0] for ranking, one in found.items()}


def _sizes(d: int, fractions: Sequence[float]) -> torch.Tensor:
    return torch.tensor([max(1, round(d * f)) for f in fractions])


def _gram(like: Gram, matrix: torch.Tensor) -> Gram:
    """Statistics with other cells: float64 [cells, p, p] about the same shift."""
    made = Gram(like.dim, like.targets, 0, products=like.products)
    made.cells, made.matrix, made.shift = len(matrix), matrix, like.shift
    return made
