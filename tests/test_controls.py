"""Controls: a raw image and a bag of tokens, as they are and in a probe."""

from importlib import import_module

import families
import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from PIL import Image
from test_probe import named, painted, pixels

import geofast as gf
from geofast.controls import VOCABULARY, _token_ids, raw_inputs, thumbnail
from geofast.data import from_arrays
from geofast.extract import Storage, worded
from geofast.models.inputs import text_collate
from geofast.models.twin import random_twin


@pytest.fixture(scope="module")
def vision():
    return gf.load(tiny.dinov2(), prepare=pixels)


@pytest.fixture(scope="module")
def language():
    module = tiny.llama()
    return gf.load(module, prepare=text_collate(tiny.tokenizer(), module.base_model))


def test_a_thumbnail_by_hand():
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:2, :3] = [[[10, 20, 30]], [[30, 40, 50]]]  # the area of the first pixel
    small = thumbnail(Image.fromarray(pixels))
    assert (small.shape, small.dtype) == ((768,), torch.float32)
    torch.testing.assert_close(small[:3], torch.tensor([20, 30, 40]) / 255)
    assert not small[3:].any()
    grey = thumbnail(Image.new("L", (5, 7), 51))
    torch.testing.assert_close(grey, torch.full((768,), 0.2))


def test_pixels_of_the_samples_that_went_through(vision):
    whole = painted()
    images = [whole.load(i) for i in range(60)]
    bad = [3, 17]
    spoiled = [b"no image" if i in bad else image for i, image in enumerate(images)]
    columns = (whole.table["latitude"], whole.table["longitude"])
    samples = from_arrays(spoiled, *columns, zone=whole.table["zone"])
    good = [i for i in range(60) if i not in bad]
    x = torch.stack([thumbnail(images[i]) for i in good])
    options = {"sites": "vision.layers.1", "pool": "mean:patch", "group": "zone"}
    found = gf.probe(vision, samples, controls=["pixels", "pixels"], workers=1, **options)
    given = gf.probe(vision, whole.take(good), baselines={"thumbnails": x}, **options)
    mine, theirs = (
        run.layers.query(f"control == '{c}'").drop(columns=["control", "pool"]).dropna(axis=1)
        for run, c in ((found, "pixels"), (given, "thumbnails"))
    )
    assert set(mine["group"]) == {"", "north", "south"}
    assert set(mine["site"]) == {"input"}
    pd.testing.assert_frame_equal(
        mine.reset_index(drop=True), theirs.reset_index(drop=True), rtol=1e-9
    )
    assert set(found.layers.query("control == 'pixels'")["pool"]) == {"pixels"}
    assert found.layers["d"].max() == 768
    by_gram = gf.probe(vision, samples, controls="pixels", storage="gram", **options)
    by_row = gf.probe(vision, samples, controls="pixels", select="gcv", **options)
    assert by_gram.info["counts"]["skipped"] == 2
    folds = by_gram.samples["fold_kfold"].tolist()
    whole_folds = gf.KFold().assign(samples.table)[good].tolist()
    assert folds == whole_folds  # statistics keep the folds that they were gathered in
    summed = by_gram.layers.query("control == 'pixels' and group == ''")["r2"].item()
    y = torch.tensor(whole.table[["latitude", "longitude"]].to_numpy()[good])
    expected = gf.cross_validate(x, y, torch.tensor(folds), select="gcv").r2.mean().item()
    assert summed == pytest.approx(expected, abs=1e-5)
    assert not np.isnan(by_row.layers.query("control == ''")["r2:pixels"]).any()


def test_the_table_pairs_every_r2_with_its_controls():
    vision = gf.load(tiny.dinov2(), prepare=pixels)
    controls = ["random-weights", "pixels"]
    noise = {"noise": torch.randn(60, 4, generator=torch.Generator().manual_seed(0))}
    run = gf.probe(
        vision, painted(), pool=["cls", "mean:patch"], controls=controls, baselines=noise,
        group="zone", split=[gf.KFold(), gf.Blocks(30)], workers=0,
    )  # fmt: skip
    table = run.layers
    keys = ["site", "pool", "split", "group"]
    twin = table[table["control"] == "random-weights"].set_index(keys)["r2"]
    real = table[table["control"] == ""]
    assert len(real) == len(twin) > 8
    for row in real.to_dict("records"):
        place = tuple(row[k] for k in keys)
        assert row["r2:random-weights"] == twin[place]
        for name in ("pixels", "noise"):
            raw = table[(table["control"] == name) & (table["site"] == "input")]
            raw = raw[(raw["split"] == row["split"]) & (raw["group"] == row["group"])]
            assert row[f"r2:{name}"] == raw["r2"].item()
    assert table[table["control"] != ""].filter(like="r2:").isna().all(axis=None)
    assert run.summary().count("random") >= 2


