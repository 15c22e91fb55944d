import errno
import os
import resource
from functools import partial

import pytest
import torch
from pretend import DEVICE, Pretend

from geofast.rows import Rows, on_disk


def fill(rows, parts, dim=3):
    for part in parts:
        rows.reserve("a/last", dim, len(part)).copy_(part)
        rows.commit(dict.fromkeys(rows, len(part)), len(part))
    return rows


@pytest.mark.parametrize("capacity", [1, 4, 100])
def test_rows_grow(capacity):
    x = torch.randn(40, 3)
    assert torch.equal(fill(Rows(capacity), x.split(7))["a/last"], x)


def test_rows_stay_where_they_are_pooled():
    elsewhere = torch.device("meta")
    assert Rows(stay=True).reserve("a/last", 3, 2, elsewhere).device == elsewhere
    assert Rows(stay=True).reserve("a/last", 3, 2).is_cpu
    assert Rows().reserve("a/last", 3, 2, elsewhere).is_cpu


def test_rows_on_disk(tmp_path):
    x, y = torch.randn(40, 3), torch.randn(40, 5)
    rows = Rows(40, on_disk(tmp_path, 40 * 8))
    for part, other in zip(x.split(7), y.split(7), strict=True):
        rows.reserve("a/last", 3, len(part)).copy_(part)
        rows.reserve("a_last", 5, len(other)).copy_(other)
        rows.commit(dict.fromkeys(rows, len(part)), len(part))
    assert torch.equal(rows["a/last"], x)
    assert torch.equal(rows["a_last"], y)
    with pytest.raises(ValueError, match="rows on disk cannot grow: 41 rows came where 40 fit"):
        rows.reserve("a/last", 3, 1)
    assert list(tmp_path.iterdir()) == []  # without a name it cannot outlive the process


def test_a_full_disk_is_told_before_the_first_row(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"keep 4,000 bytes .* No space left on device") as told:
        on_disk(tmp_path, 1000)
    assert str(tmp_path) in str(told.value)
    assert list(tmp_path.iterdir()) == []


def test_a_limit_on_files_is_told(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"cannot keep 4,000 bytes .* File too large"):
            on_disk(tmp_path, 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
    assert on_disk(tmp_path, 1000).shape == (1000,)


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(OSError, match=r"rows in .*none: No such file"):
        on_disk(tmp_path / "none", 10)


def test_reserved_rows_count_only_when_committed():
    rows = fill(Rows(), [torch.zeros(2, 3)])
    rows.reserve("a/last", 3, 5)
    assert rows["a/last"].shape == (2, 3)
    rows.clear()
    assert rows["a/last"].shape == (0, 3)


def test_rows_of_a_batch_that_failed_are_forgotten():
    x, y = torch.randn(2, 3), torch.randn(4, 3)
    rows = fill(Rows(), [x])
    mark = rows.mark()
    rows.reserve("a/last", 3, 4)
    rows.reserve("b/last", 5, 4)
    rows.commit({"a/last": 4, "b/last": 4}, 4)
    rows.rewind(mark)
    assert (rows["a/last"].shape, rows["b/last"].shape) == ((2, 3), (0, 5))
    rows.reserve("a/last", 3, 4).copy_(y)
    rows.commit({"a/last": 4}, 4)
    assert torch.equal(rows["a/last"], torch.cat([x, y]))


def test_reorder():
    x = torch.randn(5, 3)
    rows = fill(Rows(), [x])
    order = torch.tensor([4, 2, 0, 1, 3])
    rows.reorder(order)
    assert torch.equal(rows["a/last"], x[order])


def test_width_must_stay():
    with pytest.raises(ValueError, match="have width 3; a batch came with width 4"):
        fill(Rows(), [torch.zeros(1, 3)]).reserve("a/last", 4, 1)


def test_a_key_that_is_not_there_names_some_that_are():
    with pytest.raises(KeyError, match="a; there is a/last"):
        fill(Rows(), [torch.zeros(1, 3)])["a"]


def test_a_device_without_room_leaves_the_rows_to_the_cpu(monkeypatch):
    make = torch.empty

    def full(*shape, **options):
        if options.get("device") == torch.device("meta"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(*shape, **options)

    monkeypatch.setattr(torch, "empty", full)
    rows = Rows(stay=True)
    assert rows.reserve("a/last", 3, 2, torch.device("meta")).device.type == "cpu"
    assert rows.crowded == "meta"


@pytest.mark.parametrize("crowded", ["", "cuda:0"])
def test_where_no_memory_can_be_pinned_rows_are_kept_in_other_memory(monkeypatch, crowded):
    tried, make = [], torch.empty

    def full(*shape, **options):
        if options.get("pin_memory") or options.get("device") == gpu:
            tried.append(options)
            raise (torch.OutOfMemoryError if "device" in options else RuntimeError)("CUDA error")
        return make(*shape, **options)

    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch, "empty", full)
    rows = Rows(2, stay=bool(crowded))
    x = torch.randn(5, 3)
    for key in ("a/last", "b/last"):
        for part in x.split(2):
            rows.reserve(key, 3, len(part), gpu).copy_(part)
            rows.commit({key: len(part)}, len(part))
        assert torch.equal(rows[key], x)
    assert rows.crowded == ("cuda:0 and pinned memory" if crowded else "pinned memory")
    assert len(tried) == 1 + bool(crowded)  # and not at every site


def test_the_first_site_that_is_unsound_is_named_on_whichever_device():
    def blame(key, place, first):
        return ValueError(key)

    devices = (DEVICE, torch.device("cpu"))
    with Pretend():
        for order in (devices, devices[::-1]):
            rows = Rows()
            for device in order:
                signs = torch.full((2,), torch.nan, device=device)
                rows.watch(str(device), signs, partial(blame, str(device)))
            with pytest.raises(ValueError, match=str(order[0])):
                rows.verify()


def test_rows_on_their_way_to_the_host_are_waited_for_before_they_move(monkeypatch):
    rows, asked = Rows(2), []
    monkeypatch.setattr(rows.aside, "join", lambda: asked.append("join"))
    monkeypatch.setattr(rows.aside, "wait", lambda: asked.append("wait"))
    rows.reserve("a", 8, 2)
    rows.commit({"a": 2}, 2)
    asked.clear()
    rows.reserve("a", 8, 1)
    assert asked == ["join", "wait"]


def test_inside_a_cuda_graph_no_room_is_made(monkeypatch):
    rows, made = Rows(4), partial(pytest.raises, RuntimeError, match="inside a CUDA graph none can")
    rows.reserve("a", 8, 3)
    rows.commit({"a": 3}, 3)
    monkeypatch.setattr("geofast.rows.capturing", lambda _: True)
    with made():
        rows.reserve("b", 8, 1)
    with made():
        rows.reserve("a", 8, 2)
    assert rows.reserve("a", 8, 1).shape == (1, 8)
