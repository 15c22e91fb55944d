"""How much the sets that folds choose agree, and how few dimensions suffice."""

from __future__ import annotations

import itertools

import torch

KEEP = 0.95  # of the R2 on all dimensions
_DRAWS = 1000


def jaccard(order: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Mean Jaccard index of the first p dimensions over all pairs of folds: float64 [P, k].

    Parameters
    ----------
    order
        int64 [F, k, d], best first; two folds at least.
    sizes
        int64 [P].
    """
    rank = order.argsort(-1).transpose(0, 1)  # [k, F, d]: the place of every dimension
    member = (rank < sizes[:, None, None, None]).double()
    common = member @ member.mT  # [P, k, F, F]
    p = sizes[:, None].double()
    pairs = [
        common[..., i, j] / (2 * p - common[..., i, j])
        for i, j in itertools.combinations(range(len(order)), 2)
    ]
    return torch.stack(pairs).mean(0)


def jaccard_by_chance(d: int, sizes: torch.Tensor) -> torch.Tensor:
    """Mean Jaccard index of two random sets of p of d dimensions: float64 [P].

    What two such sets have in common is hypergeometric.
    """
    out = []
    for p in sizes.tolist():
        x = torch.arange(max(0, 2 * p - d), p + 1, dtype=torch.float64)
        log = _log_choose(p, x) + _log_choose(d - p, p - x)
        weight = torch.softmax(log, 0)
        out.append((weight * x / (2 * p - x)).sum())
    return torch.stack(out)


def _log_choose(n: int, k: torch.Tensor) -> torch.Tensor:
    top = torch.tensor(n + 1.0, dtype=torch.float64)
    return torch.lgamma(top) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


def smallest(r2: torch.Tensor, keep: float = KEEP) -> tuple[int | None, int | None, int | None]:
    """Find the smallest size that keeps the share `keep` of the R2 on all dimensions.

    Parameters
    ----------
    r2
        float64 [F, P]: held-out R2 of every fold, sizes ascending, the last one all dimensions.
    keep
        The share.

    Returns
    -------
    tuple
        The place of the size by the mean over folds, and the ends of its 95 % interval: by the
        bootstrap of the folds (percentiles of 1000 draws). Draws without an R2 above zero are left
        out; where the mean has none, there is nothing to keep, and all three are None.
    """
    generator = torch.Generator().manual_seed(0)
    draw = torch.randint(len(r2), (_DRAWS, len(r2)), generator=generator)
    (best,) = _first(r2.mean(0, keepdim=True), keep)
    if best < 0:
        return None, None, None
    drawn = _first(r2[draw].mean(1), keep)
    drawn = drawn[drawn >= 0].double()
    low, high = (int(torch.quantile(drawn, q, interpolation="nearest")) for q in (0.025, 0.975))
    return int(best), low, high


def _first(curve: torch.Tensor, keep: float) -> torch.Tensor:
    """Place of the first size of each curve [N, P] that suffices, -1 without an R2: int64 [N]."""
    full = curve[:, -1:]
    enough = (curve >= keep * full).to(torch.uint8).argmax(1)
    return torch.where(full[:, 0] > 0, enough, -1)