def test_bags_by_hand(language):
    texts = ["w1 w2 w1", "w2", "w5 w1"]  # ids are two more: 3, 4, 7
    samples = from_arrays(texts, [0, 1, 2], [0, 1, 2])
    storage = Storage("rows", torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64))

    def bags(prompts, kept=(0, 1, 2)):
        inputs = worded(samples, prompts)
        return raw_inputs("tokens", language, inputs, storage, np.array(kept), 0).rows

    (x,) = bags(None).values()
    assert x.dtype == torch.float32
    assert x.tolist() == [[2, 1, 0], [0, 1, 0], [1, 0, 1]]  # w1 three times, w2 twice, w5 once
    assert bags(None, [1, 2])["input/tokens"].tolist() == [[0, 1, 0], [1, 0, 1]]  # all level
    two = bags(["{text}", "w9 {text}"])
    assert list(two) == ["input/tokens/{text}", "input/tokens/w9 {text}"]
    assert two["input/tokens/w9 {text}"].tolist() == [[2, 1, 1, 0], [0, 1, 1, 0], [1, 1, 0, 1]]
    grams = Storage("gram", torch.arange(3.0)[:, None].double(), torch.tensor([0, 1, 0]))
    found = raw_inputs("tokens", language, worded(samples, None), grams, np.array([0, 2]), 0).grams
    x = torch.tensor([[2.0, 1, 0], [1, 0, 1]])
    direct = gf.Gram(3, 1, 2).update(x, grams.targets[[0, 2]], grams.cell[[0, 2]])
    # Two cells, though the sample of the second was left out.
    torch.testing.assert_close(found["input/tokens"].matrix, direct.matrix)


WORDS = [32, 33], [34]  # w9, w10 and w11 in the tokenizer of families
KINDS = {
    families.clip: WORDS,
    families.siglip: WORDS,  # whose padding the model reads
    families.metaclip2: ([0, 14, 15, 2], [0, 16, 2]),  # its padding is 1
    families.minilm: ([2, 14, 15, 3], [2, 16, 3]),
    families.llama: WORDS,
    families.open_clip_clip: (
        [49406, 342, 280, 342, 272, 271, 49407],
        [49406, 342, 272, 272, 49407],
    ),
    families.open_clip_siglip: WORDS,
}


@pytest.mark.parametrize("family", KINDS, ids=lambda family: family.__name__)
def test_a_bag_holds_no_padding(tmp_path, family):
    if needed := families.NEEDS.get(family.__name__):
        pytest.importorskip(needed, reason=f"the checkpoint needs {needed}")
    model = gf.load(families.save(family, tmp_path)).reading("text")
    (ids,) = _token_ids(model, ["w9 w10", "w11"])
    assert [one.tolist() for one in ids] == list(KINDS[family])


def test_a_bag_keeps_the_most_frequent(language, monkeypatch):
    monkeypatch.setattr("geofast.controls.VOCABULARY", 2)
    samples = from_arrays(["w7 w7 w3", "w3 w7", "w1 w1"], [0, 1, 2], [0, 1, 2])
    storage = Storage("rows", torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64))
    inputs = worded(samples, None)
    (x,) = raw_inputs("tokens", language, inputs, storage, np.arange(3), 0).rows.values()
    assert x.tolist() == [[2, 0], [1, 0], [0, 2]]  # w7, then w1 and w3 are level: the lower id
    assert VOCABULARY == 1024


def test_tokens_in_a_probe(language):
    prompts = ["{text}", "w9 {text} w8 {country}"]
    options = {"prompts": prompts, "sites": "lm.layers.2", "controls": "tokens"}
    found = gf.probe(language, named(), **options)
    tokens = found.layers[found.layers["control"] == "tokens"]
    assert list(tokens["prompt"]) == prompts
    assert set(tokens["pool"]) == {"tokens"}
    paired = found.layers[found.layers["control"] == ""]
    assert paired["r2:tokens"].tolist() == tokens["r2"].tolist()
    texts = worded(named(), prompts)[prompts[1]].inputs
    words = sorted({word for text in texts for word in text.split()})
    counts = torch.tensor([[float(t.split().count(w)) for w in words] for t in texts])
    y = torch.tensor(found.samples[["latitude", "longitude"]].to_numpy())
    fold = torch.tensor(found.samples["fold_kfold"].to_numpy())
    expected = float(gf.cross_validate(counts, y, fold).r2.mean())
    assert tokens["r2"].iloc[1] == pytest.approx(expected, abs=1e-6)
    assert tokens["d"].iloc[1] == len(words)
    by_gram = gf.probe(language, named(), storage="gram", **options).layers
    by_row = gf.probe(language, named(), select="gcv", **options).layers
    order = ["control", "prompt"]
    np.testing.assert_allclose(
        by_gram.sort_values(order)["r2"], by_row.sort_values(order)["r2"], atol=1e-6
    )


