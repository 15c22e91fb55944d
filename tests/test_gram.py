import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretend import Pretend
from safetensors.torch import save_file
from synthetic import KINDS, rows

import geofast as gf
from geofast import _ops, _reference
from geofast import gram as statistics


def about_the_mean(gram):
    """Counts, means and the covariance-like matrix of every cell, free of the shift."""
    d = gram.dim
    n = gram.count[:, None]
    sums = torch.cat([gram.matrix[:, d, :d], gram.matrix[:, d + 1 :, d]], 1)
    keep = [i for i in range(gram.matrix.shape[1]) if i != d]
    centred = (gram.matrix + gram.matrix.tril(-1).mT)[:, keep][:, :, keep]
    centred = centred - sums[:, :, None] * sums[:, None] / n[..., None]
    return gram.count, sums / n + gram.shift, centred


def assert_same(a, b, tolerance):
    for mine, theirs in zip(about_the_mean(a), about_the_mean(b), strict=True):
        scale = theirs.abs().amax()
        if theirs.ndim == 3:
            spread = theirs.diagonal(dim1=1, dim2=2).clamp_min(1e-300).sqrt()
            scale = spread[:, :, None] * spread[:, None]
        assert ((mine - theirs).abs() / scale).max() < tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_against_a_plain_sum(kind):
    x, y = rows(kind=kind)
    cell = torch.arange(len(x)) % 3
    gram = gf.Gram(x.shape[1], 2, 3).update(x, y, cell)
    for c in range(3):
        both = torch.cat([x.double(), y], 1)[cell == c].numpy()
        count, mean, centred = (t[c].numpy() for t in about_the_mean(gram))
        assert count == (cell == c).sum()
        np.testing.assert_allclose(mean, both.mean(0), rtol=1e-12, atol=1e-12)
        expected = np.cov(both.T) * (count - 1)
        spread = np.sqrt(np.diag(expected))
        np.testing.assert_allclose(
            centred / np.outer(spread, spread), expected / np.outer(spread, spread), atol=1e-10
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("products", "tolerance"), [("float64", 1e-10), ("float32", 3e-6)])
def test_streaming_is_batch(kind, products, tolerance):
    x, y = rows(kind=kind)
    cell = torch.randint(0, 4, (len(x),), generator=torch.Generator().manual_seed(0))
    whole = gf.Gram(x.shape[1], 2, 4).update(x, y, cell)
    streamed = gf.Gram(x.shape[1], 2, 4, products=products)
    for part in torch.arange(len(x)).split(37):
        streamed.update(x[part], y[part], cell[part])
    assert_same(streamed, whole, tolerance)


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(5)), st.integers(0, 2**31), st.sampled_from(KINDS))
def test_merging_is_associative_and_order_free(order, seed, kind):
    x, y = rows(150, 12, kind=kind, seed=seed % 97)
    bounds = np.sort(np.random.default_rng(seed).choice(np.arange(10, 140), 4, replace=False))
    parts = [
        gf.Gram(12, 2).update(a, b)
        for a, b in zip(
            x.tensor_split(bounds.tolist()), y.tensor_split(bounds.tolist()), strict=True
        )
    ]
    left = parts[order[0]]
    for i in order[1:]:
        left = left + parts[i]
    right = parts[order[0]] + (
        parts[order[1]] + (parts[order[2]] + (parts[order[3]] + parts[order[4]]))
    )
    whole = gf.Gram(12, 2).update(x, y)
    assert_same(left, whole, 1e-10)
    assert_same(right, whole, 1e-10)


def test_negative_cells_are_left_out():
    x, y = rows(50, 5)
    cell = torch.arange(50) % 2 - 1
    gram = gf.Gram(5, 2).update(x, y, cell)
    assert_same(gram, gf.Gram(5, 2).update(x[1::2], y[1::2]), 1e-10)


def test_save_and_load(tmp_path):
    x, y = rows(50, 5)
    gram = gf.Gram(5, 2, 2).update(x, y, torch.arange(50) % 2)
    gram.save(tmp_path / "a.safetensors")
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    back = gf.Gram.load(tmp_path / "a.safetensors")
    assert torch.equal(back.matrix, gram.matrix)
    assert torch.equal(back.shift, gram.shift)
    back.update(x, y, torch.zeros(50, dtype=torch.int64))
    assert float(back.count.sum()) == 100
    several = {"lm.layers.1/last": gram, "lm.layers.2/last": back}
    statistics.save(several, tmp_path / "b.safetensors")
    assert statistics.load(tmp_path / "b.safetensors").keys() == several.keys()


def test_statistics_lie_where_the_rows_are():
    """The meta device stands for any other than the CPU: a tensor left behind would be refused."""
    x, y = rows(50, 5)
    gram = gf.Gram(5, 2, 3, device="meta").update(x.to("meta"), y, torch.arange(50) % 3)
    assert gram.matrix.is_meta
    assert gram.shift.is_meta
    with pytest.raises(ValueError, match=r"rows are on cpu and this Gram is on meta.*device='cpu'"):
        gram.update(x, y, torch.arange(50) % 3)
    at_home = gf.Gram(5, 2, 3)
    assert at_home.cpu() is at_home


def test_another_device_computes_the_same(monkeypatch):
    x, y = rows(50, 5)
    cell = torch.arange(50) % 3 - 1  # some in no cell
    here = gf.Gram(5, 2, 2).update(x, y, cell)
    monkeypatch.setattr(_ops, "backend", lambda device: _reference)
    assert_same(here, gf.Gram(5, 2, 2).update(x, y, cell), 1e-12)


