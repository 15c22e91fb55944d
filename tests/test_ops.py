import pytest
import tiny
import torch

import geofast as gf
from geofast import _ops, _reference
from geofast.pooling import parse_pools, pool


def compiled_pool(hidden, roles, pools, starts=None):
    samples = hidden.shape[0] if starts is None else len(starts) - 1
    out = [torch.zeros(samples, p.width(hidden.shape[-1])) for p in pools]
    pool(hidden * 2, roles, pools, out, starts)
    return [rows + 1 for rows in out]


@pytest.mark.parametrize("starts", [None, [0, 3, 9, 20]])
def test_pooling_is_one_operator_of_a_compiled_graph(starts):
    hidden = torch.randn(4, 5, 8)
    roles = torch.randint(64, (4, 5), dtype=torch.uint8) | 1
    roles = roles.view(1, -1) if starts else roles
    pools = parse_pools(["last", "mean+max"])
    compiled = torch.compile(compiled_pool, backend="aot_eager", fullgraph=True)
    found = compiled(hidden, roles, pools, starts)
    expected = compiled_pool(hidden, roles, pools, starts)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def compiled_gram(x, shift, z, order, offsets):
    outs = [torch.zeros(2, x.shape[1] + 1, x.shape[1] + 1, dtype=torch.float64) for _ in "ab"]
    _ops.grams([x, x + 1], [shift, shift], z, order, offsets, outs, products="float64")
    return outs[0] + outs[1]


def test_statistics_are_one_operator_of_a_compiled_graph():
    x, shift = torch.randn(9, 4), torch.randn(4, dtype=torch.float64)
    z, order = torch.randn(9, 1, dtype=torch.float64), torch.randperm(9)
    compiled = torch.compile(compiled_gram, backend="aot_eager", fullgraph=True)
    found = compiled(x, shift, z, order, torch.tensor([0, 4, 9]))
    expected = torch.zeros(2, 5, 5, dtype=torch.float64)
    for rows in (x, x + 1):
        _reference.gram(rows, shift, z, order, torch.tensor([0, 4, 9]), expected)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_operators_say_truly_what_they_write():
    x, roles = torch.randn(2, 3, 4), torch.full((2, 3), 1, dtype=torch.uint8)
    outs = [torch.zeros(2, 4), torch.zeros(2, 8)[:, 4:]]
    torch.library.opcheck(_ops._compiled_pool, (x, roles, "mean last", [0, 0], outs, None))
    shift, z = torch.zeros(4, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    gram = [torch.zeros(1, 5, 5, dtype=torch.float64)]
    args = ([x[:, 0]], [shift], z, torch.arange(2), torch.tensor([0, 2]), gram, "float64")
    torch.library.opcheck(_ops._compiled_grams, args)


@pytest.mark.filterwarnings("ignore:.*torch.compiler.disable:UserWarning")
def test_a_model_that_is_compiled_while_captured_gives_the_same_rows():
    model, pixels = tiny.vit(), torch.randn(3, 3, 32, 32)
    with torch.inference_mode(), gf.capture(model, pool=["cls", "mean:patch"]) as expected:
        model(pixel_values=pixels)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.inference_mode(), gf.capture(model, pool=["cls", "mean:patch"]) as rows:
        compiled(pixel_values=pixels)
    assert [*rows] == [*expected]
    for key in rows:
        torch.testing.assert_close(rows[key], expected[key], rtol=1e-5, atol=1e-5)
