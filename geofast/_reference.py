"""What the compiled core must compute, in plain torch float64.

It is the expected value in the tests, and it serves the devices that have no kernel. The functions
take the arguments of their namesakes in `_core` and write in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def pool(
    x: torch.Tensor, roles: torch.Tensor, jobs: Sequence[tuple[str, int, torch.Tensor]]
) -> None:
    """Reduce the tokens of a role to one row a sample, for every job.

    Parameters
    ----------
    x
        [batch, tokens, dim], any floating-point dtype.
    roles
        [batch, tokens] uint8; bit k says whether a token has role k.
    jobs
        (op, bit, out): op is `first`, `last`, `mean`, `max` or `min`, and out is a tensor
        [batch, dim]. NaN passes through max and min; a sample with no token of the role gives NaN.
    """
    for op, bit, out in jobs:
        has = (roles >> bit & 1).bool()
        if op in ("first", "last"):
            out.copy_(_token(x, has, op))
        elif op == "mean":
            total = torch.where(has[..., None], x.double(), 0.0).sum(1)
            out.copy_(total / has.sum(1, keepdim=True))
        else:
            out.copy_(_extreme(x, has, op))


def _token(x: torch.Tensor, has: torch.Tensor, op: str) -> torch.Tensor:
    out = torch.full_like(x.new_empty(x.shape[0], x.shape[2]), torch.nan, dtype=torch.float64)
    samples = has.any(1).nonzero()[:, 0]
    if samples.numel():
        has = has[samples].byte()
        at = has.argmax(1) if op == "first" else has.shape[1] - 1 - has.flip(1).argmax(1)
        out[samples] = x[samples, at].double()
    return out


def _extreme(x: torch.Tensor, has: torch.Tensor, op: str) -> torch.Tensor:
    if x.shape[1] == 0:
        return x.new_full((x.shape[0], x.shape[2]), torch.nan)
    least = -torch.inf if op == "max" else torch.inf
    kept = torch.where(has[..., None], x, least)
    extreme = kept.amax(1) if op == "max" else kept.amin(1)
    return torch.where(has.any(1, keepdim=True), extreme, torch.nan)


def project(
    x: torch.Tensor,
    shift: torch.Tensor,
    w: torch.Tensor,
    out: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
) -> None:
    """Compute out[i, j] = sum over c of (x[rows[i], c] - shift[c]) * w[j, c].

    Parameters
    ----------
    x
        [n, dim], any floating-point dtype.
    shift, w
        float64 [dim] and [m, dim].
    out
        float64 [len(rows), m].
    rows
        int64 row numbers of x in any order, repeats allowed; all rows when None.
    """
    taken = x if rows is None else x[rows]
    out.copy_((taken.double() - shift) @ w.T)


def project_t(
    x: torch.Tensor,
    shift: torch.Tensor,
    r: torch.Tensor,
    out: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
) -> None:
    """Compute out[j, c] = sum over i of r[i, j] * (x[rows[i], c] - shift[c]).

    Parameters
    ----------
    x
        [n, dim], any floating-point dtype.
    shift, r
        float64 [dim] and [len(rows), m].
    out
        float64 [m, dim].
    rows
        int64 row numbers of x in any order, repeats allowed; all rows when None.
    """
    taken = x if rows is None else x[rows]
    out.copy_(r.T @ (taken.double() - shift))
