"""What a search for dimensions found: curves, stability, the smallest set, and the dimensions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from .stability import KEEP, jaccard, jaccard_by_chance, smallest


@dataclass(frozen=True)
class Layer:
    """What was measured of one layer."""

    sizes: torch.Tensor
    """int64 [P]: how many dimensions each fraction keeps."""
    r2: Mapping[str, torch.Tensor]
    """By ranking: held-out R2 [F, P, k]; of `random` [F, P, k, draws]."""
    order: Mapping[str, torch.Tensor]
    """By ranking: int64 [F, k, d], the order of each training part."""
    final: Mapping[str, torch.Tensor]
    """By ranking: int64 [k, d], the order made from all rows."""
    study: str
    """As `Subspace.study`."""
    train: int
    """Rows of the smallest training part."""


@dataclass(frozen=True, eq=False, repr=False)
class Subspace:
    """Which dimensions hold the targets, and how few suffice.

    Attributes
    ----------
    curves : DataFrame
        A row per site x pool x prompt x target x ranking x fraction: `site, pool, prompt, target,
        ranking, fraction, dims` (their number), `r2` (held-out, mean over folds), `r2_se` (standard
        error over folds) and, of the ranking `random`, `r2_low, r2_high`: the lowest and the
        highest of the draws (of their means over folds).
    smallest : DataFrame
        A row per site x pool x prompt x target x ranking: `r2` on all dimensions, and the smallest
        of the fractions that keeps 95 % of it, `fraction` and `dims`, with its 95 % interval
        `fraction_low, fraction_high` by the bootstrap of the folds. Missing where R2 on all
        dimensions is not above zero.
    stability : DataFrame
        As `curves` without R2: `jaccard`, the mean Jaccard index of the sets of two folds over all
        pairs of folds; `chance`, that of two random sets of the same size; and `above_chance`,
        (jaccard - chance) / (1 - chance), missing for all dimensions.
    ranks : mapping of str to mapping of str to Tensor
        By name (`site/pool` or `site/pool/prompt`) and ranking: int64 [k, d], all dimensions, best
        first, ranked from all rows at the best of the alphas of the folds. For use on other samples
        than those of the run: for `curves` every training part had ranks of its own.
    targets : tuple of str
    split : str
        The split of the run; empty when there was no run.
    study : str
        How the ranking `study` chose its alphas: `loo`, by exact leave-one-out as the study does,
        or `gcv`, by generalised cross-validation where there were statistics only. Empty when it
        was not measured.
    select : str
        How the run chose its own alphas, so its R2 on all dimensions; empty when there was no run.
    draws : int
        How many random orders were drawn; 0 for none, and in a folder of an older version, whose
        `r2_low, r2_high` are percentiles of the draws, 2.5 and 97.5.
    train : int
        Rows of the smallest training part; 0 in a folder of an older version.
    """

    curves: pd.DataFrame
    smallest: pd.DataFrame
    stability: pd.DataFrame
    ranks: Mapping[str, Mapping[str, torch.Tensor]]
    targets: tuple[str, ...]
    split: str
    study: str
    select: str = ""
    draws: int = 0
    train: int = 0

    def __repr__(self) -> str:
        rankings = ", ".join(dict.fromkeys(self.curves["ranking"]))
        return f"Subspace({len(self.ranks)} sites x pools, by {rankings})"

    def __str__(self) -> str:
        from .text import summary

        return summary(self)

    def dims(
        self, site: str, target: str, share: float, *, ranking: str | None = None, pool: str = ""
    ) -> torch.Tensor:
        """Return the first dimensions of a site for a target, best first.

        Parameters
        ----------
        site
            A site that has one pool and prompt, or the whole name `site/pool/prompt`.
        target
            The target they were ranked for.
        share
            Share of all dimensions, above 0 and at most 1; at least one is returned.
        ranking
            One of the rankings that were measured; None takes the first.
        pool
            The pool of the site, where it has several.

        Returns
        -------
        Tensor, int64 [round(share * d)]

        Raises
        ------
        ValueError
            For a site, pool, target, ranking or share that is not there.
        """
        names = [n for n in self.ranks if site == n or n.split("/")[0] == site]
        names = [n for n in names if not pool or n.split("/")[1] == pool]
        if len(names) != 1:
            there = ", ".join(names or self.ranks)
            which = "several of" if names else "no"
            raise ValueError(f"{which} site {site!r}, pool {pool!r} to take: {there}")
        found = self.ranks[names[0]]
        ranking = next(iter(found), "") if ranking is None else ranking
        if ranking not in found:
            raise ValueError(f"ranking {ranking!r} was not measured; there are {', '.join(found)}")
        if target not in self.targets:
            raise ValueError(f"no target {target!r}; there are {', '.join(self.targets)}")
        if not 0 < share <= 1:
            raise ValueError(f"share must be above 0 and at most 1; got {share}")
        order = found[ranking][self.targets.index(target)]
        return order[: max(1, round(share * len(order)))]

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write subspace.csv (`curves`), subspace_smallest.csv and subspace_stability.csv.

        Also subspace.safetensors with the `ranks`, and for people subspace.png and subspace.html.
        The folder is made where it is missing. `open` reads it.

        Parameters
        ----------
        folder
            Where to write; other files there stay.
        overwrite
            Replace the search that is there.

        Raises
        ------
        FileExistsError
            When it holds a search and `overwrite` is False, or a run, which is written whole.
        OSError
            When they cannot be written.
        """
        from ..report import subspace as report
        from . import store

        store.check_free(folder, overwrite)
        path = Path(folder).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        store.write(self, path)
        report.write(self, path, folder)
        return path

    @staticmethod
    def open(folder: str | Path) -> Subspace:
        """Read what `save` wrote.

        Raises
        ------
        FileNotFoundError
            When the folder holds no search for dimensions.
        ValueError
            When it does and is damaged, or of a later format.
        """
        from . import store

        return store.read(folder)


