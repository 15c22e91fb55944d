"""What makes edits: of the states of other inputs, of a probe, of statistics, of a direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..gram import Gram, totals
from ..pooling import Pool
from ..run import Probe
from .edit import Edit, Phase
from .generation import States

Numbers = float | Sequence[float] | torch.Tensor
Dims = Sequence[int] | torch.Tensor | None


def top_dims(probe: Probe, share: float, std: torch.Tensor | None = None) -> torch.Tensor:
    """Return the dimensions to which a probe gives the largest coefficients.

    They are ranked by the sum over targets of |coef|, each target's scaled to the range 0 to 1, as
    the study of geospatial dimensions does for its swap; the earlier of two equals comes first.

    Parameters
    ----------
    probe
        Of d dimensions.
    share
        Of them, 0 to 1; round(share * d) are returned.
    std
        [d] standard deviations of the rows: rank by |coef| * std, whatever each dimension's scale.

    Returns
    -------
    Tensor, int64 [round(share * d)]
        The highest rank first.

    Raises
    ------
    ValueError
        When `share` is not a share, or `std` is not [d].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be 0 to 1; got {share}")
    weight = probe.coef.abs().cpu()
    if std is not None:
        if std.shape != (len(weight),):
            raise ValueError(f"std must be [{len(weight)}]; got {list(std.shape)}")
        weight = weight * std.to(weight)[:, None]
    low, high = weight.amin(0), weight.amax(0)
    score = ((weight - low) / (high - low).clamp(min=torch.finfo(weight.dtype).tiny)).sum(1)
    return score.argsort(descending=True, stable=True)[: round(share * len(weight))]


def swap(states: States, dims: Dims = None, *, phase: Phase = "prompt") -> Edit:
    """Write dimensions of other inputs' states in place of a token's own.

    Parameters
    ----------
    states
        Of the targets, from `gf.states`: one each for the samples of a batch, or one for all; see
        `Edit.take`. Token by token, where the targets have several of the role; what they have one
        of is written to all. With steps, each generated token takes what the target has at the
        same step; without, all take what its prompt has.
    dims
        int64 [m]; None for all.
    phase
        `prompt`, `steps` or `both`.

    Returns
    -------
    Edit
        At all sites of `states`, on the tokens of its role.

    Raises
    ------
    ValueError, TypeError
        When `dims` are out of range, the widths of the sites differ, or as `Edit` does.
    """
    widths = sorted({t.shape[-1] for t in states.at.values()})
    if len(widths) > 1:
        msg = f"the sites are {widths[0]} and {widths[-1]} wide: make an edit for each width"
        raise ValueError(msg)
    chosen = _dims(dims, widths[0])
    values = torch.stack([t.cpu() for t in states.at.values()])[..., chosen]
    if phase == "prompt":
        values = values[:, :, : states.in_prompt]
    return Edit(
        "swap", tuple(states.at), widths[0], chosen, values, states.role, phase, model=states.model
    )


def patch(states: States, *, phase: Phase = "prompt") -> Edit:
    """Write other inputs' whole states in place of a token's own; see `swap`."""
    return replace(swap(states, phase=phase), mode="patch")


def add(
    sites: str | Sequence[str],
    direction: torch.Tensor,
    amount: Numbers,
    spread: float | Gram,
    *,
    dims: Dims = None,
    role: str = "last",
    phase: Phase = "prompt",
    model: str = "",
) -> Edit:
    """Add a direction, in standard deviations of the hidden states along it.

    Parameters
    ----------
    sites
        Names or globs.
    direction
        [d], of any length but 0; only `dims` of it count.
    amount
        How many standard deviations, for all samples, or a number for each.
    spread
        The standard deviation along the direction, or statistics of the site from which it comes.
    dims, role, phase, model
        See `Edit`; dims None is all.

    Raises
    ------
    ValueError, TypeError
        When the direction is 0 or not [d], the spread is not positive, or as `Edit` does.
    """
    if direction.ndim != 1:
        raise ValueError(f"direction must be [d]; got {list(direction.shape)}")
    chosen = _dims(dims, len(direction))
    unit = torch.zeros(len(direction), dtype=torch.float64)
    unit[chosen] = direction.detach().cpu().double()[chosen]
    if not (length := float(unit.norm())) > 0:
        raise ValueError(f"direction has length {length} in the chosen dims")
    unit /= length
    if isinstance(spread, Gram):
        _require_width(spread, len(direction))
        spread = float((unit @ _moments(spread).cov @ unit).clamp(min=0).sqrt())
    if not spread > 0:
        raise ValueError(f"spread must be positive; got {spread}")
    values = (_per_sample(amount) * spread)[:, None] * unit[chosen]
    return Edit(
        "add", _names(sites), len(direction), chosen, values[None, :, None], role, phase,
        model=model,
    )  # fmt: skip


