"""Probing inside a CUDA graph and of a compiled model; without a GPU, what would forbid the graph.

A graph writes to the same rows in every replay: take them away before the next one.
"""

from types import SimpleNamespace

import pytest
import tiny
import torch
from pretend import DEVICE, Far, Pretend
from torch.utils._pytree import tree_leaves

import geofast as gf
from geofast import _ops, _reference
from geofast.pooling import parse_pools, pool
from geofast.rows import Rows

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
POOLS = {"vit": ["cls", "mean:patch"], "llama": ["last", "mean", "max:text"]}


def given(family, seed, device="cuda"):
    torch.manual_seed(seed)
    if family == "vit":
        return {"pixel_values": torch.randn(3, 3, 32, 32).to(device)}
    mask = torch.ones(3, 6, dtype=torch.int64)
    mask[1, 3 + seed :] = mask[2, : 1 + seed] = 0
    ids = torch.randint(3, 99, (3, 6))
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "use_cache": False}


def captured(call):
    """Return a graph of a call whose kernels are made before."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def renew(held, new):
    for name, value in new.items():
        if isinstance(value, torch.Tensor):
            held[name].copy_(value)


# ------ on a GPU


@needs_gpu
def test_pooling_in_a_graph():
    x, roles = torch.zeros(3, 50, 40, device="cuda"), torch.zeros(3, 50, dtype=torch.uint8).cuda()
    pools = parse_pools(["cls", "mean:patch", "max:patch", "last"])
    outs = [torch.empty(3, 40, device="cuda") for _ in pools]
    graph = captured(lambda: pool(x, roles, pools, outs))
    for seed in (1, 2):
        torch.manual_seed(seed)
        x.normal_()
        roles.copy_(torch.randint(64, (3, 50)).byte() | 1)
        graph.replay()
        wants = [torch.empty(3, 40, dtype=torch.float64, device="cuda") for _ in pools]
        pool(x, roles, pools, wants)
        for got, want in zip(outs, wants, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@needs_gpu
@pytest.mark.parametrize(("products", "bound"), [("float64", 1e-12), ("float32", 1e-5)])
def test_statistics_in_a_graph(products, bound):
    n, d, q, layers = 200, 40, 3, 2
    x = torch.zeros(layers, n, d, device="cuda")
    shift, z = (torch.zeros(*s, dtype=torch.float64, device="cuda") for s in ((d,), (n, q)))
    order, offsets = torch.arange(n, device="cuda"), torch.tensor([0, 90, n], device="cuda")
    outs = torch.zeros(layers, 2, d + q, d + q, dtype=torch.float64, device="cuda")
    arguments = [shift] * layers, z, order, offsets, [*outs]
    graph = captured(lambda: _ops.grams([*x], *arguments, products=products))
    for seed in (1, 2):
        torch.manual_seed(seed)
        for one in (x, shift, z):
            one.normal_()
        x += 5
        order.copy_(torch.randperm(n))
        outs.zero_()
        graph.replay()
        for rows, out in zip(x, outs, strict=True):
            want = torch.zeros_like(out)
            _reference.gram(rows, shift, z, order, offsets.cpu(), want)
            size = want.diagonal(dim1=1, dim2=2).sqrt()
            off = (out - want).tril().abs() / (size[:, :, None] * size[:, None])
            assert float(off.max()) < bound


@needs_gpu
@pytest.mark.parametrize("stay", [True, False], ids=["on the GPU", "on the host"])
@pytest.mark.parametrize("family", POOLS)
def test_a_probed_forward_in_a_graph(family, stay):
    model, held = getattr(tiny, family)().cuda(), given(family, 0)
    rows, replayed = Rows(stay=stay), []
    with torch.no_grad():
        captured(lambda: model(**held))  # if this fails, the model is to blame
        with gf.capture(model, pool=POOLS[family], rows=rows):
            for _ in range(2):  # room is made for rows, and a stream beside the model's
                model(**held)
            rows.verify()
            graph, before = torch.cuda.CUDAGraph(), rows.n
            with torch.cuda.graph(graph):
                model(**held)
            for seed in (1, 2):
                renew(held, given(family, seed))
                graph.replay()
                torch.cuda.synchronize()
                replayed.append({key: rows[key][before:].clone().cpu() for key in rows})
        assert rows.n == before + 3
        for seed, found in zip((1, 2), replayed, strict=True):
            with gf.capture(model, pool=POOLS[family]) as eager:
                model(**given(family, seed))
            assert [*found] == [*eager]
            for key, expected in eager.items():
                torch.testing.assert_close(found[key], expected, rtol=1e-5, atol=1e-5)


COMPILED = [  # what torch warns of in compiling
    "ignore:.*torch.compiler.disable:UserWarning",
    "ignore:.*TensorFloat32:UserWarning",
    "ignore:.*torch.jit:DeprecationWarning",
]


@needs_gpu
@pytest.mark.filterwarnings(*COMPILED)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model_gives_the_same_rows(mode):
    model = tiny.vit().cuda()
    compiled = torch.compile(model, mode=mode)
    with torch.no_grad():
        with gf.capture(model, pool=POOLS["vit"]) as expected:
            for seed in range(4):
                model(**given("vit", seed))
        with gf.capture(model, pool=POOLS["vit"]) as rows:
            for seed in range(4):  # with reduce-overhead, the first warm up and record
                compiled(**given("vit", seed))
    torch._dynamo.reset()
    assert [*rows] == [*expected]
    for key in rows:
        torch.testing.assert_close(rows[key], expected[key], rtol=1e-4, atol=1e-4)


@needs_gpu
@pytest.mark.filterwarnings(*COMPILED)
def test_pooling_is_one_operator_of_a_compiled_graph():
    x = torch.randn(4, 50, 40, device="cuda")
    roles = torch.randint(64, (4, 50), dtype=torch.uint8, device="cuda") | 1
    pools = parse_pools(["last", "mean"])

    def pooled(x, roles):
        outs = [torch.zeros(4, 40, device="cuda") for _ in pools]
        pool(x * 2, roles, pools, outs)
        return [out + 1 for out in outs]

    found = torch.compile(pooled, fullgraph=True)(x, roles)
    torch._dynamo.reset()
    for got, want in zip(found, pooled(x, roles), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


# ------ without a GPU


class Sending(Pretend):
    """Lists what the host sends to the device: a graph refuses it where it is not pinned."""

    def __init__(self):
        super().__init__()
        self.sent = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if isinstance(out, Far):
            near = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
            # A CPU tensor of no dimension travels as an argument of a kernel.
            self.sent += [str(func) for x in near if not isinstance(x, Far) and x.ndim]
        return out


def on_device(x, roles, jobs):
    _reference.pool(x.near, roles.near, [(op, bit, out.near) for op, bit, out in jobs])


@pytest.mark.parametrize("family", POOLS)
def test_an_emulated_forward_is_sent_nothing_that_the_model_is_not(family, monkeypatch):
    real = _ops.backend
    kernels = SimpleNamespace(pool=on_device)
    monkeypatch.setattr(_ops, "backend", lambda d: kernels if d == DEVICE else real(d))
    with Sending() as gpu, torch.no_grad():
        model, batch = getattr(tiny, family)().to(DEVICE), given(family, 0, DEVICE)
        gpu.sent.clear()
        model(**batch)
        bare = [*gpu.sent]
        with gf.capture(model, pool=POOLS[family], rows=Rows(stay=True)):
            model(**batch)
        assert gpu.sent[len(bare) :] == bare
