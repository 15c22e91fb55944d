"""An experiment: every pooling of all sites of a model in one launch.

Hidden states and rows of every site are arguments of the kernel, as problems are of geofast's Gram
kernel: a table of pointers on the device would be copied there before every launch, from pinned
memory that must wait for the copy, and a CUDA graph would hold an old one. With 25 sites and five
pools the pointers take 1.2 of 4 KB.
"""

import torch
import triton
import triton.language as tl
from geofast.kernels import pool as kernels
from geofast.kernels.pool import pool_kernel


@triton.jit(do_not_specialize=["tokens", "roles_stride"])
def sites_kernel(
    xs,
    roles,
    outs,
    out_strides,
    x_stride,
    token_stride,
    roles_stride,
    tokens,
    dim,
    JOBS: tl.constexpr,
    READ: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Be `pool_kernel` at one of many sites; `outs` are the first site's, the second's, ..."""
    site = tl.program_id(1)
    x = xs[0]
    for i in tl.static_range(1, len(xs)):
        x = tl.where(site == i, xs[i], x)
    mine = ()
    for j in tl.static_range(len(JOBS)):
        out = outs[j]
        for i in tl.static_range(1, len(xs)):
            out = tl.where(site == i, outs[i * len(JOBS) + j], out)
        mine += (out,)
    pool_kernel(
        x, roles, None, mine, out_strides, x_stride, token_stride, roles_stride, tokens, dim,
        JOBS, READ, False, BLOCK_T, BLOCK_D, STAGES,
    )  # fmt: skip


def launch(xs, roles, jobs, processors=132):
    """Return the grid and the arguments of `sites_kernel`; `jobs` are those of every site."""
    x, sites = xs[0], len(xs)
    _, arguments = kernels.launch(x, roles, jobs[0], None, processors)
    for name in ("x", "starts", "PACKED"):
        del arguments[name]
    samples, dim = len(x), x.shape[2]
    tile = kernels.blocks(
        x.element_size(), sites * samples, dim, processors, arguments["READ"] != 0
    )
    outs = tuple(out for some in jobs for _, _, out in some)
    grid = (samples * triton.cdiv(dim, tile["BLOCK_D"]), sites)
    return grid, arguments | tile | {"xs": tuple(xs), "outs": outs}


def pool_sites(xs, roles, jobs):
    """As geofast's `kernels.pool` of each of `xs`, of one shape, dtype and layout.

    The jobs of a site, (op, bit, out), are those of the first but for where their rows go.
    """
    for x, some in zip(xs, jobs, strict=True):
        kernels._check(x, roles, some, None)
    with torch.cuda.device_of(xs[0]):
        grid, arguments = launch(xs, roles, jobs, kernels._processors(xs[0].device))
        sites_kernel[grid](**arguments)