def test_controls_that_cannot_be(vision, language):
    with pytest.raises(ValueError, match="'tokens' is for samples of kind text; these are image"):
        gf.probe(vision, painted(), controls="tokens")
    with pytest.raises(ValueError, match="'pixels' is for samples of kind image; these are text"):
        gf.probe("/no/such/model", named(), controls=["pixels"])
    with pytest.raises(ValueError, match="baseline 'pixels' has a control's name"):
        gf.probe(
            vision, painted(), controls="pixels", baselines={"pixels": torch.zeros(60, 2)}
        )  # fmt: skip
    embedded = gf.load(
        tiny.llama(), prepare=lambda texts: {"inputs_embeds": torch.ones(len(texts), 2, 32)}
    )
    with pytest.raises(
        ValueError, match=r"counts input_ids, and prepare= of Llama.* makes inputs_emb"
    ):
        gf.probe(embedded, named(), controls="tokens")


def test_what_cannot_be_is_told_before_the_pass():
    """Though the model has to be there to know."""
    module = tiny.llama()
    collate = text_collate(tiny.tokenizer(), module.base_model)
    model = gf.load(module, prepare=lambda texts: {"inputs_embeds": collate(texts)})
    ran = []
    module.base_model.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(ValueError, match="counts input_ids"):
        gf.probe(model, named(), controls="tokens")
    module.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ValueError, match="no twin of random weights: its weights are quantised"):
        gf.probe(gf.load(module, prepare=collate), named(), controls="random-weights")
    assert not ran


@pytest.mark.parametrize("storage", ["rows", "gram"])
def test_a_control_that_fails_after_the_pass_costs_nothing_else(
    tmp_path, vision, storage, monkeypatch
):
    """An image that is gone when the twin looks for it: R2 of other samples is no control."""
    whole = painted()
    for i in range(60):
        Image.fromarray(whole.inputs[i]).save(tmp_path / f"{i}.png")
    table = whole.table[["latitude", "longitude"]].assign(image=[f"{i}.png" for i in range(60)])
    table.to_csv(tmp_path / "t.csv")
    alone = gf.probe(vision, tmp_path / "t.csv", storage=storage, workers=0)
    probing = import_module("geofast.probe")

    def gone(model):
        (tmp_path / "20.png").unlink()
        return random_twin(model)

    monkeypatch.setattr(probing, "random_twin", gone)
    run = gf.probe(
        vision, tmp_path / "t.csv", controls="random-weights", storage=storage, workers=0
    )
    pd.testing.assert_frame_equal(run.layers, alone.layers)
    (told,) = [w for w in run.info["warnings"] if "control" in w]
    assert "the control 'random-weights' is not in this run" in told
    assert "20.png" in told

    def broken(model):
        raise TypeError("__init__() missing 1 required positional argument")

    monkeypatch.setattr(probing, "random_twin", broken)
    samples = whole.take(np.arange(30))
    run = gf.probe(vision, samples, controls="random-weights", storage=storage, workers=0)
    (told,) = [w for w in run.info["warnings"] if "control" in w]
    assert "TypeError: __init__() missing 1" in told


def test_a_twin_sees_the_samples_that_went_through(vision):
    """Not one that the model skipped, in the folds that were dealt."""
    whole = painted()
    images = [b"no image" if i in (3, 17) else whole.load(i) for i in range(60)]
    samples = from_arrays(images, whole.table["latitude"], whole.table["longitude"])
    good = np.array([i for i in range(60) if i not in (3, 17)])
    options = dict(controls="random-weights", sites="vision.layers.1", workers=0)
    found = gf.probe(vision, samples, **options).layers
    expected = gf.probe(vision, whole.take(good), **options).layers
    np.testing.assert_allclose(found["r2"], expected["r2"], rtol=1e-9)
    grams = gf.probe(vision, samples, storage="gram", **options).layers
    assert grams["n"].tolist() == [58, 58]
    fold = torch.from_numpy(gf.KFold().assign(whole.table)[good])
    twin = random_twin(vision)
    with gf.capture(twin, "vision.layers.1") as rows:
        twin.forward(twin.prepare([images[i] for i in good]))
    y = torch.tensor(whole.table[["latitude", "longitude"]].to_numpy()[good])
    (x,) = rows.values()
    expected = gf.cross_validate(x, y, fold, select="gcv").r2.mean().item()
    assert grams["r2"].iloc[1] == pytest.approx(expected, abs=1e-5)


