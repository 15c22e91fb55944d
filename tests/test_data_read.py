from __future__ import annotations

import io
import pickle
import re

import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from geofast.data import SampleError, from_arrays, read


def picture(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def encoded(array, form="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, form)
    return buffer.getvalue()


def text_file(tmp_path, text, name="places.csv"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


# ---------------------------------------------------------------------------- tables


def test_a_csv_of_cities(tmp_path):
    text = "id,city,latitude,longitude,country\n007,Windhoek,-22.5,17.1,NA\n008,Nan,18.8,100.8,TH\n"
    samples = read(text_file(tmp_path, text))
    assert samples.kind == "text"
    assert samples.table.columns.tolist() == ["id", "latitude", "longitude", "city", "country"]
    assert samples.table["id"].tolist() == ["007", "008"]
    assert samples.table["country"].tolist() == ["NA", "TH"]  # Namibia is a country
    assert [samples.load(i) for i in range(2)] == ["Windhoek", "Nan"]
    assert samples.skipped == ()


def test_a_tsv_with_images_beside_it(tmp_path):
    folder = tmp_path / "Zürich" / "bilder"
    folder.mkdir(parents=True)
    Image.fromarray(picture()).save(folder / "ä 1.png")
    text = f"Path\tLat\tLNG\nbilder/ä 1.png\t47.4\t8.5\n{folder / 'ä 1.png'}\t1\t2\n"
    samples = read(text_file(tmp_path / "Zürich", text, "a.tsv"))
    assert samples.kind == "image"
    assert samples.table["id"].tolist() == ["1", "2"]
    assert samples.table["longitude"].tolist() == [8.5, 2]
    for i in range(2):
        np.testing.assert_array_equal(np.asarray(samples.load(i)), picture())


def test_a_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    table = pd.DataFrame({"name": ["x", None, "z"], "lat": [1.0, 2, 3], "long": [4.0, 5, np.nan]})
    table.to_parquet(path)
    samples = read(path)
    assert samples.table["id"].tolist() == ["1"]
    assert [str(skip) for skip in samples.skipped] == [
        f"{path} row 2: no text in column 'name'",
        f"{path} row 3: no longitude",
    ]


def test_columns_by_name(tmp_path):
    text = "key,latitude,longitude,y,x,a,b\nk1,0,0,10,20,photo,words\n"
    path = text_file(tmp_path, text)
    samples = read(path, text="b", latitude="y", longitude="x", id="key")
    assert samples.load(0) == "words"
    assert samples.table.columns.tolist() == ["id", "latitude", "longitude", "a", "b"]
    assert samples.table.iloc[0].tolist() == ["k1", 10.0, 20.0, "photo", "words"]


def test_images_come_before_text(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    path = text_file(tmp_path, "caption,image,lat,lon\nhello,a.png,1,2\n")
    assert read(path).kind == "image"
    assert read(path, text="caption").load(0) == "hello"


def test_numbers_as_text_keep_their_zeros(tmp_path):
    samples = read(text_file(tmp_path, "name,lat,lon\n0012,1,2\n"))
    assert samples.load(0) == "0012"


def test_a_byte_order_mark(tmp_path):
    samples = read(text_file(tmp_path, "\ufeffname,lat,lon\nx,1,2\n"))
    assert len(samples) == 1


ROWS = [
    ("x,,10", "no latitude"),
    ("x,10,", "no longitude"),
    ("x,91,10", "latitude 91 is outside -90 to 90 degrees"),
    ("x,-90.5,10", "latitude -90.5 is outside -90 to 90 degrees"),
    ("x,10,181", "longitude 181 is outside -180 to 180 degrees"),
    ("x,inf,10", "latitude inf is outside -90 to 90 degrees"),
    ("x,nan,10", "latitude 'nan' is not a number"),
    ("x,north,10", "latitude 'north' is not a number"),
    ('x,"48,85",10', "latitude '48,85' is not a number"),
    ("x,10", "no longitude"),
    (",10,10", "no text in column 'city'"),
]


@pytest.mark.parametrize(("row", "reason"), ROWS)
def test_a_bad_row_is_skipped_and_counted(tmp_path, row, reason):
    path = text_file(tmp_path, f"city,lat,lon\na,90,-180\n{row}\nb,-90,180\n")
    samples = read(path)
    assert [samples.load(i) for i in range(len(samples))] == ["a", "b"]
    assert samples.table["id"].tolist() == ["1", "3"]
    assert [str(skip) for skip in samples.skipped] == [f"{path} row 2: {reason}"]


@pytest.mark.parametrize(("row", "reason"), ROWS)
def test_a_bad_row_stops_a_strict_reading(tmp_path, row, reason):
    path = text_file(tmp_path, f"city,lat,lon\na,90,-180\n{row}\nb,-90,180\n")
    with pytest.raises(ValueError, match=re.escape(f"{path} row 2: {reason}")):
        read(path, strict=True)


def test_a_missing_image_is_skipped_and_counted(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    path = text_file(tmp_path, "image,lat,lon\na.png,1,2\nb.png,1,2\n,3,4\n")
    samples = read(path)
    assert [str(skip) for skip in samples.skipped] == [
        f"{path} row 2: the image file does not exist: {tmp_path / 'b.png'}",
        f"{path} row 3: no image in column 'image'",
    ]
    with pytest.raises(ValueError, match="row 2: the image file does not exist"):
        read(path, strict=True)


def test_an_id_that_is_empty(tmp_path):
    path = text_file(tmp_path, "id,city,lat,lon\n,x,1,2\nb,y,1,2\n")
    assert [str(skip) for skip in read(path).skipped] == [f"{path} row 1: no id"]


def test_duplicate_ids(tmp_path):
    path = text_file(tmp_path, "id,city,lat,lon\na,x,1,2\nb,y,1,2\na,z,1,2\n")
    with pytest.raises(ValueError, match=r"places.csv repeats 1 ids, such as a; make them unique"):
        read(path)
    assert len(read(path, id="city")) == 3


def test_swapped_columns(tmp_path):
    rows = [f"p,{lon},{lat}" for lat, lon in [(35.7, 139.7), (31.2, 121.5), (48.9, 2.4)]]
    path = text_file(tmp_path, "\n".join(["name,lat,lon", *rows]))
    message = (
        f"latitude and longitude look swapped in {path}: column 'lat' was read as latitude and "
        "'lon' as longitude; correct the file, or for a table pass latitude='lon', longitude='lat' "
        "(--latitude lon --longitude lat)."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        read(path)


def test_swapped_as_the_message_says(tmp_path):
    path = text_file(tmp_path, "name,a,b\np,139.7,35.7\nq,121.5,31.2\n")
    with pytest.raises(ValueError, match="look swapped"):
        read(path, latitude="a", longitude="b")
    assert read(path, latitude="b", longitude="a").table["longitude"].tolist() == [139.7, 121.5]


def test_swapped_names(tmp_path):
    path = text_file(tmp_path, "name,lat,lon\np,1,2\n")
    with pytest.raises(ValueError, match=r"look swapped in .*places.csv"):
        read(path, latitude="lon", longitude="lat")


def test_a_few_wrong_latitudes_are_not_a_swap(tmp_path):
    rows = [f"p,{i},{i}" for i in range(40)] + ["q,91,3", "q,95,3"]
    samples = read(text_file(tmp_path, "\n".join(["name,lat,lon", *rows])))
    assert (len(samples), len(samples.skipped)) == (40, 2)


# ---------------------------------------------------------------------------- whole sources


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*nowhere.csv"):
        read(tmp_path / "nowhere.csv")


def test_an_unknown_ending(tmp_path):
    with pytest.raises(ValueError, match=r"a.docx .* geofast reads .csv, .tsv, .parquet"):
        read(text_file(tmp_path, "", "a.docx"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "places.csv is empty; it needs a header"),
        ("name,lat,lon\n", "places.csv holds no samples"),
        ("name,lat,lon\na,1,2,3\nb,1,2,3\n", "cannot read .*places.csv as a CSV table"),
        ("name,lat,lon\na,1,2\nb,1,2,3\n", "cannot read .*places.csv as a CSV table"),
        ('name,lat,lon\n"a,1,2\n', "cannot read .*places.csv as a CSV table"),
    ],
)
def test_tables_that_are_none(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read(text_file(tmp_path, text))


def test_another_encoding(tmp_path):
    path = tmp_path / "latin.csv"
    path.write_bytes("name,lat,lon\nÅrhus,56,10\n".encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"cannot read .*latin.csv as a CSV table: .*utf-8.*; save it as UTF-8$"
    ):
        read(path)


def test_a_parquet_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*a.parquet as a Parquet table"):
        read(text_file(tmp_path, "hello", "a.parquet"))


@pytest.mark.parametrize(
    ("header", "options", "message"),
    [
        ("name,y,lon", {}, "no column 'latitude'; its columns are: name, y, lon. Name the right"),
        ("name,lat,x", {}, "no column 'longitude'; .* lat, x. Name the right one with longitude="),
        ("name,lat,lon", {"latitude": "y"}, "no column 'y'"),
        ("name,lat,lon", {"image": "photo"}, "no column 'photo'.* with image="),
        ("name,lat,lon", {"text": "words"}, "no column 'words'.* with text="),
        ("name,lat,lon", {"id": "key"}, "no column 'key'.* with id="),
        ("what,lat,lon", {}, r"no column of images \(image, path,.*its columns are: what, lat"),
        ("name,lat,lon", {"image": "name", "text": "name"}, "give image= or text=, not both"),
    ],
)
def test_missing_columns(tmp_path, header, options, message):
    with pytest.raises(ValueError, match=message):
        read(text_file(tmp_path, f"{header}\na,1,2\n"), **options)


def test_semicolons(tmp_path):
    with pytest.raises(ValueError, match="seem to be separated by semicolons: write commas"):
        read(text_file(tmp_path, "name;latitude;longitude\na;1;2\n"))


def test_everything_skipped(tmp_path):
    path = text_file(tmp_path, "name,lat,lon\na,,2\nb,1,\nc,x,1\nd,,\n")
    message = (
        f"none of the 4 samples of {path} can be used: {path} row 1: no latitude; {path} row 2"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        read(path)


# ---------------------------------------------------------------------------- photographs


def photo(path, latitude=None, longitude=None, **change):
    exif = Image.Exif()
    if latitude is not None:
        gps = {1: latitude[0], 2: latitude[1:], 3: longitude[0], 4: longitude[1:]}
        exif._ifds[0x8825] = {**gps, **change.get("gps", {})}
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture()).save(path, exif=exif)


def test_a_folder_of_photographs(tmp_path):
    photo(tmp_path / "süd" / "b.JPG", ("S", 33, 51, 36.0), ("E", 151, 12, 0.0))
    photo(tmp_path / "a.jpg", ("N", 40, 30, 0.0), ("W", 3, 45, 18.0))
    photo(tmp_path / "c.png")
    (tmp_path / "d.jpg").write_bytes(b"no picture")
    (tmp_path / "notes.txt").write_text("x")
    photo(tmp_path / "e.jpg", ("?", 1, 2, 3.0), ("E", 1, 2, 3.0))
    samples = read(tmp_path)
    assert samples.kind == "image"
    assert samples.table["id"].tolist() == ["a.jpg", "süd/b.JPG"]
    np.testing.assert_allclose(samples.table["latitude"], [40.5, -33.86])
    np.testing.assert_allclose(samples.table["longitude"], [-3.755, 151.2])
    assert samples.load(1).size == (8, 6)
    assert [str(skip) for skip in samples.skipped] == [
        f"{tmp_path / 'c.png'}: no GPS position in its EXIF",
        f"{tmp_path / 'd.jpg'}: not an image that Pillow can read",
        f"{tmp_path / 'e.jpg'}: its EXIF GPS position does not say N or S",
    ]
    with pytest.raises(ValueError, match=r"c.png: no GPS position in its EXIF; correct or remove"):
        read(tmp_path, strict=True)


def test_a_folder_without_photographs(tmp_path):
    with pytest.raises(ValueError, match=r"holds no images; geofast looks for .jpg, .jpeg"):
        read(tmp_path)
    photo(tmp_path / "c.png")
    with pytest.raises(ValueError, match=r"none of the 1 samples of .* no GPS position"):
        read(tmp_path)


# ---------------------------------------------------------------------------- HDF5


def study_file(path, n=6, **more):
    with h5py.File(path, "w") as file:
        images = file.create_dataset("images", (n,), dtype=h5py.vlen_dtype(np.uint8))
        for i in range(n):
            images[i] = np.frombuffer(encoded(picture(i)), dtype=np.uint8)
        file["latitudes"] = np.arange(n, dtype=np.float32) * 10
        file["longitudes"] = np.arange(n, dtype=np.float32) * -10
        for name, values in more.items():
            file[name] = values
    return path


def test_the_studys_file(tmp_path):
    path = tmp_path / "geocells ü.hdf5"
    names = np.array(["Perú", "Chile"] * 3, dtype=object)
    study_file(path, clusters=np.array([b"0", b"39"] * 3), countries=names)
    samples = read(path)
    assert samples.table.columns.tolist()[3:] == ["clusters", "countries"]
    assert samples.table["clusters"].tolist() == ["0", "39"] * 3
    assert samples.table["countries"].tolist() == ["Perú", "Chile"] * 3
    assert samples.table["id"].tolist() == list("012345")
    assert samples.table["latitude"].dtype == np.float64
    for i in (5, 0):
        np.testing.assert_array_equal(np.asarray(samples.load(i)), picture(i))
    again = pickle.loads(pickle.dumps(samples.take([4, 2])))  # as a spawned worker gets it
    np.testing.assert_array_equal(np.asarray(again.load(0)), picture(4))


def test_without_clusters(tmp_path):
    samples = read(study_file(tmp_path / "a.h5"))
    assert samples.table.columns.tolist() == ["id", "latitude", "longitude"]


def test_bad_places_in_hdf5(tmp_path):
    path = study_file(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        file["latitudes"][1] = 91
        file["longitudes"][3] = np.nan
    samples = read(path)
    assert samples.table["id"].tolist() == ["0", "2", "4", "5"]
    np.testing.assert_array_equal(np.asarray(samples.load(2)), picture(4))
    assert [str(skip) for skip in samples.skipped] == [
        f"{path} index 1: latitude 91 is outside -90 to 90 degrees",
        f"{path} index 3: no longitude",
    ]


@pytest.mark.parametrize("kind", ["vlen uint8", "uint8", "vlen int16", "opaque", "S"])
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_hdf5_images_of_every_type(tmp_path, kind, form):
    path = study_file(tmp_path / "a.h5")
    images = [encoded(picture(i), form) for i in range(6)]
    size = max(map(len, images))
    types = {
        "vlen uint8": h5py.vlen_dtype(np.uint8),
        "uint8": np.dtype((np.uint8, (size,))),
        "vlen int16": h5py.vlen_dtype(np.int16),
        "opaque": f"V{size}",
        "S": f"S{size + 1}",
    }
    with h5py.File(path, "r+") as file:
        del file["images"]
        dataset = file.create_dataset("images", (6,), types[kind])
        for i, image in enumerate(images):
            if kind in ("opaque", "S"):
                dataset[i] = np.array(image, types[kind])
            elif kind == "uint8":
                dataset[i] = np.frombuffer(image.ljust(size, b"\0"), np.uint8)
            else:
                dataset[i] = np.frombuffer(image, np.uint8)
    samples = read(path)
    for i in range(6):
        expected = np.asarray(Image.open(io.BytesIO(images[i])))
        np.testing.assert_array_equal(np.asarray(samples.load(i)), expected)


def test_a_truncated_image_in_hdf5(tmp_path):
    path = study_file(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        file["images"][2] = file["images"][2][:60]
        file["images"][3] = np.zeros(0, np.uint8)
    samples = read(path)
    with pytest.raises(SampleError, match=re.escape(f"{path}, id 2: cannot be decoded")):
        samples.load(2)
    with pytest.raises(SampleError, match=r"id 3: .* empty, 0 bytes"):
        samples.load(3)


def test_hdf5_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*a.h5 as HDF5"):
        read(text_file(tmp_path, "hello", "a.h5"))
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["images"] = [1]
        file["other"] = [1]
    with pytest.raises(
        ValueError, match="no dataset latitudes, longitudes; it holds: images, other"
    ):
        read(tmp_path / "b.h5")
    study_file(tmp_path / "c.h5", clusters=np.array([b"0"]))
    with pytest.raises(ValueError, match=r"c.h5 holds 6 images but 1 values of clusters"):
        read(tmp_path / "c.h5")


# ---------------------------------------------------------------------------- longitudes


def test_longitudes_from_0_to_360(tmp_path):
    rows = "".join(f"c{i},10,{36 * i}\n" for i in range(10))
    path = text_file(tmp_path, "city,lat,lng\n" + rows)
    pattern = r"longitudes of .*places\.csv \(column 'lng'\) .* from 0 to 360; subtract 360 from"
    with pytest.raises(ValueError, match=pattern):
        read(path)
    west = text_file(tmp_path, "city,lat,lng\n" + rows.replace("c0,10,0", "c0,10,-1"))
    assert len(read(west).skipped) == 4  # a column with the west in it has wrong rows, no more
    one = text_file(tmp_path, "city,lat,lng\n" + "".join(f"c{i},10,{20 * i}\n" for i in range(11)))
    assert [str(s).partition(": ")[2] for s in read(one).skipped] == [
        "longitude 200 is outside -180 to 180 degrees"
    ]


def test_blank_text_is_no_text(tmp_path):
    samples = read(text_file(tmp_path, "city,lat,lng\nParis,1,2\n   ,3,4\n"))
    assert [str(s).partition(": ")[2] for s in samples.skipped] == ["no text in column 'city'"]
    assert len(samples) == 1


# ---------------------------------------------------------------------------- memory


def test_from_arrays_checks_too():
    samples = from_arrays(["a", "b", "c"], [1, 91, None], [2, 3, 4])
    assert samples.table["id"].tolist() == ["0"]
    assert [str(skip) for skip in samples.skipped] == [
        "arrays, index 1: latitude 91 is outside -90 to 90 degrees",
        "arrays, index 2: no latitude",
    ]
    with pytest.raises(ValueError, match="index 1: latitude 91 is outside"):
        from_arrays(["a", "b"], [1, 91], [2, 3], strict=True)
    with pytest.raises(ValueError, match="latitude and longitude look swapped in arrays"):
        from_arrays(["a", "b"], [100, 150], [2, 3])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((["a"], [1, 2], [1]), {}, ValueError, "latitude has 2 values for 1 inputs"),
        ((["a"], [1], [1]), {"ids": ["a", "b"]}, ValueError, "id has 2 values for 1 inputs"),
        ((["a"], [1], [1]), {"year": [1, 2]}, ValueError, "year has 2 values for 1 inputs"),
        (([], [], []), {}, ValueError, "arrays holds no samples"),
        ((["a", "b"], [1, 2], [1, 2]), {"ids": [7, 7]}, ValueError, "repeats 1 ids, such as 7"),
        ((["a", picture()], [1, 2], [1, 2]), {}, TypeError, "got 1 strings among 2"),
    ],
)
def test_from_arrays_refuses(arguments, options, error, message):
    with pytest.raises(error, match=message):
        from_arrays(*arguments, **options)


# ---------------------------------------------------------------------------- places alone


def test_places_are_inputs_of_their_own(tmp_path):
    table = tmp_path / "a.csv"
    table.write_text("lat,lon,name,country\n48.5,2.25,,FR\n91,0,x,FR\n-33,151,y,AU\n")
    samples = read(table, location=True)
    assert samples.kind == "location"
    assert [samples.load(i) for i in range(2)] == [(48.5, 2.25), (-33.0, 151.0)]
    assert samples.take([1]).load(0) == (-33.0, 151.0)
    assert list(samples.table["country"]) == ["FR", "AU"]
    assert [str(s) for s in samples.skipped] == [
        f"{table} row 2: latitude 91 is outside -90 to 90 degrees"
    ]
    texts = read(table, text="country")
    assert texts.as_locations().load(1) == (-33.0, 151.0)
    with pytest.raises(ValueError, match=r"leave image= and text= out \(--image, --text"):
        read(table, location=True, text="name")
    arrays = from_arrays(None, [1, 2, 95], [3, 4, 5], country=["FR", "IT", "no"])
    assert (arrays.kind, arrays.load(1), len(arrays), len(arrays.skipped)) == (
        "location",
        (2.0, 4.0),
        2,
        1,
    )
    bare = tmp_path / "b.csv"
    bare.write_text("lat,lon\n1,2\n3,4\n")
    assert read(bare, location=True).load(1) == (3.0, 4.0)
    with pytest.raises(ValueError, match=r"only a location encoder does without \(location=True\)"):
        read(bare)
