"""The arms of an experiment: the edit at every share of dimensions, and the controls beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from ..geo import great_circle_km
from ..ridge.solve import fit
from ..run import Probe, Run
from ..steering.edit import Edit, Phase
from ..steering.generation import States
from ..steering.make import patch, set_to, swap
from ..subspace.ranking import random_orders
from .dims import ranked_dims

CONTROLS = ("random dims", "random direction", "shuffled labels", "mean difference")
"""`random dims`: the same edit in as many random dimensions, the first ones of one permutation.
`random direction`: a random direction in all dimensions is added, as long as the change that the
edit makes to that pair's prompt. `shuffled labels`: the same edit in the dimensions that a probe
ranks first that was fitted to the places in random order. `mean difference`: the mean row of other
samples near the target less that of others near the source is added, in all dimensions and whatever
the share (contrastive activation addition; Rimsky et al., ACL 2024, arXiv 2312.06681)."""

OTHER_DIMS = ("random dims", "shuffled labels")
"""Controls that are the same edit in other dimensions. Where all are edited they would be the edit
itself, and are not run."""
MODES = ("swap", "patch", "set")
NEAR = 10
"""Samples that are near a place, where no column says which are."""

Index = NDArray[np.int64]
Make = Callable[[Index], list[Edit]]
"""Given numbers of pairs, returns the edits with values for them, in their order."""


@dataclass(frozen=True, eq=False)
class Written:
    """Where the edits are, and what is written there."""

    probe: Probe
    mode: str
    role: str
    phase: Phase
    model: str
    sources: Index
    """Of each pair, the number of its source among the distinct samples."""
    targets: Index
    states: States | None
    """Of the distinct samples, for `swap` and `patch`."""
    rows: torch.Tensor | None
    """[distinct, d]: their pooled rows at the site, for `set`."""
    places: torch.Tensor
    """float64 [distinct, 2]: latitude and longitude in degrees."""

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return len(self.probe.coef)

    def count(self, share: float) -> int:
        """How many dimensions a share is: one at least, unless it is 0."""
        return max(int(share > 0), round(share * self.width))

    def write(self, dims: torch.Tensor, samples: Index) -> Edit:
        """Return the edit that writes distinct samples, in that order, in some dimensions."""
        if self.mode == "set":
            latitude, longitude = self.places[torch.from_numpy(samples)].T
            return set_to(
                self.probe, latitude, longitude, dims, role=self.role, phase=self.phase,
                model=self.model,
            )  # fmt: skip
        assert self.states is not None
        at = {site: x[torch.from_numpy(samples)] for site, x in self.states.at.items()}
        states = replace(self.states, at=at)
        if self.mode == "patch":
            return patch(states, phase=self.phase)
        return swap(states, dims, phase=self.phase)

    def lengths(self, dims: torch.Tensor) -> torch.Tensor:
        """How far `write` moves the prompts' tokens of each pair: float64 [pairs, tokens].

        `set` moves every token by its own way to the place; taken is that of the pooled row.
        """
        sources, targets = torch.from_numpy(self.sources), torch.from_numpy(self.targets)
        if self.states is not None:
            (x,) = self.states.at.values()
            x = x[:, : self.states.in_prompt, dims].double()
            apart: torch.Tensor = (x[targets] - x[sources]).norm(dim=2)
            return apart
        edit = self.write(dims, self.targets)
        assert edit.left is not None
        assert edit.right is not None
        assert self.rows is not None
        way = edit.values[0, :, 0] - self.rows.double()[sources] @ edit.right.T
        apart = (way @ edit.left.T).norm(dim=1)
        return apart[:, None]

    def add(self, values: torch.Tensor) -> Edit:
        """Return the edit that adds [pairs, tokens, d]."""
        every = torch.arange(self.width)
        return Edit(
            "add", (self.probe.site,), self.width, every, values[None].float(), self.role,
            self.phase, model=self.model,
        )  # fmt: skip


@dataclass(eq=False)
class Arms:
    """What is run for every pair. Arms that come to the same edits are run once."""

    place: Written
    table: list[tuple[str, float, int]] = field(default_factory=lambda: [("none", 0.0, 0)])
    """Name and share of every arm, and the number of its edits in `makes`."""
    makes: list[Make] = field(default_factory=lambda: [lambda _: []])
    """The first is the model as it is."""
    written: list[tuple[float, torch.Tensor]] = field(default_factory=list)
    """Shares above 0 and dimensions of the arm `edit`."""
    sizes: list[int] = field(default_factory=lambda: [0])
    """About how many values each edit has for a pair."""
    _seen: dict[tuple[int, ...], int] = field(default_factory=dict)

    def write(self, name: str, share: float, order: torch.Tensor) -> None:
        """Add an arm that writes the first share of dimensions of an order."""
        place = self.place
        # In their own order: arms with the same dimensions are the same.
        dims = order[: place.count(share)].sort().values
        key = tuple(dims.tolist())
        if not key:
            self.table.append((name, share, 0))
            return
        if name == "edit":
            self.written.append((share, dims))
        place.write(dims, place.targets[:1])  # refuses here what cannot be written
        if key not in self._seen:
            self._seen[key] = self._added(
                lambda pairs: [place.write(dims, place.targets[pairs])], len(dims)
            )
        self.table.append((name, share, self._seen[key]))

    def add(self, name: str, share: float, values: Callable[[Index], torch.Tensor]) -> None:
        """Add an arm that adds values [pairs, tokens, d]."""
        place = self.place
        number = self._added(lambda pairs: [place.add(values(pairs))], place.width)
        self.table.append((name, share, number))

    def edits(self, samples: Index) -> list[Edit]:
        """Return the edits of the arm `edit` with values for distinct samples, a share each."""
        return [self.place.write(dims, samples) for _, dims in self.written]

    def _added(self, make: Make, size: int) -> int:
        self.makes.append(make)
        states = self.place.states
        tokens = 1 if states is None else next(iter(states.at.values())).shape[1]
        self.sizes.append(size * tokens)
        return len(self.makes) - 1


def make_arms(
    place: Written,
    run: Run,
    order: torch.Tensor,
    shares: Sequence[float],
    controls: Sequence[str],
    ranking: str | None,
    seed: int,
    differences: torch.Tensor | None,
) -> Arms:
    """Lay out all arms.

    Parameters
    ----------
    place
        Of the pairs.
    run
        Of whose samples the labels are shuffled.
    order
        int64 [d]: the dimensions, best first.
    shares
        Of dimensions, 0 to 1.
    controls
        Some of `CONTROLS` that can be had.
    ranking
        That made `order`; see `ranked_dims`.
    seed
        Of the permutation, the directions and the shuffled places.
    differences
        [pairs, d], from `mean_differences`; for the control of that name.

    Returns
    -------
    Arms
        The unedited model first, then share by share, the smallest first, the edit and the
        controls. Where the edit is in all dimensions, as `patch` always is, there are none of
        `OTHER_DIMS`.
    """
    name, pairs = place.probe.name, len(place.sources)
    orders = {"edit": order}
    whole = {share for share in shares if place.count(share) == place.width}
    if whole == {*shares}:
        controls = [c for c in controls if c not in OTHER_DIMS]
    if "random dims" in controls:
        orders["random dims"] = random_orders(place.width, 1, seed)[0]
    if "shuffled labels" in controls:
        orders["shuffled labels"] = ranked_dims(shuffled(run, name, seed), name, ranking)
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(pairs, place.width, generator=generator, dtype=torch.float64)
    random /= random.norm(dim=1, keepdim=True)
    arms = Arms(place)
    difference = 0
    for share in sorted(shares):
        arms.write("edit", share, orders["edit"])
        for control in controls:
            if control in OTHER_DIMS and share in whole:
                continue
            if control in orders:
                arms.write(control, share, orders[control])
            elif not share:
                arms.table.append((control, share, 0))
            elif control == "random direction":
                lengths = place.lengths(orders["edit"][: place.count(share)])
                arms.add(control, share, _along(random, lengths))
            elif difference:
                arms.table.append((control, share, difference))
            else:
                assert differences is not None
                arms.add(control, share, _along(differences, torch.ones(pairs, 1)))
                difference = len(arms.makes) - 1
    return arms


def _along(directions: torch.Tensor, lengths: torch.Tensor) -> Callable[[Index], torch.Tensor]:
    """Values [pairs, tokens, d] of directions [pairs, d] and lengths [pairs, tokens]."""

    def values(pairs: Index) -> torch.Tensor:
        which = torch.from_numpy(pairs)
        return lengths[which][:, :, None] * directions[which][:, None]

    return values


def distinct(numbers: Index) -> tuple[Index, Index]:
    """Return each number once, in the order in which they come, and the place of each there."""
    found, first, back = np.unique(numbers, return_index=True, return_inverse=True)
    order = first.argsort()
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return found[order].astype(np.int64), rank[back].astype(np.int64)


def shuffled(run: Run, name: str, seed: int) -> Run:
    """Return a run whose samples have each other's targets, with its one probe fitted to those.

    The probe keeps its penalty.

    Raises
    ------
    ValueError
        When the run keeps no rows.
    """
    if run.rows is None or name not in run.rows:
        raise ValueError(f"the run keeps no rows of {name}")
    targets = list(run.targets)
    order = np.random.default_rng(seed).permutation(len(run.samples))
    samples = run.samples.copy()
    samples[targets] = run.samples[targets].to_numpy()[order]
    probe = run.probes[name]
    y = torch.from_numpy(samples[targets].to_numpy("float64", copy=True))
    solved = fit(run.rows[name], y, [probe.alpha]).cpu()
    other = replace(probe, coef=solved.coef[0], intercept=solved.intercept[0])
    return replace(run, samples=samples, probes={name: other}, rows={name: run.rows[name]})


def mean_differences(
    run: Run,
    name: str,
    ids: Sequence[tuple[str, str]],
    places: torch.Tensor,
    column: str,
    values: Sequence[tuple[str, str]] | None,
) -> torch.Tensor:
    """Mean row near each target less that near its source.

    Near are the samples of the run with the same value in a column; without it, or where there is
    no other such sample, the 10 nearest. The pair's own samples are never among them.

    Parameters
    ----------
    run
        With rows.
    name
        Of the rows.
    ids
        Of the sources and targets.
    places
        float64 [pairs, 2, 2]: latitude and longitude of source and target.
    column
        Of the run's samples, such as `country`; empty for none.
    values
        Of the sources and targets in that column; None for none.

    Returns
    -------
    Tensor, float64 [pairs, d]

    Raises
    ------
    ValueError
        When the run keeps no rows, or has no samples but the pair's.
    """
    if run.rows is None or name not in run.rows:
        raise ValueError(f"the run keeps no rows of {name}")
    rows, table = run.rows[name], run.samples
    own = table["id"].astype(str).to_numpy()
    kinds = table[column].astype(str).to_numpy() if column and column in table else None
    where = table[["latitude", "longitude"]].to_numpy("float64")
    weights = np.zeros((len(ids), 2, len(own)))
    for pair, both in enumerate(ids):
        others = ~np.isin(own, both)
        if not others.any():
            raise ValueError(f"the run has no samples but {both[0]} and {both[1]}")
        for side in range(2):
            near = others & False
            if kinds is not None and values is not None:
                near = others & (kinds == values[pair][side])
            if not near.any():
                km = great_circle_km(*where.T, *places[pair, side].numpy())
                near[np.where(others, km, np.inf).argsort(kind="stable")[:NEAR]] = True
                near &= others
            weights[pair, side] = near / near.sum()
    return torch.from_numpy(weights[:, 1] - weights[:, 0]) @ rows.double()


def left_out(run: Run, name: str, controls: Sequence[str]) -> Mapping[str, str]:
    """Say which controls cannot be had of a run, and why."""
    if run.rows is not None and name in run.rows:
        return {}
    why = "the run keeps no rows of this site: probe with storage='rows' (--storage rows)"
    return {c: why for c in controls if c in ("shuffled labels", "mean difference")}
