from __future__ import annotations

import io
import multiprocessing
import os
import re

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from geofast.data import SampleError, from_arrays, read
from geofast.data.stream import batches


def picture(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def encoded(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(n):
    return from_arrays([picture(i) for i in range(n)], np.zeros(n), np.zeros(n))


def to_tensor(image):
    return torch.from_numpy(np.array(image)).float()


def corner(image):
    return int(np.asarray(image)[0, 0, 0])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("transform", [None, to_tensor, corner])
def test_batches_in_order(workers, transform):
    samples = pictures(11)
    order = [7, 3, 3, 10, 0, 1, 2, 9, 8]
    out = list(batches(samples, order, 4, transform=transform, workers=workers))
    assert [batch.index.tolist() for batch in out] == [[7, 3, 3, 10], [0, 1, 2, 9], [8]]
    for batch in out:
        assert batch.skipped == ()
        for i, item in zip(batch.index, batch.inputs, strict=True):
            expected = picture(i) if transform is not corner else corner(picture(i))
            np.testing.assert_array_equal(np.asarray(item), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_text(workers):
    samples = from_arrays(list("abc"), [0, 0, 0], [0, 0, 0])
    out = list(batches(samples, range(3), 2, transform=str.upper, workers=workers))
    assert [batch.inputs for batch in out] == [["A", "B"], ["C"]]


def test_tensors_of_mixed_sizes_pass(tmp_path):
    arrays = [np.zeros((2, 3 + i % 2, 3), np.uint8) for i in range(4)]
    samples = from_arrays(arrays, np.zeros(4), np.zeros(4))
    (batch,) = batches(samples, range(4), 4, transform=to_tensor, workers=1)
    assert [tuple(x.shape) for x in batch.inputs] == [(2, 3, 3), (2, 4, 3)] * 2


def broken(tmp_path):
    """Four files, of which the second is cut and the third refused by `refuse_black`."""
    paths = [tmp_path / f"é{i}.png" for i in range(4)]
    for i, path in enumerate(paths):
        Image.fromarray(picture(i) * (i != 2)).save(path)
    paths[1].write_bytes(paths[1].read_bytes()[:100])
    return from_arrays(paths, np.zeros(4), np.zeros(4)), paths


def refuse_black(image):
    if image.getextrema() == ((0, 0),) * 3:
        raise KeyError("all black")
    return corner(image)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_dropped_and_reported(tmp_path, workers):
    samples, paths = broken(tmp_path)
    one, two = batches(samples, range(4), 2, transform=refuse_black, workers=workers)
    assert (one.index.tolist(), two.index.tolist()) == ([0], [3])
    assert one.inputs == [corner(picture(0))]
    assert (one.skipped[0].where, two.skipped[0].where) == (str(paths[1]), str(paths[2]))
    assert "cannot be decoded" in one.skipped[0].reason
    assert two.skipped[0].reason == "cannot be prepared: KeyError: 'all black'"


@pytest.mark.parametrize("workers", [0, 2])
def test_strict_stops_with_the_file_named(tmp_path, workers):
    samples, paths = broken(tmp_path)
    with pytest.raises(SampleError, match=f"^{re.escape(str(paths[1]))}: cannot be decoded"):
        list(batches(samples, range(4), 2, workers=workers, strict=True))
    with pytest.raises(SampleError, match=f"^{re.escape(str(paths[2]))}: cannot be prepared"):
        list(batches(samples, [0, 2], 1, transform=refuse_black, workers=workers, strict=True))
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_loads(tmp_path, workers):
    samples, paths = broken(tmp_path)
    stream = batches(samples, [1, 1], 1, workers=workers)
    assert [next(stream).inputs, next(stream).inputs] == [[], []]
    with pytest.raises(ValueError, match=f"not one of the samples .* loaded: {paths[1]}"):
        next(stream)


@pytest.mark.parametrize("workers", [0, 2])
def test_hdf5(tmp_path, workers):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        images = file.create_dataset("images", (20,), dtype=h5py.vlen_dtype(np.uint8))
        for i in range(20):
            images[i] = np.frombuffer(encoded(picture(i)), dtype=np.uint8)
        file["latitudes"] = np.zeros(20)
        file["longitudes"] = np.zeros(20)
    samples = read(tmp_path / "a.h5")
    samples.load(0)  # opens the file here; a worker must not go on with this handle
    for batch in batches(samples, range(20), 3, workers=workers):
        for i, image in zip(batch.index, batch.inputs, strict=True):
            np.testing.assert_array_equal(np.asarray(image), picture(i))


def process_and_threads(_):
    return os.getpid(), torch.get_num_threads()


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_workers_are_other_processes_with_one_thread():
    seen = [
        b.inputs[0]
        for b in batches(pictures(6), range(6), 1, transform=process_and_threads, workers=2)
    ]
    assert len({pid for pid, _ in seen} - {os.getpid()}) == 2
    assert {threads for _, threads in seen} == {1}
    (here,) = batches(pictures(1), [0], 1, transform=process_and_threads)
    assert here.inputs[0] == (os.getpid(), 2)


def test_an_early_end_leaves_no_process():
    stream = batches(pictures(50), range(50), 2, workers=2)
    next(stream)
    assert len(multiprocessing.active_children()) == 2
    stream.close()
    assert multiprocessing.active_children() == []


def test_the_callers_random_numbers_are_untouched():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(batches(pictures(4), range(4), 2, workers=1))
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


def parts(image):
    """What a processor makes for a model that talks about images, with tensors of mixed sizes."""
    pixels = to_tensor(image)[: 2 + corner(image) % 3]
    ids = [torch.arange(3), torch.ones(1, 2, dtype=torch.int64)]
    return {"image": {"pixels": pixels, "mask": pixels > 9}, "ids": ids, "size": image.size}


@pytest.mark.parametrize("workers", [0, 1])
def test_what_holds_several_tensors_arrives_as_it_was(workers):
    (batch,) = batches(pictures(5), range(5), 5, transform=parts, workers=workers)
    for i, item in enumerate(batch.inputs):
        expected = parts(Image.fromarray(picture(i)))
        assert item.keys() == expected.keys()
        assert item["size"] == (8, 6)
        for mine, theirs in zip(
            [*item["image"].values(), *item["ids"]],
            [*expected["image"].values(), *expected["ids"]],
            strict=True,
        ):
            assert mine.dtype == theirs.dtype
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("transform", [to_tensor, parts])
def test_many_tensors_need_few_descriptors(transform):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
        for batch in batches(pictures(600), range(600), 100, transform=transform, workers=1):
            held += batch.inputs
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(held) == 600


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_of_different_sizes(workers):
    samples = from_arrays(list("abcdef"), [0] * 6, [0] * 6)
    out = list(batches(samples, [5, 4, 3, 2, 1, 0], [1, 3, 2], workers=workers))
    assert [batch.inputs for batch in out] == [["f"], ["e", "d", "c"], ["b", "a"]]


def test_no_samples_no_batches():
    assert list(batches(pictures(1), [], 4)) == []


@pytest.mark.parametrize(("batch_size", "workers"), [(0, 0), (4, -1), ([1, 0], 0)])
def test_bad_arguments(batch_size, workers):
    with pytest.raises(ValueError, match="batch_size must be at least 1 and workers at least 0"):
        batches(pictures(1), [0], batch_size, workers=workers)
