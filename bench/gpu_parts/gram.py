"""Gram matrices: as a share of the float64 matrix rate, against cuBLAS and torch."""

import itertools
from functools import partial

import torch

from geofast import _ops, _reference

from .run import ceiling, share
from .timing import copies, median_seconds

SYRK = "syrk"  # CuPy captures no graph of it
TARGETS = 3  # columns of z: ones and two targets
BOUNDS = {"float64": 1e-12, "float32": 2e-6}  # of sqrt(G_ii G_jj)


class Job:
    """Layers of rows, their cells, and where the sums go; `sets` of them lie beyond the cache.

    Rows are float32, as they are pooled, or bfloat16, as tokens are read. They have large means, as
    hidden states do.
    """

    def __init__(self, run, d, n, layers=1, cells=1, dtype=torch.float32, sets=None):
        self.d, self.n, self.layers, self.cells, self.dtype = d, n, layers, cells, dtype
        p = d + TARGETS
        triangles, rows = layers * 8 * cells * p * p // 2, layers * n * d * dtype.itemsize
        self.bytes = 2 * triangles + rows
        """Read and written at least."""
        self.sets = range(sets or (1 if run.dry else copies(triangles + rows, least=1)))
        new = {"device": run.device}
        self.shift = 5 * torch.randn(d, dtype=torch.float64, **new)
        self.xs = [
            [(torch.randn(n, d, **new) + self.shift.float()).to(dtype) for _ in range(layers)]
            for _ in self.sets
        ]
        self.z = torch.randn(n, TARGETS, dtype=torch.float64, **new)
        self.z[:, 0] = 1
        cell = torch.randint(0, cells, (n,))
        self.order = torch.argsort(cell, stable=True).to(run.device)
        ends = torch.bincount(cell, minlength=cells).cumsum(0)
        self.bounds = [0, *ends.tolist()]
        self.offsets = torch.tensor(self.bounds, device=run.device)
        self.outs = [
            [torch.zeros(cells, p, p, dtype=torch.float64, **new) for _ in range(layers)]
            for _ in self.sets
        ]

    @property
    def flops(self):
        """Useful ones: a triangle, its products and sums."""
        return self.layers * self.n * self.d**2

    def ours(self, products, i=0):
        shifts = [self.shift] * self.layers
        return lambda: _ops.grams(
            self.xs[i], shifts, self.z, self.order, self.offsets, self.outs[i], products=products
        )

    def error(self, products):
        """Largest error of one call, of sqrt(G_ii G_jj): first and last layer, all cells."""
        for out in self.outs[0]:
            out.zero_()
        self.ours(products)()
        worst = 0.0
        for layer in {0, self.layers - 1}:
            want = torch.zeros_like(self.outs[0][layer])
            arguments = (
                self.xs[0][layer],
                self.shift,
                self.z,
                self.order,
                self.offsets.cpu(),
                want,
            )
            _reference.gram(*arguments)
            worst = max(worst, relative_error(self.outs[0][layer], want))
        return worst


def relative_error(got, want):
    """Largest difference of lower triangles, of sqrt(G_ii G_jj); infinite if one is not finite."""
    scale = want.diagonal(dim1=-2, dim2=-1).clamp_min(1e-300).sqrt()
    off = ((got - want).tril().abs() / scale[..., :, None] / scale[..., None, :]).amax()
    return float(off) if bool(off.isfinite()) else float("inf")


def main(run):
    ways = peer_ways(run)
    for job in grouped(run):  # the first makes kernels, and is slow
        if run.enough(6, f"{job['layers']} layers of d={job['d']}"):
            with run.case(f"{job['layers']} layers of d={job['d']}"):
                many_layers(run, ways, **job)
    rows = [40] if run.dry else [512, 8192] if run.quick else [64, 512, 2048, 8192]
    widths = [24] if run.dry else [768, 1024, 2048, 3584, 4096, 8192]
    for d in widths:
        for n in rows:
            if run.enough(3, f"d={d}, {n} rows"):
                with run.case(f"d={d}, {n} rows"):
                    one_layer(run, ways, d, n)


def grouped(run):
    """What a pass flushes at once, and what a batch's tokens are."""
    if run.dry:
        return [{"d": 16, "n": 60, "layers": 3, "cells": 5}]
    return [
        {"d": 1024, "n": 2048, "layers": 25, "cells": 5},
        {"d": 3584, "n": 2048, "layers": 29, "cells": 5},
        {"d": 4096, "n": 2048, "layers": 33, "cells": 5},
        # Every patch of 64 images, a site at a time, as the model makes them.
        {"d": 1024, "n": 64 * 256, "layers": 1, "cells": 5, "dtype": torch.bfloat16},
    ]


