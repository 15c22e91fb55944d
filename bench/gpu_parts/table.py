"""Pooling a site as its layer ends, or all sites in one launch: which is better, and why.

geofast launches once a site, while the next layer runs. One launch for all must keep the hidden
states of all layers until the model is done, so it would have to win much. Three times decide: that
of the launches alone, with inputs beyond the cache; that where each hidden state was just written,
as a layer leaves it, and may still lie in the cache; and the host's.
"""

import statistics
from functools import partial
from itertools import chain

import torch

from geofast.pooling import Pool, pool, role_bit

from . import pooling
from .timing import host_seconds, median_seconds

POOLS = {kind: pooling.POOLS[kind] for kind in ("cls", "mean", "all at once")}


def main(run):
    run.note(
        "table: microseconds a site of a launch for each and of one for all. Just written: an "
        "addition, as a layer ends with, comes right before each launch, or all additions before "
        "the one launch; their own time is taken off."
    )
    for name, shape in (pooling.DRY if run.dry else pooling.SHAPES).items():
        if run.enough(5, name):
            with run.case(name):
                measure(run, name, *shape)


def measure(run, name, batch, tokens, dim, before):
    sites = 3 if run.dry else 25
    new = {"device": run.device, "dtype": torch.bfloat16}
    xs = [torch.randn(batch, tokens, dim, **new) for _ in range(sites)]
    residual, branch = (torch.randn(batch, tokens, dim, **new) for _ in range(2))
    writes = [partial(torch.add, residual, branch, out=x) for x in xs]
    written = 1e6 * median_seconds(run, [partial(all_of, writes)]) / sites
    roles = pooling.roles_for(xs[0], before)
    for kind, names in POOLS.items():
        pools = [Pool.parse(one) for one in names]
        outs = [pooling.outs_for(x, pools) for x in xs]
        each = [partial(pool, x, roles, pools, out) for x, out in zip(xs, outs, strict=True)]
        whole = partial(at_once(run), xs, roles, pools, outs)
        whole()
        for x, out in zip(xs, outs, strict=True):
            pooling.require_right(run, x, roles, pools, out)
        ways = {
            "one by one": each,
            "one launch": [whole],
            "one by one, just written": [*chain(*zip(writes, each, strict=True))],
            "one launch, just written": [*writes, whole],
        }
        us = {n: 1e6 * median_seconds(run, [partial(all_of, w)]) / sites for n, w in ways.items()}
        for way in us:
            us[way] -= written * way.endswith("written")
        run.row(
            "a launch a site, and one for all", input=name, pool=kind, sites=sites, **us,
            **{
                "host us": host_us(run, partial(all_of, each)) / sites,
                "host us, one launch": host_us(run, whole) / sites,
                "MB kept for it": sites * xs[0].nbytes / 1e6,
            },
        )  # fmt: skip


def all_of(calls):
    for call in calls:
        call()


def at_once(run):
    """Return the one launch; a dry run, where no kernel runs, pools site by site in its place."""
    if run.dry:
        return lambda xs, roles, pools, outs: [
            pool(x, roles, pools, out) for x, out in zip(xs, outs, strict=True)
        ]
    from .pool_sites import pool_sites

    return lambda xs, roles, pools, outs: pool_sites(xs, roles, jobs_of(pools, outs))


def jobs_of(pools, outs):
    """Return the jobs of every site, for rows `outs` of every site and pool."""
    parts = [(op, role_bit(role)) for p in pools for op, role in p.parts]
    return [[(*part, out) for part, out in zip(parts, some, strict=True)] for some in outs]


def host_us(run, call):
    """Return how long the host takes to launch, the median of many."""
    return 1e6 * statistics.median(host_seconds(run, call) for _ in range(1 if run.dry else 20))
