"""Pooling alone: as a share of the copy bandwidth, and against torch's way."""

import torch

from geofast import _reference
from geofast.pooling import Pool, pool, role_bit

from .run import ceiling, share
from .timing import copies, median_seconds

SHAPES = {  # batch, tokens, dim, tokens before the patches
    "ViT-L/14, batch 64": (64, 257, 1024, 1),
    "ViT-L/14, batch 256": (256, 257, 1024, 1),
    "Qwen2.5-VL-7B, batch 8": (8, 500, 3584, 0),
}
DRY = {"dry": (3, 9, 16, 1)}
POOLS = {
    "cls": ["cls"],
    "last": ["last"],
    "mean": ["mean:patch"],
    "all at once": ["cls", "mean:patch", "max:patch", "min:patch", "last"],
}


def main(run):
    for name, shape in (DRY if run.dry else SHAPES).items():
        with run.case(name):
            measure(run, name, *shape)


def measure(run, name, batch, tokens, dim, before):
    size = batch * tokens * dim * 2
    xs = [
        torch.randn(batch, tokens, dim, device=run.device).to(torch.bfloat16)
        for _ in range(1 if run.dry else copies(size))
    ]
    roles = roles_for(xs[0], before)
    copied = median_seconds(run, [copy_of_half(x) for x in xs])
    mean = None
    for kind, names in POOLS.items():
        pools = [Pool.parse(one) for one in names]
        check(run, xs[0], roles, pools)
        ours = median_seconds(run, [ours_on(x, roles, pools) for x in xs])
        cached = median_seconds(run, [ours_on(xs[0], roles, pools)] * 4)
        torchs = median_seconds(run, [torch_on(x, before, kind) for x in xs])
        mean = ours if kind == "mean" else mean
        reads = kind not in ("cls", "last")
        goals = {"% of copy": ("at least", 85)} if reads else {}
        if kind == "all at once":
            goals["to mean"] = ("at most", 1.1)
        run.row(
            "pooling", goals, input=name, pool=kind, us=1e6 * ours,
            **{
                "% of copy": share(size / ours / 1e9, ceiling(run, "copy")) if reads else None,
                "% of a copy of its size": share(copied, ours) if reads else None,
                "in cache us": 1e6 * cached,
                "to mean": ours / mean if kind == "all at once" else None,
                "torch to ours": torchs / ours,
            },
        )  # fmt: skip


def roles_for(x, before):
    """Roles of an image's tokens, `before` of which stand before its patches."""
    roles = torch.full(x.shape[:2], 1 << role_bit("all"), dtype=torch.uint8, device=x.device)
    roles[:, before:] |= 1 << role_bit("patch")
    roles[:, 0] |= 1 << role_bit("cls")
    return roles


def copy_of_half(x):
    """A copy that reads and writes as many bytes in all as pooling reads."""
    half = x.view(-1)[: x.numel() // 2]
    to = torch.empty_like(half)
    return lambda: to.copy_(half)


def outs_for(x, pools, dtype=torch.float32):
    return [
        torch.full((len(x), p.width(x.shape[2])), 7e7, dtype=dtype, device=x.device) for p in pools
    ]


def ours_on(x, roles, pools):
    outs = outs_for(x, pools)
    return lambda: pool(x, roles, pools, outs)


def torch_on(x, before, kind):
    """The same as a user of torch writes it."""
    ways = {
        "cls": lambda: x[:, 0].float(),
        "last": lambda: x[:, -1].float(),
        "mean": lambda: x[:, before:].float().mean(1),
        "all at once": lambda: (
            x[:, 0].float(), x[:, before:].float().mean(1), x[:, before:].amax(1).float(),
            x[:, before:].amin(1).float(), x[:, -1].float(),
        ),
    }  # fmt: skip
    return ways[kind]


def check(run, x, roles, pools):
    """Hold ours to the float64 reference, on other numbers every time."""
    x = x * torch.randn(x.shape[-1], device=x.device).to(x.dtype)
    outs = outs_for(x, pools)
    pool(x, roles, pools, outs)
    require_right(run, x, roles, pools, outs)


def require_right(run, x, roles, pools, outs):
    """Stop where rows are not those of the reference."""
    for p, out in zip(pools, outs, strict=True):
        ((op, role),) = p.parts
        want = torch.empty(out.shape, dtype=torch.float64, device=x.device)
        _reference.pool(x, roles, [(op, role_bit(role), want)])
        off = float((out - want).norm() / want.norm())
        bound = 1e-6 if op == "mean" else 0.0
        run.require(
            off <= bound, f"pool {p.name} is off by {off:.1e}; at most {bound:.0e} is right"
        )
