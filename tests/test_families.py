"""Every model family under one vocabulary, from tiny random checkpoints and real processors."""

import json
import re
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import families
import numpy as np
import pytest
import torch
from PIL import Image

import geofast as gf
from geofast.models.model import handing

ROOT = Path(__file__).parents[1]
SIZES = ((40, 40), (30, 64), (70, 35))  # height and width: one square, one wide, one tall
POOLS = {
    "vision": ["mean:patch", "max"], "projector": "mean:patch", "lm": ["last", "mean:image"],
    "text": "mean:text",
}  # fmt: skip
PROMPTS = ["w1 w2", "w3 w4 w5 w6", ""]
ALL = (*families.VISION_FAMILIES, *families.COMPARING_FAMILIES, *families.TALKING_FAMILIES)
# PaliGemma's processor hands numpy what it deprecates, and InternVL's of transformers 5.17.
pytestmark = pytest.mark.filterwarnings("ignore:__array(_wrap)?__ (implem|must):DeprecationWarning")


def name_of(family):
    return family.__name__


@pytest.fixture(scope="module")
def images():
    r = np.random.default_rng(0)
    return [Image.fromarray(r.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in SIZES]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Returns the model of a family, out of its checkpoint."""
    made = {}

    def of(family):
        if needed := families.NEEDS.get(family.__name__):
            pytest.importorskip(needed, reason=f"transformers' processor needs {needed}")
        if family not in made:
            made[family] = gf.load(families.save(family, tmp_path_factory.mktemp(family.__name__)))
        return made[family]

    return of


def pools_of(model):
    return {t.name: POOLS[t.name] for t in model.towers}


def read(model, inputs, prompts=PROMPTS):
    """Rows of one batch, those of an LM by prompt."""
    several = len(model.stages) == 2
    model = model.asking(prompts) if several else model
    with gf.capture(model, pool=pools_of(model)) as rows:
        model.forward(model.prepare(inputs), lambda i: setattr(rows, "label", prompts[i]))
    return {key: rows[key] for key in rows}


def assert_close(rows, expected, tolerance=2e-6):
    assert rows.keys() == expected.keys()
    for key in rows:
        error = float((rows[key] - expected[key]).norm() / expected[key].norm())
        assert error < tolerance, (key, error)


@pytest.mark.parametrize("family", ALL, ids=name_of)
def test_a_batch_gives_what_single_images_give(load, images, family):
    model = load(family)
    together = read(model, images)
    for i, image in enumerate(images):
        alone = read(model, [image])
        assert_close({k: v[i : i + 1] for k, v in together.items()}, alone)
    towers = {key.partition(".")[0].partition("/")[0] for key in together}
    talks = family in families.TALKING_FAMILIES
    assert towers == ({"vision", "projector", "lm"} if talks else {"vision"})


@pytest.mark.parametrize("family", ALL, ids=name_of)
def test_twice_the_same(load, images, family):
    """Masked autoencoders hide other patches in every call; a run must not."""
    model = load(family)
    assert_close(read(model, images), read(model, images), tolerance=1e-6)


def hidden_states_of(model, batch):
    """Hidden states of the last stage by transformers' own means."""
    return model.body(**batch, output_hidden_states=True, return_dict=True).hidden_states


@pytest.mark.oldest
@pytest.mark.parametrize("family", families.VISION_FAMILIES, ids=name_of)
def test_vision_sites_are_the_hidden_states(load, images, family):
    model = load(family)
    batch = model.prepare(images)
    with torch.no_grad():
        states = hidden_states_of(model, batch)
    with gf.capture(model, pool="mean") as rows:
        model.forward(batch)
    names = [f"vision.layers.{i}/mean" for i in range(len(model.towers[0].blocks))]
    by_width = {"swin": 1, "dinov3_convnext": 1}.get(family.__name__, 0)
    for i, name in enumerate(names):
        state = states[i + 1]
        if state.ndim == 4:
            state = state.flatten(2).mT if by_width else state.flatten(1, 2)
        torch.testing.assert_close(rows[name], state.mean(1), atol=2e-6, rtol=1e-5)


@pytest.mark.oldest
@pytest.mark.parametrize("looks", ["taken", "not taken"])
@pytest.mark.parametrize("family", families.TALKING_FAMILIES, ids=name_of)
def test_one_look_at_an_image_serves_every_prompt(load, images, family, looks, monkeypatch):
    """Rows of an LM equal those of a whole forward pass for each prompt, its own look included.

    Not taken: as with transformers before 5.18.
    """
    model = load(family)
    if looks == "not taken":
        monkeypatch.setattr("geofast.models.model.takes_looks", lambda _: False)
    rows = read(model, images)
    calls = []
    blocks = next(t for t in model.towers if t.name == "vision").blocks
    handle = blocks[0].register_forward_hook(lambda *_: calls.append(1))
    read(model, images)
    handle.remove()
    assert len(calls) == 1
    whole = model.body
    for i, prompt in enumerate(PROMPTS):
        batch = model.asking(PROMPTS).prepare(images)
        together = batch["prompts"][i] | {k: v for k, v in batch["image"].items() if k != "tiles"}
        with (
            gf.capture(whole, ["lm.embed", "lm.layers.*"], pools_of(model)) as expected,
            torch.inference_mode(),
        ):
            whole(**together)
        ending = f"/{prompt}" if prompt else ("/last", "/mean:image")
        mine = {k: v for k, v in rows.items() if k.startswith("lm.") and k.endswith(ending)}
        mine = {k.removesuffix(f"/{prompt}"): v for k, v in mine.items()}
        assert_close(mine, {k: expected[k] for k in expected})


def test_the_oldest_transformers_that_is_let_in_is_tested():
    (lowest,) = re.findall(r'"transformers>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert f"\ntransformers=={lowest}.0\n" in (ROOT / "constraints-oldest.txt").read_text()


def test_a_model_that_looks_again_by_itself_is_refused(load, images, monkeypatch):
    model = load(families.llava)
    monkeypatch.setattr("geofast.models.model.takes_looks", lambda _: False)
    look = type(model.body).get_image_features
    monkeypatch.setattr(
        type(model.body), "forward", lambda self, **given: look(self, given["pixel_values"])
    )
    msg = "LlavaModel called its get_image_features 0 times, not once"
    with pytest.raises(RuntimeError, match=msg):
        model.forward(model.prepare(images))
    assert "get_image_features" not in vars(model.body)


@pytest.mark.oldest
@pytest.mark.parametrize("family", [families.llava, families.gemma3], ids=name_of)
def test_the_towers_layers_do_not_stay_beside_the_language_model(load, images, family, monkeypatch):
    model, kept = load(family), []
    whole = model.body.get_image_features(
        **{k: v for k, v in model.prepare(images)["image"].items() if k != "tiles"}
    )
    assert (whole.hidden_states is not None) == (family is families.llava)
    monkeypatch.setattr(
        "geofast.models.model.handing",
        lambda body, given, seen: kept.append(seen) or handing(body, given, seen),
    )
    model.forward(model.prepare(images))
    (seen,) = kept
    assert seen.hidden_states is None
    for got, want in zip(seen.pooler_output, whole.pooler_output, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("family", families.TALKING_FAMILIES, ids=name_of)
def test_no_cache_is_built(load, images, family):
    model, caches = load(family), []
    with model.body.register_forward_hook(
        lambda _module, _args, output: caches.append(output.past_key_values)
    ):
        model.forward(model.prepare(images))
        model.other.forward(model.other.prepare(["w1 w2"]))
    assert caches == [None, None]


@pytest.mark.oldest
@pytest.mark.parametrize("family", families.TALKING_FAMILIES, ids=name_of)
def test_language_sites_are_the_hidden_states(load, images, family):
    """But for the last, which transformers gives after the final norm."""
    model = load(family).asking(PROMPTS[:1])
    batch = model.prepare(images)
    together = batch["prompts"][0] | {k: v for k, v in batch["image"].items() if k != "tiles"}
    with torch.inference_mode():
        states = hidden_states_of(model, together)
    with gf.capture(model, ["lm.embed", "lm.layers.*"], {"lm": "mean"}) as rows:
        model.forward(batch)
    mask = together["attention_mask"][..., None]
    for key, state in list(zip(rows, states, strict=True))[:-1]:
        mean = (state * mask).sum(1) / mask.sum(1)
        torch.testing.assert_close(rows[key], mean, atol=2e-6, rtol=1e-5)


@pytest.mark.oldest
@pytest.mark.parametrize("family", families.TALKING_FAMILIES, ids=name_of)
def test_image_tokens_are_the_processors(load, images, family):
    """The mean over the image tokens of the embedding is that of the projector's output."""
    model = load(family).asking([""])
    batch = model.prepare(images)
    lm = model.towers[-1]
    counts = (batch["prompts"][0]["input_ids"] == lm.image_token).sum(1)
    assert (counts > 0).all()
    embedded = []
    pick = model.sites("lm.embed")[0].watch(embedded.append)
    model.forward(batch)
    pick.remove()
    with gf.capture(model, "lm.embed", {"lm": "mean:image"}) as rows:
        model.forward(batch)
    for i in range(len(images)):
        image = batch["prompts"][0]["input_ids"][i] == lm.image_token
        torch.testing.assert_close(rows["lm.embed/mean:image"][i], embedded[0][i][image].mean(0))


@pytest.mark.parametrize("family", families.COMPARING_FAMILIES, ids=name_of)
def test_the_joint_embedding(load, images, family):
    model = load(family)
    inputs = {"image": images, "text": ["w1 w2", "w3", "w4 w5 w6"]}
    for kind, tower in (("image", "vision"), ("text", "text")):
        view = model.reading(kind)
        batch = view.prepare(inputs[kind])
        with gf.capture(view, f"{tower}.joint") as rows:
            view.forward(batch)
        (key,) = rows
        ask = getattr(model.module, f"get_{kind}_features")
        with torch.inference_mode():
            torch.testing.assert_close(rows[key], ask(**batch).pooler_output)
        assert torch.pdist(rows[key]).min() > 1e-4
    with pytest.raises(ValueError, match="takes no prompt beside an image"):
        model.asking(["w1"])


@pytest.mark.parametrize("family", families.TALKING_FAMILIES, ids=name_of)
def test_a_pass_stops_at_the_deepest_site(load, images, family):
    model = load(family)
    ran, handles = [], []
    for tower in model.towers:
        for i, block in enumerate(tower.blocks):
            note = partial(lambda who, *_: ran.append(who), (tower.name, i))
            handles.append(block.register_forward_hook(note))
    for sites, last in (
        ("vision.layers.1", ("vision", 1)),
        ("lm.layers.1", ("lm", 1)),
        (["lm.layers.1.*", "lm.layers.1"], ("lm", 1)),
        ("lm.layers.0.mlp", ("lm", 0)),
    ):
        short = model.until(model.sites(sites))
        ran.clear()
        with gf.capture(short, sites, "mean") as rows:
            short.forward(short.prepare(images))
        assert ran[-1] == last
        assert len(rows) == len(model.sites(sites))
        assert all(len(rows[key]) == len(images) for key in rows)
        with gf.capture(model, sites, "mean") as expected:
            model.forward(model.prepare(images))
        assert_close(dict(rows), dict(expected))
    for handle in handles:
        handle.remove()
    message = r"lm.layers.2 lies beyond lm.layers.0, where this model stops"
    with pytest.raises(ValueError, match=message), gf.capture(short, "lm.layers.2"):
        pass


def test_texts_through_a_model_that_talks_about_images(load):
    model = load(families.llava).reading("text")
    assert model.kind == "text"
    with gf.capture(model) as rows:
        model.forward(model.prepare(["w1 w2", "w3"]))
    assert next(iter(rows)) == "lm.embed/last"
    assert rows.n == 2
    with pytest.raises(ValueError, match="reads image, not text"):
        load(families.vit).reading("text")


@pytest.mark.parametrize("family", families.TALKING_FAMILIES, ids=name_of)
def test_a_text_is_read_alike_alone_and_padded(load, family):
    model = load(family).reading("text")
    texts = ["w1 w2", "w3", "w4 w5 w6 w7"]
    with gf.capture(model, pool=["last", "mean"]) as together:
        model.forward(model.prepare(texts))
    with gf.capture(model, pool=["last", "mean"]) as alone:
        for text in texts:
            model.forward(model.prepare([text]))
    assert_close(dict(together), dict(alone))


def test_phi4_is_what_transformers_makes_of_it(load, images):
    """Its own whole pass, which runs the tower over crops that only fill up, too."""
    model = load(families.phi4_multimodal).asking(["w1 w2 w3"])
    batch = model.prepare(images)
    assert len(set(batch["image"]["tiles"].tolist())) == 3
    given = {k: v for k, v in batch["image"].items() if k != "tiles"}
    given["image_pixel_values"] = given.pop("pixel_values")
    names = ["vision.layers.2", "lm.layers.0", "lm.layers.2"]
    seen, handles = {}, []
    for site in model.sites(names):
        keep = partial(lambda name, hidden: seen.setdefault(name, []).append(hidden), site.name)
        handles.append(site.watch(keep))
    model.forward(batch)
    with torch.inference_mode():
        model.module(**batch["prompts"][0], **given)
    for handle in handles:
        handle.remove()
    mine, whole = seen.pop("vision.layers.2")
    tiles, most = batch["image"]["tiles"], batch["image"]["tiles"].max()
    assert len(mine) == tiles.sum() < len(whole) == len(images) * most
    real = (torch.arange(most) < tiles[:, None]).flatten()
    torch.testing.assert_close(mine, whole[real], atol=1e-5, rtol=1e-5)
    for states in seen.values():
        torch.testing.assert_close(*states, atol=1e-5, rtol=1e-5)


def test_phi4_sees_the_same_whatever_is_beside_it(load, images):
    """transformers' attention is causal where nothing in the batch is masked, and only there."""
    model = load(families.phi4_multimodal)
    assert "causal attention in its vision tower is off" in model.notes[0]
    attention = [m for m in model.towers[0].blocks[0].modules() if hasattr(m, "is_causal")]
    alone, beside = ([images[0]], images[:1] + images[2:])
    assert model.prepare(alone)["image"]["image_attention_mask"].all()
    assert not model.prepare(beside)["image"]["image_attention_mask"].all()

    def rows(inputs):
        with gf.capture(model, "vision.layers.2") as one:
            model.forward(model.prepare(inputs))
        return {key: x[:1] for key, x in one.items()}

    assert_close(rows(alone), rows(beside))
    for module in attention:
        module.is_causal = True
    with pytest.raises(AssertionError, match=r"vision\.layers\.2"):
        assert_close(rows(alone), rows(beside))
    for module in attention:
        module.is_causal = False


def test_phi4_is_read_off_the_disk(load, images, tmp_path):
    """Its parameters that end lines are those of a module that is not itself called."""
    expected = read(load(families.phi4_multimodal), images[:1], [""])
    away = gf.load(families.save(families.phi4_multimodal, tmp_path), device_map={"": "disk"})
    assert_close(read(away, images[:1], [""]), expected)


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is here")
def test_what_phi4s_processor_needs_is_named(tmp_path):
    families.phi4_model().save_pretrained(tmp_path)
    families.tokenizer().save_pretrained(tmp_path)
    kinds = {"processor_class": "Phi4MultimodalProcessor"}
    kinds["image_processor_type"] = "Phi4MultimodalImageProcessor"
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(kinds))
    with pytest.raises(ImportError, match=r"processor of .* cannot be read without torchvision$"):
        gf.load(tmp_path)


def test_a_vision_tower_that_cannot_be_called_is_left_out_aloud():
    """Phi-4's, in the code that comes with its checkpoint."""
    module = families.phi4_model()
    module.config.model_type = "phi4mm"
    model = gf.load(module, processor=families.tokenizer())
    assert [tower.name for tower in model.towers] == ["lm"]
    assert model.kind == "text"
    assert "only its language model is read" in model.notes[0]


@pytest.mark.parametrize("storage", ["rows", "gram"])
def test_prompts_about_images_are_probed_beside_each_other(load, storage):
    model = load(families.qwen2_5_vl)
    r = np.random.default_rng(1)
    photos = [r.integers(0, 255, (40, 40 + 8 * (i % 3), 3), dtype=np.uint8) for i in range(24)]
    places = [np.linspace(-60, 60, 24), np.linspace(-90, 90, 24) ** 2 / 90]
    samples = gf.data.from_arrays(photos, *places)
    options = dict(split=gf.KFold(3), storage=storage, batch_size=5, workers=0)
    run = gf.probe(model, samples, prompts=["w1 w2", "w3/w4"], **options)
    layers = run.layers
    assert set(layers["prompt"]) == {"", "w1 w2", "w3/w4"}
    assert len(layers[layers["prompt"] == ""]) == 4 + 1
    assert len(layers[layers["prompt"] == "w3/w4"]) == 4
    alone = gf.probe(model, samples, prompts="w3/w4", **options).layers
    mine = layers[layers["prompt"].isin(["", "w3/w4"])]
    np.testing.assert_allclose(mine["r2"], alone["r2"], rtol=1e-3, atol=1e-4)
    few = gf.probe(model, samples, sites="vision.layers.*", **options)
    assert set(few.layers["tower"]) == {"vision"}


@pytest.fixture
def families_page(monkeypatch):
    """The tool that writes the page; it is there in the second run of `make test`."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import families_page

    if absent := families_page.lacking():
        pytest.skip(f"the page of families takes {', '.join(absent)}: constraints-zoo.txt")
    return families_page


PAGE = (ROOT / "docs" / "families.md").read_text()


@pytest.mark.parametrize(
    "what", [*families.FAMILIES, *families.REAL], ids=lambda w: getattr(w, "__name__", w)
)
def test_a_row_of_the_page_is_what_the_checks_say(families_page, what, tmp_path):
    rows = families_page.rows_of(what, tmp_path)
    assert "fail" not in "".join(rows)
    assert "\n".join(["", *rows, ""]) in PAGE
    title = rows[0].split("|")[1]
    assert PAGE.count(f"\n|{title}|") == len(rows)


def test_the_page_has_every_family_and_no_other(families_page):
    table = PAGE.removeprefix(families_page.HEAD).partition(families_page.KNOWN_HEAD)[0]
    rows = table.splitlines()
    assert families_page.page(rows) == PAGE
    assert set(families_page.KNOWN.values()) <= set(families.FAMILIES)
    titles = [*map(families_page.title, families.FAMILIES), *families.REAL]
    assert list(dict.fromkeys(row.split("|")[1].strip() for row in rows)) == titles