def one_layer(run, ways, d, n):
    job = Job(run, d, n)
    seconds, errors = ours(run, job)
    x64 = [xs[0].double() - job.shift for xs in job.xs]
    mine = [torch.zeros(d, d, dtype=torch.float64, device=run.device) for _ in job.sets]
    peers = {}
    for name, (ready, convert) in [*ways.items()]:
        with run.peer(f"{name}, d={d}, {n} rows"):
            check_peer(run, name, convert, job.xs[0][0], job.shift)
            calls = [
                partial(convert, g, xs[0], job.shift) for g, xs in zip(mine, job.xs, strict=True)
            ]
            launches = len(calls) if name == SYRK else None
            peers[f"{name} from rows"] = median_seconds(run, calls, 0.1, launches)
            if ready:
                calls = [partial(ready, g, x) for g, x in zip(mine, x64, strict=True)]
                peers[name] = median_seconds(run, calls, 0.1, launches)
        if f"{name} from rows" not in peers:
            del ways[name]  # it would fail again
    record(run, "one layer", job, seconds, errors, peers)


def many_layers(run, ways, d, n, layers, cells, dtype=torch.float32):
    job = Job(run, d, n, layers, cells, dtype, sets=1)
    seconds, errors = ours(run, job)
    parts = [job.order[a:b] for a, b in itertools.pairwise(job.bounds)]
    out = torch.zeros(d, d, dtype=torch.float64, device=run.device)
    peers = {}
    for name, (_, convert) in ways.items():

        def each(convert=convert):
            for x in job.xs[0]:
                for part in parts:
                    convert(out, x[part], job.shift)

        with run.peer(f"{name}, {layers} layers of d={d}"):
            launches = layers * cells if name == SYRK else None
            peers[f"{name} from rows"] = median_seconds(run, [each], 0.1, launches)
    record(run, "many layers", job, seconds, errors, peers)


def ours(run, job):
    """Seconds and errors by kind of product; wrong sums stop the case."""
    seconds, errors = {}, {}
    for products, bound in BOUNDS.items():
        errors[products] = job.error(products)
        run.require(
            errors[products] <= 5 * bound,
            f"products={products!r}: off by {errors[products]:.1e} of sqrt(G_ii G_jj)",
        )
        seconds[products] = median_seconds(run, [job.ours(products, i) for i in job.sets], 0.2)
    return seconds, errors


def record(run, table, job, seconds, errors, peers):
    ours = seconds["float64"]
    of_rate = share(job.flops / ours / 1e12, ceiling(run, "float64"))
    of_copy = share(job.bytes / ours / 1e9, ceiling(run, "copy"))
    # Of few rows it is not the products that take the time, but the sums that they are added to.
    bound = "% of copy" if of_rate and of_copy and of_copy > of_rate else "% of float64"
    goals = {
        bound: ("at least", 65),
        "error": ("at most", BOUNDS["float64"]),
        "float32 error": ("at most", BOUNDS["float32"]),
    }
    values = {
        "d": job.d, "rows": job.n, "layers": job.layers, "cells": job.cells,
        "of": str(job.dtype).removeprefix("torch."), "us": 1e6 * ours,
        "% of float64": of_rate, "% of copy": of_copy, "error": errors["float64"],
        "float32 us": 1e6 * seconds["float32"], "float32 error": errors["float32"],
    }  # fmt: skip
    for name, other in peers.items():
        values[f"{name} to ours"] = other / ours
        # What probing has are rows that must be shifted and widened first.
        if name.endswith("from rows"):
            goals[f"{name} to ours"] = ("at least", 1.0)
    run.row(table, goals, **values)


# ------ peers


def peer_ways(run):
    """By name, the sum of float64 rows about the shift (or None), and that of rows as they are.

    Both are added in place to float64 [d, d]; of syrk's the lower triangle.
    """
    ways = {"addmm_": (addmm, lambda out, x, shift: addmm(out, x.double() - shift))}
    if not run.dry:
        with run.peer("cuBLAS syrk"):
            syrk = cublas_syrk()
            ways[SYRK] = (syrk, lambda out, x, shift: syrk(out, x.double() - shift))
        ways["compiled"] = (None, torch.compile(ways["addmm_"][1], dynamic=True))
    return ways


def addmm(out, x64):
    out.addmm_(x64.T, x64)


def cublas_syrk():
    """Return cuBLAS's own update, in place, on torch's memory and stream."""
    import cupy
    from cupy import cublas

    def syrk(out, x64):
        with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            a, to = cupy.from_dlpack(x64), cupy.from_dlpack(out)
            cublas.syrk("T", a, out=to, alpha=1.0, beta=1.0, lower=True)

    return syrk


def check_peer(run, name, convert, x, shift):
    """A peer that computes something else is not timed."""
    got = torch.ones(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    convert(got, x, shift)
    x64 = x.double() - shift
    off = relative_error(got - 1, x64.T @ x64)
    run.require(off < 1e-10, f"{name} is off by {off:.1e} of sqrt(G_ii G_jj)")
