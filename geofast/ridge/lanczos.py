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
    norm = start.norm(dim=-1, keepdim=True)
    v = start / norm.clamp_min(torch.finfo(start.dtype).tiny)
    before, beta = torch.zeros_like(v), torch.zeros_like(norm)
    t = start.new_zeros(*start.shape[:2], steps, steps, dtype=torch.float64)
    basis = []
    for j in range(steps):
        if keep:
            basis.append(v)
        u = v.clone()
        factor.solve_lower(u, False)
        diagonal = u.square().sum(-1, keepdim=True)
        factor.solve_lower(u, True)
        u -= diagonal * v + beta * before
        beta = u.norm(dim=-1, keepdim=True)
        # An invariant subspace ends the recurrence: the rest decouples with no weight.
        beta = torch.where(beta > 1e-6 * diagonal, beta, 0.0)
        before, v = v, torch.where(beta > 0, u / beta.clamp_min(torch.finfo(u.dtype).tiny), 0.0)
        t[..., j, j] = diagonal[..., 0]
        if j + 1 < steps:
            t[..., j + 1, j] = beta[..., 0]
    return Lanczos(t, norm[..., 0].double(), torch.stack(basis, 2) if keep else None)