def set_to(
    probe: Probe,
    latitude: Numbers,
    longitude: Numbers,
    dims: Dims = None,
    *,
    sites: str | Sequence[str] | None = None,
    role: str | None = None,
    phase: Phase = "prompt",
    model: str = "",
) -> Edit:
    """Move what a probe reads to a place, by the smallest change inside the chosen dimensions.

    With C = coef[dims] [m, 2] and the reading y = h @ coef + intercept, the shortest change of
    h[dims] after which the probe reads t is C (C'C)^-1 (t - y): least squares of minimal norm. Each
    token is moved by itself, and with all of them their mean.

    Parameters
    ----------
    probe
        With targets `latitude` and `longitude`; others may move.
    latitude, longitude
        Degrees, -90 to 90 and -180 to 180: one place for all samples, or one each.
    dims
        int64 [m]; None for all.
    sites, role
        None: where the probe was fitted, and the tokens that its pool takes.
    phase, model
        See `Edit`.

    Raises
    ------
    ValueError, TypeError
        When a place is off the sphere, the probe has no such targets, its coefficients in `dims`
        do not suffice, its pool takes the most or the least of tokens, or as `Edit` does.
    """
    places = _places(latitude, longitude)
    role = role or _role_of(probe.pool)
    if {operation for operation, _ in Pool.parse(probe.pool).parts} & {"max", "min"}:
        msg = f"{probe.name} pools the extremes of tokens, which moving each of them does not set: "
        raise ValueError(msg + "take a probe of a mean or of one token")
    columns = _columns(probe, ("latitude", "longitude"))
    coef, intercept = probe.coef.cpu()[:, columns], probe.intercept.cpu()[columns]
    chosen = _dims(dims, len(coef))
    c = coef[chosen]
    if int(torch.linalg.matrix_rank(c)) < 2:
        msg = f"in these {len(chosen)} dims the probe's coefficients cannot move latitude and "
        raise ValueError(msg + "longitude apart: choose more")
    left = torch.linalg.solve(c.T @ c, c.T).T
    values = (places - intercept)[None, :, None]
    return Edit(
        "set", _names(sites or probe.site), len(coef), chosen, values,
        role, phase, left, coef.T.contiguous(), model,
    )  # fmt: skip


def ablate(
    what: Probe | Gram,
    dims: Dims = None,
    *,
    sites: str | Sequence[str] | None = None,
    role: str | None = None,
    phase: Phase = "prompt",
    model: str = "",
) -> Edit:
    """Take the targets out of the hidden states.

    Of a probe, its directions are projected out: h[g] - Q Q' h[g], where Q is an orthonormal basis
    of coef[g]. Of statistics, it is least-squares concept erasure: the smallest change, measured by
    the variance of the states, after which no linear map predicts the targets better than their
    mean. With S = cov(x), A = cov(x, y): x - A (A' S^+ A)^+ A' S^+ (x - mean), which is
    x - W^+ P W (x - mean) of the source with W = S^(-1/2), written without the root.

    Parameters
    ----------
    what
        A probe, or the statistics of its site and pool, all cells together.
    dims
        int64 [m]; None for all.
    sites, role
        Where; None takes those of the probe. With statistics both must be given.
    phase, model
        See `Edit`.

    Raises
    ------
    ValueError, TypeError
        When `sites` or `role` are missing, the statistics have fewer rows than 2, or as `Edit`
        does.

    References
    ----------
    Belrose et al., LEACE: Perfect linear concept erasure in closed form, NeurIPS 2023
    (arXiv:2306.03819), theorem 4.3.
    """
    if isinstance(what, Probe):
        sites, role = sites or what.site, role or _role_of(what.pool)
        width = len(what.coef)
        chosen = _dims(dims, width)
        left = _basis(what.coef.cpu()[chosen])
        within, offset = left.T, torch.zeros(left.shape[1], dtype=torch.float64)
    else:
        if sites is None or role is None:
            raise ValueError("statistics do not say where they are of: give sites= and role=")
        width = what.dim
        chosen = _dims(dims, width)
        moments = _moments(what)
        cov, left = moments.cov[chosen][:, chosen], moments.cross[chosen]
        # Features of no variance are left alone: A is in the range of S, and so is S^+ A.
        solved = torch.linalg.pinv(cov, hermitian=True) @ left
        within = torch.linalg.pinv(left.T @ solved, hermitian=True) @ solved.T
        offset = within @ moments.mean[chosen]
    right = torch.zeros(len(within), width, dtype=torch.float64)
    right[:, chosen] = within
    return Edit(
        "ablate", _names(sites), width, chosen, offset[None, None, None], role, phase,
        left.contiguous(), right, model,
    )  # fmt: skip


