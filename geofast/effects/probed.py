"""Where in a model a run's probes say that an edit may be made."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..models import Model
from ..models.structure import matches
from ..pooling import Pool
from ..run import Probe, Run


@dataclass(frozen=True)
class Probed:
    """A site, the tokens that are edited there, and the probe that says which dimensions."""

    probe: Probe
    role: str

    @property
    def site(self) -> str:
        """Name of the site."""
        return self.probe.site


def probed_sites(
    run: Run, model: Model, sites: str | Sequence[str] | None = None, role: str | None = None
) -> list[Probed]:
    """Choose one of a run's probes for every site, in the order of the forward pass.

    Parameters
    ----------
    run
        With probes.
    model
        Of which the run is; for one that talks about images, as it is to be asked.
    sites
        Names or globs of sites, or whole names of probes (`site/pool/prompt`); None takes every
        site that was probed. Of several pools and prompts of a site that one is taken which has the
        highest R2 in the run's first split, those of `role` first.
    role
        Which tokens to edit; None takes those that the probe's pool reads. A pool that joins two,
        whose rows are no state of the model, is left out.

    Raises
    ------
    ValueError
        When the run is of another model, has no such site, only a pool there that joins two, or a
        site that the model has not.
    """
    _require_run_of(run, model)
    wanted = [sites] if isinstance(sites, str) else sites
    found: dict[str, list[Probe]] = {}
    for pattern in ["*"] if wanted is None else wanted:
        here = [
            probe
            for name, probe in run.probes.items()
            if wanted is None or name == pattern or matches(probe.site, pattern)
        ]
        if not here:
            there = ", ".join(dict.fromkeys(p.site for p in run.probes.values())) or "none"
            raise ValueError(f"the run never probed a site {pattern!r}; it has {there}")
        for probe in here:
            found.setdefault(probe.site, []).append(probe)
    if not found:
        raise ValueError("sites= is empty; give names or globs, or None for every probed site")
    order = {site.name: i for i, site in enumerate(model.sites(list(found)))}
    return [_choose(run, found[site], role) for site in sorted(found, key=order.__getitem__)]


def _choose(run: Run, probes: Sequence[Probe], role: str | None) -> Probed:
    roles = {probe.name: r for probe in probes if (r := role_of(probe.pool))}
    if not roles:
        raise ValueError(
            f"the pool of {probes[0].name} joins several: its dimensions are none of the model's; "
            "probe with a pool of one part"
        )
    fit = [p for p in probes if p.name in roles]
    fit = [p for p in fit if roles[p.name] == role] or fit
    if len(fit) > 1:
        table = run.rows_of(run.splits[0]).set_index(["site", "pool", "prompt"])["r2"]
        fit.sort(key=lambda p: -table.get((p.site, p.pool, p.prompt), float("-inf")))
    return Probed(fit[0], role or roles[fit[0].name])


def role_of(pool: str) -> str:
    """Return the tokens that a pool reads, as an edit's role; empty where it joins several."""
    (operation, role), *more = Pool.parse(pool).parts
    return "" if more else "last" if operation == "last" else role


def _require_run_of(run: Run, model: Model) -> None:
    # A checkpoint may lie in a folder here and have been loaded by its id there.
    of_run = run.info.get("model")
    names = [re.split(r"[/\\]", str(name).rstrip("/\\"))[-1] for name in (of_run, model.name)]
    if of_run and names[0] != names[1]:
        raise ValueError(f"the run is of {of_run}, and this model is {model.name}")
