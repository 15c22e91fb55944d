"""The kernels that memory limits: pooling, and rows times few vectors.

Every call gets the next of several inputs that together are far larger than the last-level cache,
so the data comes from DRAM, as it does behind a model's block. All ways of a job also run in turn:
"in turn" is a way's fast decile over the first way's, and "of read" compares its bytes a second
with those of a plain read of the same memory.
"""

import itertools

import pytest
import torch
from limits import fast, in_turn, read_all

from geofast import _core, _reference

BYTES = 200e6  # of inputs in rotation
ROUNDS = 40


def note(seconds, name, size):
    """Say what the rounds in turn showed of one way."""
    quick = {way: fast(times) for way, times in seconds.items()}
    return {
        "in turn": f"{quick[name] / next(iter(quick.values())):.2f}",
        "GB/s": f"{size / quick[name] / 1e9:.1f}",
        "of read": f"{quick['read'] / quick[name]:.0%}",
    }


def run(benchmark, job, name):
    group, ways, inputs, seconds = job
    turn = itertools.cycle(inputs)
    benchmark.group = group
    benchmark.extra_info.update(note(seconds, name, inputs[0].nbytes))
    benchmark.pedantic(lambda: ways[name](next(turn)), rounds=ROUNDS, warmup_rounds=3)


# ------ pooling

SHAPES = [(16, 197, 768), (16, 577, 1024)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def torch_pool(x):
    return torch.cat([x.mean(1), x.amax(1), x[:, -1], x[:, 0]], 1)


def pool_ways(shape):
    batch, length, dim = shape
    roles = torch.ones(batch, length, dtype=torch.uint8)
    roles[:, 0] |= 2
    rows = torch.empty(batch, 4 * dim)
    parts = [("mean", 0), ("max", 0), ("last", 0), ("first", 1)]
    jobs = [(op, bit, rows[:, i * dim : (i + 1) * dim]) for i, (op, bit) in enumerate(parts)]

    def geofast(x):
        _core.pool(x, roles, jobs)
        return rows

    def mean_alone(x):
        _core.pool(x, roles, jobs[:1])
        return rows[:, :dim]

    ways = {
        "geofast": geofast,
        "mean alone": mean_alone,
        "torch": torch_pool,
        "torch mean alone": lambda x: x.mean(1),
        "read": read_all,
    }
    want = [(op, bit, torch.empty(batch, dim, dtype=torch.float64)) for op, bit in parts]
    return ways, lambda x: (_reference.pool(x, roles, want), torch.cat([w[2] for w in want], 1))[1]


@pytest.fixture(
    scope="module",
    params=itertools.product(SHAPES, DTYPES),
    ids=lambda p: "x".join(map(str, p[0])) + "-" + str(p[1]).removeprefix("torch."),
)
def pool_job(request):
    shape, dtype = request.param
    ways, reference = pool_ways(shape)
    one = torch.randn(shape).to(dtype)
    inputs = [one.roll(i, 0) for i in range(max(2, int(BYTES / one.nbytes)))]
    want = reference(one)
    torch.testing.assert_close(ways["geofast"](one).double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        ways["mean alone"](one).double(), want[:, : shape[2]], rtol=1e-5, atol=1e-6
    )
    coarse = {"rtol": 0, "atol": 1e-6 if dtype == torch.float32 else 1e-2}
    torch.testing.assert_close(ways["torch"](one).double(), want, **coarse)
    torch.testing.assert_close(
        ways["torch mean alone"](one).double(), want[:, : shape[2]], **coarse
    )
    batch, length, dim = shape
    group = f"mean + max + last + cls, [{batch}, {length}, {dim}] {str(dtype)[6:]}"
    return group, ways, inputs, in_turn(ways, inputs, ROUNDS)


def test_geofast(benchmark, pool_job):
    run(benchmark, pool_job, "geofast")


def test_mean_alone(benchmark, pool_job):
    run(benchmark, pool_job, "mean alone")


def test_torch(benchmark, pool_job):
    run(benchmark, pool_job, "torch")


def test_torch_mean_alone(benchmark, pool_job):
    run(benchmark, pool_job, "torch mean alone")


def test_read(benchmark, pool_job):
    run(benchmark, pool_job, "read")


# ------ rows times few vectors


@pytest.fixture(
    scope="module",
    params=[(5000, 768, 2), (5000, 768, 10), (5000, 4096, 10)],
    ids=lambda p: "x".join(map(str, p)),
)
def tables(request):
    n, d, m = request.param
    one = torch.randn(n, d) + 3
    inputs = [one.roll(i, 0) for i in range(max(2, int(BYTES / one.nbytes)))]
    return inputs, one.double().mean(0), n, d, m


@pytest.fixture(scope="module", params=["project", "project_t"])
def project_job(request, tables):
    name = request.param
    inputs, shift, n, d, m = tables
    shapes = [(m, d), (n, m)] if name == "project" else [(n, m), (m, d)]
    vectors, out = torch.randn(shapes[0]).double(), torch.empty(shapes[1]).double()
    want = torch.empty_like(out)
    kernel, reference = getattr(_core, name), getattr(_reference, name)
    ways = {
        "geofast": lambda x: kernel(x, shift, vectors, out),
        "torch": lambda x: reference(x, shift, vectors, want),
        "read": read_all,
    }
    ways["geofast"](inputs[0])
    ways["torch"](inputs[0])
    torch.testing.assert_close(out, want, rtol=0, atol=1e-11 * float(want.abs().max()))
    group = f"{name}: {m} vectors, rows [{n}, {d}] float32, sums in float64"
    return group, ways, inputs, in_turn(ways, inputs, ROUNDS)


def test_geofast_project(benchmark, project_job):
    run(benchmark, project_job, "geofast")


def test_torch_project(benchmark, project_job):
    run(benchmark, project_job, "torch")


def test_read_rows(benchmark, project_job):
    run(benchmark, project_job, "read")
