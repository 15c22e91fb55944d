"""Other tiles for the kernels in Triton, which are told their tiles by a function of the shape.

Not of the eight minutes: every tile is a kernel to compile.
"""

import itertools
from unittest import mock

import torch

from geofast.pooling import Pool

from . import gram, pooling
from .timing import copies, median_seconds

POOLED = {"mean": ["mean:patch"], "all at once": ["cls", "mean:patch", "max:patch", "min:patch"]}


def main(run):
    from geofast.kernels import gram as gram_kernels
    from geofast.kernels import pool as pool_kernels

    for name, shape in (pooling.DRY if run.dry else pooling.SHAPES).items():
        for kind, names in POOLED.items():
            pools = [Pool.parse(one) for one in names]
            for tile in pool_tiles():
                if not run.enough(3, "tiles of pooling"):
                    return
                with (
                    mock.patch.object(pool_kernels, "blocks", return_value=tile),
                    run.peer(f"{name}, {kind}, {tile}"),
                ):
                    seconds = pooled(run, shape, pools)
                    run.row("pooling", input=name, pool=kind, **tile, us=1e6 * seconds)
    hopper = gram_kernels.blocks(9)
    for tile in gram_tiles():
        if not run.enough(3, "tiles of the Gram"):
            return
        with (
            mock.patch.object(gram_kernels, "blocks", return_value=hopper | tile),
            run.peer(f"Gram, {tile}"),
        ):
            run.row("Gram with float32 products", **tile, **summed(run))


def pool_tiles():
    for nbytes, wide, stages, warps in itertools.product(
        (8192, 16384), (64, 128, 256), (2, 3, 4), (4, 8)
    ):
        tokens = nbytes // (2 * wide)  # of 16 bits
        yield {"BLOCK_T": tokens, "BLOCK_D": wide, "STAGES": stages, "num_warps": warps}


def gram_tiles():
    for high, wide, rows, stages, warps in itertools.product(
        (64, 128), (64,), (16, 32), (2, 3, 4), (4, 8)
    ):
        names = ("BLOCK_I", "BLOCK_J", "BLOCK_N", "STAGES", "num_warps")
        yield dict(zip(names, (high, wide, rows, stages, warps), strict=True))


def pooled(run, shape, pools):
    batch, tokens, dim, before = shape
    count = 1 if run.dry else copies(batch * tokens * dim * 2)
    xs = [torch.randn(batch, tokens, dim, device=run.device).bfloat16() for _ in range(count)]
    roles = pooling.roles_for(xs[0], before)
    pooling.check(run, xs[0], roles, pools)
    return median_seconds(run, [pooling.ours_on(x, roles, pools) for x in xs], 0.2)


def summed(run):
    """Seconds and error of one layer of each width."""
    found = {}
    for d in [24] if run.dry else [1024, 4096]:
        job = gram.Job(run, d, 40 if run.dry else 2048)
        error = job.error("float32")
        run.require(error < 1e-5, f"off by {error:.1e}")
        calls = [job.ours("float32", i) for i in job.sets]
        found[f"d={d} us"] = 1e6 * median_seconds(run, calls, 0.2)
    return found