def test_bad_input(tmp_path):
    x, y = rows(50, 5)
    gram = gf.Gram(5, 2, 2)
    with pytest.raises(
        ValueError, match=r"expected rows \[n, 5\] and targets \[n, 2\]; got \[50, 4\]"
    ):
        gram.update(x[:, :4], y)
    with pytest.raises(ValueError, match="cell 7 is out of range: this Gram has 2 cells"):
        gram.update(x, y, torch.full((50,), 7))
    with pytest.raises(ValueError, match="is empty"):
        gram.save(tmp_path / "a")
    with pytest.raises(ValueError, match="cannot add Grams"):
        gram + gf.Gram(5, 1, 2)
    with pytest.raises(ValueError, match="products must be one of"):
        gf.Gram(5, 2, products="float16")


@pytest.mark.parametrize(
    ("cell", "came"),
    [
        (torch.tensor([0, 1, 0]), r"torch.int64 \[3\]"),
        (torch.zeros(51, dtype=torch.int64), r"torch.int64 \[51\]"),
        (torch.zeros(50, 1, dtype=torch.int64), r"torch.int64 \[50, 1\]"),
        (torch.zeros(50), r"torch.float32 \[50\]"),
        (torch.zeros(50, dtype=torch.int32), r"torch.int32 \[50\]"),
    ],
)
def test_cells_that_do_not_fit_the_rows(cell, came):
    x, y = rows(50, 5)
    gram = gf.Gram(5, 2, 2)
    with pytest.raises(ValueError, match=r"cell must be int64 \[50\], .* each row; got " + came):
        gram.update(x, y, cell)
    assert gram.shift is None
    assert not gram.matrix.any()


def test_folds_that_do_not_fit_the_cells():
    x, y = rows(50, 5)
    gram = gf.Gram(5, 2, 4).update(x, y, torch.arange(50) % 4)
    found = statistics.totals(gram, torch.tensor([1, 0, -1, 0]))
    assert found.held[:, 5, 5].tolist() == [25, 13]  # cells hold 13, 13, 12, 12 rows
    for folds in (torch.tensor([0, 1]), torch.arange(5), torch.zeros(4)):
        with pytest.raises(ValueError, match=r"folds must be int64 \[4\], .* cell of the Gram"):
            statistics.totals(gram, folds)


def test_files_that_hold_no_statistics(tmp_path):
    x, y = rows(50, 5)
    path = tmp_path / "a.safetensors"
    gf.Gram(5, 2).update(x, y).save(path)
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-8])
    (tmp_path / "text").write_text("latitude,longitude\n")
    save_file({"weight": x}, tmp_path / "weights")
    save_file({"weight": x}, tmp_path / "nameless", {"geofast.gram": "[1]"})
    save_file({"weight": x}, tmp_path / "lacking", {"geofast.gram": '{"": {}}'})
    for name in ("cut", "text", "weights", "nameless", "lacking"):
        with pytest.raises(ValueError, match=f"{name} holds no geofast statistics"):
            gf.Gram.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        gf.Gram.load(tmp_path / "none")
    assert gf.Gram.load(path).dim == 5


def test_arrays_of_numpy_and_a_fold_that_was_forgotten():
    r = np.random.default_rng(0)
    x, y, fold = (
        r.normal(size=(20, 3)).astype(np.float32),
        r.normal(size=(20, 2)),
        np.arange(20) % 4,
    )
    gram = gf.Gram(3, 2, 4).update(x, y, fold)
    same = gf.Gram(3, 2, 4).update(*map(torch.from_numpy, (x, y, fold)))
    assert torch.equal(gram.matrix, same.matrix)
    with pytest.raises(ValueError, match="this Gram has 4 cells: say the cell of every row, cell="):
        gram.update(x, y)


def test_a_file_of_several_sites_names_them(tmp_path):
    x, y = rows(50, 5)
    grams = {f"lm.layers.{i}/last": gf.Gram(5, 2).update(x, y) for i in range(7)}
    path = tmp_path / "gram.safetensors"
    statistics.save(grams, path)
    said = r"holds the statistics of 7 sites \(lm\.layers\.0/last, .*lm\.layers\.4/last, \.\.\.\)"
    with pytest.raises(ValueError, match=rf"{said}: open its run with gf\.open\(folder\)\.grams"):
        gf.Gram.load(path)
    (name, last) = [*grams.items()][-1]
    assert torch.equal(statistics.load(path)[name].matrix, last.matrix)


@pytest.mark.parametrize("where", ["xyc", "xy", "xc", "x", "yc", "y", "c", ""])
def test_targets_and_cells_may_be_on_another_device_than_the_rows(where):
    r = np.random.default_rng(0)
    x, y = (torch.from_numpy(r.normal(size=(20, d))) for d in (3, 2))
    cell = torch.arange(20) % 4
    with Pretend() as gpu:
        on = {name: gpu.device if name in where else torch.device("cpu") for name in "xyc"}
        gram = gf.Gram(3, 2, 4, device=on["x"])
        gram.update(x.to(on["x"]), y.to(on["y"]), cell.to(on["c"]))
        matrix = gram.matrix.cpu()
    torch.testing.assert_close(matrix, gf.Gram(3, 2, 4).update(x, y, cell).matrix)
