import pytest
import torch

from geofast.rows import Rows


def fill(rows, parts, dim=3):
    for part in parts:
        rows.reserve("a/last", dim, len(part)).copy_(part)
        rows.commit(len(part))
    return rows


@pytest.mark.parametrize("capacity", [1, 4, 100])
def test_rows_grow(capacity):
    x = torch.randn(40, 3)
    assert torch.equal(fill(Rows(capacity), x.split(7))["a/last"], x)


def test_rows_on_disk(tmp_path):
    x = torch.randn(40, 3)
    rows = fill(Rows(40, tmp_path), x.split(7))
    assert torch.equal(rows["a/last"], x)
    assert (tmp_path / "a_last.rows").stat().st_size == 40 * 3 * 4
    with pytest.raises(ValueError, match="rows on disk cannot grow: 41 rows came where 40 fit"):
        rows.reserve("a/last", 3, 1)


def test_reserved_rows_count_only_when_committed():
    rows = fill(Rows(), [torch.zeros(2, 3)])
    rows.reserve("a/last", 3, 5)
    assert rows["a/last"].shape == (2, 3)
    rows.clear()
    assert rows["a/last"].shape == (0, 3)


def test_reorder():
    x = torch.randn(5, 3)
    rows = fill(Rows(), [x])
    order = torch.tensor([4, 2, 0, 1, 3])
    rows.reorder(order)
    assert torch.equal(rows["a/last"], x[order])


def test_width_must_stay():
    with pytest.raises(ValueError, match="have width 3; a batch came with width 4"):
        fill(Rows(), [torch.zeros(1, 3)]).reserve("a/last", 4, 1)