def _basis(directions: torch.Tensor) -> torch.Tensor:
    """Orthonormal basis of the columns of [m, k], which need not be independent."""
    u: torch.Tensor
    u, s, _ = torch.linalg.svd(directions, full_matrices=False)
    enough = s > s.amax().clamp(min=0) * max(directions.shape) * torch.finfo(s.dtype).eps
    return u[:, enough] if len(s) else u


@dataclass(frozen=True)
class _Moments:
    mean: torch.Tensor
    """[d]"""
    cov: torch.Tensor
    """[d, d]"""
    cross: torch.Tensor
    """[d, k]: covariance with the targets."""


def _moments(gram: Gram) -> _Moments:
    """Mean and covariances of all rows of some statistics, float64 on the CPU."""
    sums, d = totals(gram.cpu()), gram.dim
    whole = sums.total + sums.total.tril(-1).T
    n = float(whole[d, d])
    if n < 2:
        raise ValueError(f"statistics of {n:.0f} rows have no covariance")
    mean = whole[d] / n  # of [x - c, 1, y - e]
    cov = whole / n - mean[:, None] * mean
    return _Moments(sums.shift[:d] + mean[:d], cov[:d, :d], cov[:d, d + 1 :])


def _require_width(gram: Gram, width: int) -> None:
    if gram.dim != width:
        raise ValueError(f"the statistics are {gram.dim} wide, and the direction is {width}")


def _dims(dims: Dims, width: int) -> torch.Tensor:
    if dims is None:
        return torch.arange(width)
    chosen = torch.as_tensor(dims).cpu()
    chosen = chosen.long() if not chosen.numel() else chosen
    # Here too: who indexes by a dimension that is not there learns less from torch.
    if chosen.dtype == torch.int64 and chosen.ndim == 1:
        bad = chosen[(chosen < 0) | (chosen >= width)]
        if len(bad):
            raise ValueError(f"dimension {int(bad[0])} is out of range: the width is {width}")
        return chosen
    raise TypeError(f"dims must be int64 [m]; got {chosen.dtype} {list(chosen.shape)}")


def _names(sites: str | Sequence[str]) -> tuple[str, ...]:
    return (sites,) if isinstance(sites, str) else tuple(sites)


def _role_of(pool: str) -> str:
    """The tokens that a pool takes."""
    role = Pool.parse(pool).role
    if role is None:
        raise ValueError(f"pool {pool!r} joins several: say role=, and take a probe of one")
    return role


def _columns(probe: Probe, names: Sequence[str]) -> list[int]:
    missing = [name for name in names if name not in probe.targets]
    if missing:
        has = ", ".join(probe.targets)
        raise ValueError(f"the probe {probe.name} reads no {missing[0]}, only {has}")
    return [probe.targets.index(name) for name in names]


def _per_sample(value: Numbers) -> torch.Tensor:
    numbers = torch.as_tensor(value, dtype=torch.float64).cpu()
    if numbers.ndim > 1 or not numbers.numel():
        raise ValueError(f"expected a number, or one for each sample; got {list(numbers.shape)}")
    return numbers.reshape(-1)


def _places(latitude: Numbers, longitude: Numbers) -> torch.Tensor:
    """Degrees [samples, 2]."""
    both = [_per_sample(latitude), _per_sample(longitude)]
    if len(both[0]) != len(both[1]):
        raise ValueError(f"{len(both[0])} latitudes and {len(both[1])} longitudes: give as many")
    for name, values, most in zip(("latitude", "longitude"), both, (90, 180), strict=True):
        bad = values[~(values.abs() <= most)]
        if len(bad):
            raise ValueError(f"{name} {float(bad[0])} is off the sphere: -{most} to {most} degrees")
    return torch.stack(both, 1)
