"""The dimensions that an edit takes first: one order for latitude and longitude together."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..gram import totals
from ..run import Probe, Run
from ..steering.make import top_dims
from ..subspace.ranking import RANKINGS

_PLACE = ("latitude", "longitude")


def ranked_dims(run: Run, name: str, ranking: str | None = None) -> torch.Tensor:
    """Rank the dimensions of one of a run's probes for all that an edit is to move at once.

    `coef` and `coef_std` are ranked as `top_dims` does, by the sum over latitude and longitude of
    |coef|, or of |coef| times the standard deviation of the rows, each scaled to 0 to 1. `forward`
    and `backward` are orders of one target each: the dimension that either takes earliest comes
    first, latitude's before longitude's. A probe without both targets is ranked by all it has.

    Parameters
    ----------
    run
        With the probe; all rankings but `coef` also ask for its rows or statistics.
    name
        `site/pool`, or `site/pool/prompt`.
    ranking
        One of `coef`, `coef_std`, `forward`, `backward`; None takes `coef_std`.

    Returns
    -------
    Tensor, int64 [d]
        All dimensions, best first. The rows of all samples of the run rank them.

    Raises
    ------
    ValueError
        When the run has no such probe, the ranking is unknown, or asks for rows or statistics that
        the run does not keep.
    """
    ranking = "coef_std" if ranking is None else ranking
    if ranking not in RANKINGS:
        raise ValueError(f"ranking must be one of {', '.join(RANKINGS)}; got {ranking!r}")
    if name not in run.probes:
        raise ValueError(f"the run has no probe {name!r}; it has {', '.join(run.probes) or 'none'}")
    probe = _of_place(run.probes[name])
    if ranking == "coef":
        return top_dims(probe, 1.0)
    if name not in (run.rows or run.grams or {}):
        msg = f"the run keeps neither rows nor statistics of {name}: take ranking='coef', or probe "
        raise ValueError(msg + "again with storage='gram' (--storage gram)")
    if ranking == "coef_std":
        return top_dims(probe, 1.0, std_of(run, name))
    found = run.subspace(sites=probe.site, rankings=[ranking], fractions=[1.0], random=0)
    orders = found.ranks[name][ranking][[run.targets.index(t) for t in probe.targets]]
    earliest = orders.argsort(dim=1).amin(0)  # the place of each dimension in its best order
    return earliest.argsort(stable=True)


def std_of(run: Run, name: str) -> torch.Tensor:
    """Return the standard deviation of each dimension of a probe's rows, float64 [d].

    Of the rows that the run keeps, or else of its statistics, all cells together.
    """
    if run.rows is not None:
        return run.rows[name].double().std(0, correction=0)
    assert run.grams is not None
    gram = run.grams[name].cpu()
    sums, d = totals(gram).total, gram.dim
    mean = sums[d, :d] / sums[d, d]
    return (sums.diagonal()[:d] / sums[d, d] - mean.square()).clamp(min=0).sqrt()


def _of_place(probe: Probe) -> Probe:
    """Return the probe of latitude and longitude alone, where it has both."""
    if not set(_PLACE) <= set(probe.targets):
        return probe
    columns = [probe.targets.index(target) for target in _PLACE]
    return replace(
        probe,
        targets=_PLACE,
        coef=probe.coef[:, columns],
        intercept=probe.intercept[columns],
    )
