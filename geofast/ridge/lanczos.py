"""Lanczos on the inverse behind a factor: what one factor knows of every other penalty."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .factor import Factor


@dataclass(frozen=True)
class Lanczos:
    """(L L')^-1 on the Krylov space of each start vector.

    `t` [M, r, steps, steps] is tridiagonal, lower triangle, float64; `norm` [M, r] that of the
    start; `basis` [M, r, steps, d] what t is written in, if it was kept.
    """

    t: torch.Tensor
    norm: torch.Tensor
    basis: torch.Tensor | None

    @property
    def steps(self) -> int:
        return self.t.shape[-1]

    def quadrature(self, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Nodes and weights [M, r, steps] of Gauss quadrature; the weights add up to norm^2."""
        nodes, vectors = torch.linalg.eigh(self.t[..., :steps, :steps])
        return nodes, vectors[..., 0, :].square() * self.norm[..., None].square()

    def solve(self, shifts: torch.Tensor) -> torch.Tensor:
        """About (L L' + shift I)^-1 start for `shifts` [M, A]: float64 [M, A, r, d]."""
        assert self.basis is not None
        nodes, vectors = torch.linalg.eigh(self.t)
        nodes = nodes.clamp_min(0)[:, None]
        inverse = nodes / (1.0 + shifts[..., None, None] * nodes).clamp_min(1e-12)
        weights = inverse * (vectors[:, :, 0] * self.norm[..., None])[:, None]
        inside = torch.einsum("mrij,marj->mari", vectors, weights)
        return torch.einsum("mari,mrid->mard", inside, self.basis.double())


def lanczos(factor: Factor, start: torch.Tensor, steps: int, *, keep: bool) -> Lanczos:
    """Lanczos steps from `start` [M, r, d] with M factors.

    No reorthogonalisation: a repeated node shares its weight.
    """
    norm, tiny = start.norm(dim=-1, keepdim=True), torch.finfo(start.dtype).tiny
    v = start / norm.clamp_min(tiny)
    before, beta = torch.zeros_like(v), torch.zeros_like(norm)
    basis, diagonals, betas = [], [], []
    for _ in range(steps):
        if keep:
            basis.append(v)
        u = v.clone()
        factor.solve_lower(u, False)
        diagonal = u.square().sum(-1, keepdim=True)
        factor.solve_lower(u, True)
        u.addcmul_(diagonal, v, value=-1).addcmul_(beta, before, value=-1)
        beta = u.norm(dim=-1, keepdim=True)
        # An invariant subspace ends the recurrence: the rest decouples with no weight.
        ended = (beta > 1e-6 * diagonal).logical_not_()
        beta.masked_fill_(ended, 0.0)
        before, v = v, u.div_(beta.clamp_min(tiny)).masked_fill_(ended, 0.0)
        diagonals.append(diagonal)
        betas.append(beta)
    t = start.new_zeros(*start.shape[:2], steps, steps, dtype=torch.float64)
    t.diagonal(dim1=2, dim2=3).copy_(torch.cat(diagonals, 2))
    t.diagonal(-1, dim1=2, dim2=3).copy_(torch.cat(betas[:-1], 2))
    return Lanczos(t, norm[..., 0].double(), torch.stack(basis, 2) if keep else None)