_SMALLEST = (
    "site", "pool", "prompt", "target", "ranking", "r2", "fraction", "fraction_low",
    "fraction_high", "dims",
)  # fmt: skip
_STABILITY = (
    "site", "pool", "prompt", "target", "ranking", "fraction", "dims", "jaccard", "chance",
    "above_chance",
)  # fmt: skip


def collect(
    layers: Mapping[str, Layer],
    targets: tuple[str, ...],
    split: str,
    fractions: Sequence[float],
    select: str,
) -> Subspace:
    """Put what was measured into tables."""
    curves, few, stable = list[dict[str, Any]](), list[dict[str, Any]](), list[dict[str, Any]]()
    for name, layer in layers.items():
        for where, at in _each(name, layer, targets):
            curves += _curve(where, layer, at, fractions)
            if where["ranking"] != "random":
                few.append(_smallest(where, layer, at, fractions))
        stable += _stability(name, layer, targets, fractions)
    ranks = {name: layer.final for name, layer in layers.items()}
    # Without a ranking, tables without a row, and with their columns.
    smallest_sets = pd.DataFrame(few, columns=_SMALLEST).astype({"dims": "Int64"})
    tables = pd.DataFrame(curves), smallest_sets, pd.DataFrame(stable, columns=_STABILITY)
    study = next((layer.study for layer in layers.values()), "")
    drawn = [layer.r2["random"].shape[-1] for layer in layers.values() if "random" in layer.r2]
    draws = max(drawn, default=0)
    train = min((layer.train for layer in layers.values()), default=0)
    return Subspace(*tables, ranks, targets, split, study, select, draws, train)


def _each(
    name: str, layer: Layer, targets: Sequence[str]
) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
    """The key of every curve, and its R2 [F, P], of `random` [F, P, draws]."""
    for ranking, r2 in layer.r2.items():
        for t, target in enumerate(targets):
            yield {**_parts(name), "target": target, "ranking": ranking}, r2[:, :, t]


def _parts(name: str) -> dict[str, Any]:
    site, pool, *prompt = name.split("/", 2)
    return {"site": site, "pool": pool, "prompt": prompt[0] if prompt else ""}


def _curve(
    where: dict[str, Any], layer: Layer, r2: torch.Tensor, fractions: Sequence[float]
) -> list[dict[str, Any]]:
    low = high = torch.full((len(fractions),), torch.nan, dtype=torch.float64)
    if r2.ndim == 3:
        low, high = r2.mean(0).aminmax(dim=1)
        r2 = r2.mean(2)
    mean, se = r2.mean(0), r2.std(0) / len(r2) ** 0.5
    columns = zip(fractions, layer.sizes, mean, se, low, high, strict=True)
    return [
        {
            **where, "fraction": f, "dims": int(p), "r2": float(m), "r2_se": float(s),
            "r2_low": float(a), "r2_high": float(b),
        }
        for f, p, m, s, a, b in columns
    ]  # fmt: skip


def _smallest(
    where: dict[str, Any], layer: Layer, r2: torch.Tensor, fractions: Sequence[float]
) -> dict[str, Any]:
    best, low, high = smallest(r2, KEEP)
    share = [float("nan") if at is None else fractions[at] for at in (best, low, high)]
    return {
        **where, "r2": float(r2[:, -1].mean()), "fraction": share[0],
        "fraction_low": share[1], "fraction_high": share[2],
        "dims": pd.NA if best is None else int(layer.sizes[best]),
    }  # fmt: skip


@lru_cache(1)
def _chance(d: int, sizes: tuple[int, ...]) -> list[float]:
    """By chance, which is the same for every layer of a width."""
    return jaccard_by_chance(d, torch.tensor(sizes)).tolist()


def _stability(
    name: str, layer: Layer, targets: Sequence[str], fractions: Sequence[float]
) -> list[dict[str, Any]]:
    d = int(layer.sizes[-1])
    chance = _chance(d, tuple(layer.sizes.tolist()))
    rows = []
    for ranking, order in layer.order.items():
        agree = jaccard(order, layer.sizes)
        for t, target in enumerate(targets):
            for f, p, j, c in zip(
                fractions, layer.sizes.tolist(), agree[:, t].tolist(), chance, strict=True
            ):
                above = (j - c) / (1 - c) if p < d else float("nan")
                rows.append(
                    {
                        **_parts(name), "target": target, "ranking": ranking, "fraction": f,
                        "dims": p, "jaccard": j, "chance": c, "above_chance": above,
                    }
                )  # fmt: skip
    return rows