def test_a_twins_statistics_have_every_cell(vision):
    """The last one too, where the model skipped all its samples."""
    whole = painted()
    splits = [gf.KFold(), gf.Blocks(15)]
    fold = np.stack([split.assign(whole.table) for split in splits], 1)
    last = (fold == max(map(tuple, fold.tolist()))).all(1)
    images = [b"no image" if gone else whole.load(i) for i, gone in enumerate(last)]
    samples = from_arrays(images, whole.table["latitude"], whole.table["longitude"])
    run = gf.probe(
        vision, samples, controls="random-weights", storage="gram", split=splits, workers=0
    )
    assert run.info["counts"]["skipped"] == last.sum() > 0
    assert len(run.layers.query("control == 'random-weights'")) == len(run.layers) / 2


def test_a_twin_of_torchs_own_attention():
    """Drawn as the module draws itself: what is inside first, so that biases are 0."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = torch.nn.MultiheadAttention(8, 2, batch_first=True)
            self.mlp = torch.nn.Linear(8, 8)

        def forward(self, x):
            return x + self.mlp(self.attn(x, x, x)[0])

    blocks = torch.nn.Sequential(Block(), Block())
    model = gf.load(blocks, prepare=lambda given: {"input": torch.stack(given)})
    first, again, other = (random_twin(model, seed).module for seed in (0, 0, 1))
    for block, same, unlike in zip(first, again, other, strict=True):
        assert not block.attn.out_proj.bias.any()
        assert torch.equal(block.attn.in_proj_weight, same.attn.in_proj_weight)
        assert not torch.equal(block.attn.in_proj_weight, unlike.attn.in_proj_weight)
    assert not torch.equal(first[0].attn.in_proj_weight, blocks[0].attn.in_proj_weight)


@pytest.mark.parametrize("storage", ["rows", "gram"])
@pytest.mark.parametrize("width", [4, 300])
def test_a_control_that_cannot_be_solved_costs_nothing_else(vision, storage, width, monkeypatch):
    whole = painted()
    options = dict(storage=storage, workers=0, group="zone", sites="vision.layers.*")
    alone = gf.probe(vision, whole, **options)
    fine = torch.from_numpy(np.random.default_rng(0).normal(size=(60, width)))
    more = dict(controls="pixels", baselines={"huge": fine * 1e200, "fine": fine})

    def spoilt(*args):
        found = raw_inputs(*args)
        for x in (found.rows or {}).values():
            x[:] = torch.nan
        for gram in (found.grams or {}).values():
            gram.matrix[:] = torch.nan
        return found

    monkeypatch.setattr(import_module("geofast.probe"), "raw_inputs", spoilt)
    run = gf.probe(vision, whole, **more, **options)
    own = run.layers[run.layers["control"] == ""]
    assert own["r2:fine"].notna().all()
    pd.testing.assert_frame_equal(own[alone.layers.columns].reset_index(drop=True), alone.layers)
    assert set(run.layers["control"]) == {"", "fine"}
    told = [w for w in run.info["warnings"] if "could not be solved" in w]
    for name, said in zip(("huge", "pixels"), told, strict=True):
        assert said.startswith(
            f"the control {name!r} could not be solved at 3 places, the first input/{name}, "
            "split 'kfold': "
        )


def test_a_control_lacks_that_group_alone_which_cannot_be_solved(vision, monkeypatch):
    whole = painted()

    def spoilt(*args):
        found = raw_inputs(*args)
        found.rows["input/pixels"][np.flatnonzero(whole.table["zone"] == "north")[3]] = torch.nan
        return found

    monkeypatch.setattr(import_module("geofast.probe"), "raw_inputs", spoilt)
    run = gf.probe(vision, whole, controls="pixels", group="zone", workers=0)
    assert list(run.layers.query("control == 'pixels'")["group"]) == ["south"]
    (told,) = [w for w in run.info["warnings"] if "could not be solved" in w]
    assert told.startswith("the control 'pixels' could not be solved at 2 places, the first input")


def test_what_of_the_model_itself_cannot_be_solved_stops_the_run(vision, monkeypatch):
    def refuse(*_args, **_options):
        raise torch.linalg.LinAlgError("no eigenvalues")

    monkeypatch.setattr("geofast.solving.cross_validate", refuse)
    said = r"no eigenvalues\. While solving vision\.embed/cls, split 'kfold', targets latitude"
    with pytest.raises(RuntimeError, match=said):
        gf.probe(vision, painted(), workers=0)
