"""Where in a model a run's probes say that an edit may be made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..models import Model
from ..models.structure import matches
from ..pooling import Pool
from ..run import Probe, Run
from ..steering.edit import EDIT_ROLES, same_model


@dataclass(frozen=True)
class Probed:
    """A site, the tokens that are edited there, and the probe that says which dimensions."""

    probe: Probe
    role: str

    @property
    def site(self) -> str:
        """Name of the site."""
        return self.probe.site


def require_probed(
    run: Run, sites: str | Sequence[str] | None = None, role: str | None = None
) -> list[Probed]:
    """Choose one of a run's probes for every site, in the run's order: that of the forward pass.

    Parameters
    ----------
    run
        With probes.
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
        When the run has no such site, or only a pool there that joins two; or the role is none.
    """
    if role is not None and role not in EDIT_ROLES:
        raise ValueError(f"role must be one of {', '.join(EDIT_ROLES)}; got {role!r}")
    wanted = [sites] if isinstance(sites, str) else sites
    found: dict[str, list[Probe]] = {}
    for pattern in ["*"] if wanted is None else wanted:
        here = [
            probe
            for name, probe in run.probes.items()
            if wanted is None or name == pattern or matches(probe.site, pattern)
        ]
        if not here:
            there = ", ".join(_sites(run)) or "none"
            raise ValueError(f"the run never probed a site {pattern!r}; it has {there}")
        for probe in here:
            found.setdefault(probe.site, []).append(probe)
    if not found:
        raise ValueError("sites= is empty; give names or globs, or None for every probed site")
    return [_choose(run, found[site], role) for site in _sites(run) if site in found]


def require_run_of(run: Run, model: Model) -> None:
    """Refuse a model that is not the run's.

    Raises
    ------
    ValueError
        When it has another name.
    """
    of_run = str(run.info.get("model") or "")
    if of_run and not same_model(of_run, model.name):
        raise ValueError(f"the run is of {of_run}, and this model is {model.name}")


def require_sites_of(run: Run, model: Model) -> None:
    """Refuse a model, as it reads the run's samples, that lacks a site which the run probed.

    Raises
    ------
    ValueError
        Naming the site.
    """
    lost = [site for site in _sites(run) if site not in {s.name for s in model.every_site}]
    if lost:
        raise ValueError(f"the run probed {lost[0]}, which {model.name} does not have")


def _sites(run: Run) -> list[str]:
    return list(dict.fromkeys(probe.site for probe in run.probes.values()))


def _choose(run: Run, probes: Sequence[Probe], role: str | None) -> Probed:
    roles = {probe.name: r for probe in probes if (r := Pool.parse(probe.pool).role)}
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
