from __future__ import annotations

import io
import pickle

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from geofast.data import SampleError, Samples, from_arrays


def picture(seed=0, size=(8, 6)):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


def encoded(array, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def four(tmp_path):
    """One picture in each form that an input may have."""
    array = picture()
    path = tmp_path / "Ærø, 東京.png"
    Image.fromarray(array).save(path)
    inputs = [array, Image.fromarray(array), encoded(array), path]
    return from_arrays(inputs, [1, 2, 3, 4], [5, 6, 7, 8], population=[10, 20, 30, 40])


def test_every_form_of_an_image_loads_alike(four):
    assert four.kind == "image"
    assert len(four) == 4
    for i in range(4):
        image = four.load(i)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), picture())


def test_the_table(four):
    assert four.table.columns.tolist() == ["id", "latitude", "longitude", "population"]
    assert four.table["id"].tolist() == ["0", "1", "2", "3"]
    assert four.table["latitude"].dtype == np.float64


def test_take(four):
    part = four.take([2, 0])
    assert part.table["id"].tolist() == ["2", "0"]
    assert part.table.index.tolist() == [0, 1]
    assert part.inputs[1] is four.inputs[0]
    assert four.take(np.array([], dtype=int)).table.shape == (0, 4)


def test_text():
    samples = from_arrays(["Nuuk", "Suva"], [64.2, -18.1], [-51.7, 178.4])
    assert samples.kind == "text"
    assert samples.load(1) == "Suva"


def test_an_array_of_images():
    stack = np.stack([picture(0), picture(1)])
    samples = from_arrays(stack, [0, 1], [0, 1])
    np.testing.assert_array_equal(np.asarray(samples.load(1)), stack[1])


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_other_modes_become_rgb(mode):
    samples = from_arrays([Image.fromarray(picture()).convert(mode)], [0], [0])
    assert samples.load(0).mode == "RGB"


def test_photographs_are_turned_upright(tmp_path):
    image = Image.fromarray(picture(size=(8, 6)))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: rotate by 270 degrees to show
    image.save(tmp_path / "a.png", exif=exif)
    upright = from_arrays([tmp_path / "a.png"], [0], [0]).load(0)
    np.testing.assert_array_equal(np.asarray(upright), np.rot90(picture(size=(8, 6)), k=-1))


def test_a_missing_file_names_itself(tmp_path):
    path = tmp_path / "gone.jpg"
    with pytest.raises(SampleError, match="does not exist") as caught:
        from_arrays([path], [0], [0]).load(0)
    assert caught.value.where == str(path)
    assert str(caught.value) == f"{path}: the image file does not exist."


def test_a_truncated_jpeg_names_itself(tmp_path):
    path = tmp_path / "cut é.jpg"
    path.write_bytes(encoded(picture(size=(64, 64)), "JPEG")[:900])
    with pytest.raises(SampleError, match=r"cannot be decoded: .*truncated") as caught:
        from_arrays([path], [0], [0]).load(0)
    assert caught.value.where == str(path)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (b"", "arrays, id 0: cannot be decoded: the image is empty, 0 bytes"),
        (b"hello", "arrays, id 0: not an image that Pillow can read"),
        (np.zeros((4, 4, 3)), r"id 0: .*got float64 array \(4, 4, 3\)"),
        (7, "id 0: .*an image is a path, bytes, a PIL image or a uint8 array .* got <class 'int'>"),
    ],
)
def test_things_that_are_no_image(item, message):
    with pytest.raises(SampleError, match=message):
        from_arrays([item], [0], [0]).load(0)


def test_the_error_survives_pickling():
    error = pickle.loads(pickle.dumps(SampleError("a.jpg", "is cut")))
    assert (error.where, error.reason, str(error)) == ("a.jpg", "is cut", "a.jpg: is cut")


def test_a_table_that_is_none():
    with pytest.raises(ValueError, match="starts with id, latitude, longitude"):
        Samples(pd.DataFrame({"id": ["a"]}), "text", ["a"], "here")
    table = pd.DataFrame({"id": ["a"], "latitude": [0.0], "longitude": [0.0]})
    with pytest.raises(ValueError, match="1 rows for 2 inputs"):
        Samples(table, "text", ["a", "b"], "here")
