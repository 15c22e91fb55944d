"""Models of open_clip and timm, from tiny random checkpoints that the libraries wrote."""

import pickle

import families
import numpy as np
import pytest
import torch
from PIL import Image

import geofast as gf
from geofast.models import find_towers
from geofast.models.twin import random_twin

REASON = "open_clip and timm are in the second run of `make test` (constraints-zoo.txt)"
open_clip = pytest.importorskip("open_clip", reason=REASON)
timm = pytest.importorskip("timm", reason=REASON)

SIZES = ((40, 40), (30, 64), (70, 35))
TEXTS = ["w1 w2", "w3", "w4 w5 w6 w7 w8"]
PREFIX = {
    "open_clip_siglip": ("register",), "timm_vit_siglip": (), "timm_cait": (), "timm_swin": (),
    "timm_convnext": (), "timm_vit_registers": ("cls", *["register"] * 4),
    "timm_deit_distilled": ("cls", "register"),
}  # fmt: skip
RESNETS = (families.timm_resnet, families.open_clip_resnet)
IN_OPEN_CLIP = pytest.mark.parametrize(
    "family", families.OPEN_CLIP_FAMILIES, ids=lambda f: f.__name__
)
IN_TIMM = pytest.mark.parametrize("family", families.TIMM_FAMILIES, ids=lambda f: f.__name__)
IN_BOTH = pytest.mark.parametrize("family", families.ZOO_FAMILIES, ids=lambda f: f.__name__)


@pytest.fixture(scope="module")
def images():
    r = np.random.default_rng(0)
    return [Image.fromarray(r.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in SIZES]


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """Returns what `gf.load` takes for a family."""
    made = {}

    def of(family):
        if family not in made:
            made[family] = families.save(family, tmp_path_factory.mktemp(family.__name__))
        return made[family]

    return of


@pytest.fixture(scope="module")
def load(named):
    made = {}

    def of(family):
        if family not in made:
            made[family] = gf.load(named(family))
        return made[family]

    return of


def read(model, inputs, sites=None, pool=None):
    with gf.capture(model, sites, pool) as rows:
        model.forward(model.prepare(inputs))
    return dict(rows)


def assert_close(rows, expected):
    assert rows.keys() == expected.keys()
    for key in rows:
        torch.testing.assert_close(rows[key], expected[key], atol=2e-6, rtol=1e-5)


@IN_BOTH
def test_a_batch_gives_what_single_inputs_give(load, images, family):
    model = load(family)
    for view, inputs in ((model, images), (model.other, TEXTS)):
        if view is not None:
            together = read(view, inputs)
            for i, one in enumerate(inputs):
                assert_close({k: v[i : i + 1] for k, v in together.items()}, read(view, [one]))


@pytest.mark.parametrize(
    "family", [f for f in families.ZOO_FAMILIES if f not in RESNETS], ids=lambda f: f.__name__
)
def test_vision_sites_and_roles_are_those_of_the_library(load, images, family):
    """Its own `forward_intermediates` splits prefix and patches, [batch, dim, height, width]."""
    model = load(family)
    (tower,) = model.towers
    assert tower.prefix == PREFIX.get(family.__name__, ("cls",))
    assert tower.default_pool == ("cls" if "cls" in tower.prefix else "mean:patch")
    pools = ["mean:patch", *["cls"] * ("cls" in tower.prefix)]
    pools += ["mean:register"] * ("register" in tower.prefix)
    batch = model.prepare(images)
    encoder = getattr(model.module, "visual", model.module)
    encoder = getattr(encoder, "trunk", encoder)
    with torch.inference_mode():
        patches, prefix = intermediates(encoder, batch["inputs"], bool(tower.prefix))
    rows = read(model, images, "vision.layers.*", pools)
    assert len(patches) == len(tower.blocks)
    expected = {}
    for i, (spatial, before) in enumerate(zip(patches, prefix, strict=True)):
        site = f"vision.layers.{i}"
        expected[f"{site}/mean:patch"] = spatial.flatten(2).mean(2)
        if "cls" in tower.prefix:
            expected[f"{site}/cls"] = before[:, 0]
        if "register" in tower.prefix:
            first = tower.prefix.index("register")
            expected[f"{site}/mean:register"] = before[:, first:].mean(1)
        if tower.prefix:
            assert before.shape[1] == len(tower.prefix)
    assert_close(rows, expected)


@pytest.mark.parametrize("family", RESNETS, ids=lambda f: f.__name__)
def test_a_list_of_blocks_for_each_stage(load, images, family):
    model = load(family)
    (tower,) = model.towers
    assert len(tower.blocks) == 6
    assert tower.prefix == ()
    pixels = model.prepare(images)["inputs"]
    with torch.inference_mode():
        if family is families.timm_resnet:
            states = model.module.forward_intermediates(pixels, intermediates_only=True)
        else:
            states = model.module.visual.forward_intermediates(pixels)["image_intermediates"]
    ends = [f"vision.layers.{i}" for i in (0, 2, 4, 5)]
    rows = read(model, images, ends, "mean:patch")
    expected = [state.flatten(2).mean(2) for state in states[-4:]]
    assert_close(rows, dict(zip(rows, expected, strict=True)))


def intermediates(encoder, pixels, with_prefix):
    """Patches [batch, dim, height, width] and prefix [batch, tokens, dim] of every block."""
    if hasattr(encoder, "conv1"):  # open_clip's own
        found = encoder.forward_intermediates(pixels, output_extra_tokens=True)
        return found["image_intermediates"], found["image_intermediates_prefix"]
    if not with_prefix:
        found = encoder.forward_intermediates(pixels, intermediates_only=True)
        return found[-len(find_towers(encoder)[0].blocks) :], [None] * len(found)
    found = encoder.forward_intermediates(
        pixels, return_prefix_tokens=True, intermediates_only=True
    )
    return [patches for patches, _ in found], [prefix for _, prefix in found]


@IN_OPEN_CLIP
def test_text_sites_are_those_of_the_library_and_padding_is_no_text(load, family):
    text = load(family).reading("text")
    ids = text.prepare(TEXTS)["inputs"]
    encoder = getattr(text.module, "text", text.module)
    with torch.inference_mode():
        if hasattr(encoder, "forward_intermediates"):
            options = dict(output_fmt="NLC") if encoder is not text.module else {}
            states = encoder.forward_intermediates(text=ids, **options)["text_intermediates"]
        else:
            given = dict(input_ids=ids, attention_mask=(ids != 0).long())
            states = encoder.transformer(**given, output_hidden_states=True).hidden_states[1:]
    tokens = text.collate.tokenizer
    own = hasattr(tokens, "bpe")  # CLIP's, which puts a token before a text and one after
    counts = [len(tokens.encode(t)) + 2 if own else len(t.split()) for t in TEXTS]
    expected = {}
    for i, state in enumerate(states):
        means = [state[j, :n].mean(0) for j, n in enumerate(counts)]
        expected[f"text.layers.{i}/mean:text"] = torch.stack(means)
    assert_close(read(text, TEXTS, "text.layers.*", "mean:text"), expected)


def test_the_cls_that_ends_a_text(load):
    """CoCa's, after the padding: neither text nor padding."""
    text = load(families.open_clip_coca).reading("text")
    ids = text.prepare(TEXTS)["inputs"]
    with torch.inference_mode():
        encoder = text.module.text
        found = encoder.forward_intermediates(ids, output_fmt="NLC", output_extra_tokens=True)
    expected = {
        f"text.layers.{i}/{pool}": state[:, 0]
        for i, state in enumerate(found["text_intermediates_suffix"])
        for pool in ("cls", "last")
    }
    assert_close(read(text, TEXTS, "text.layers.*", ["cls", "last"]), expected)


@IN_OPEN_CLIP
def test_the_joint_embedding(load, images, family):
    model = load(family)
    for view, inputs, encode in (
        (model, images, model.module.encode_image),
        (model.other, TEXTS, model.module.encode_text),
    ):
        with torch.inference_mode():
            expected = encode(view.prepare(inputs)["inputs"], normalize=False)
        (rows,) = read(view, inputs, f"{view.towers[0].name}.joint").values()
        torch.testing.assert_close(rows, expected)
        assert not torch.allclose(rows.norm(dim=1), torch.ones(3), atol=1e-2)


def test_tokens_before_samples(load, images):
    """Blocks of older versions keep [tokens, batch, dim]; so do those of torch, unless told."""
    model = load(families.open_clip_clip)
    pools = ["cls", "mean:patch"]
    expected = read(model, images, "vision.*", pools) | read(
        model, images, "vision.layers.*", pools
    )
    twin = random_twin(model)
    twin.module.load_state_dict(model.module.state_dict())
    stack = twin.module.visual.transformer
    stack.batch_first = False
    for block in stack.resblocks:
        block.attn.batch_first = False
    assert find_towers(twin.module)[0].tokens_first
    body = twin.module.visual
    with gf.capture(body, ["vision.embed", "vision.layers.*"], pools) as rows:
        body(model.prepare(images)["inputs"])
    assert_close(dict(rows), {k: expected[k] for k in rows})


def test_a_text_of_exclamation_marks(load):
    """CLIP's tokenizer pads with 0, and that is one of them too."""
    collate = load(families.open_clip_clip).reading("text").collate
    marks = next(t for t in ("!!!!!", "a!!!!!!!", "!,!!,!!!!") if 0 in collate.tokenizer.encode(t))
    batch = collate(["w1", marks])
    lengths = [len(collate.tokenizer.encode(t)) + 2 for t in ("w1", marks)]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["attention_mask"].diff(dim=1).max() == 0  # ones, then zeros


@pytest.mark.parametrize(
    "family", [families.open_clip_clip, families.open_clip_siglip], ids=lambda f: f.__name__
)
def test_texts_that_the_model_cannot_take(load, family):
    collate = load(family).reading("text").collate
    room = families.CONTEXT - (2 if family is families.open_clip_clip else 0)
    fits = " ".join(["w"] * room)
    assert collate([fits])["attention_mask"].sum() == families.CONTEXT
    with pytest.raises(ValueError, match=r"'w w.*is too long; the model takes 24 tokens"):
        collate(["w1", fits + " w"])


def test_a_text_without_a_token(load):
    with pytest.raises(ValueError, match="the text '' has no token"):
        load(families.open_clip_siglip).reading("text").collate(["w1", ""])


def test_what_prepares_inputs_goes_to_worker_processes(load, images):
    for family in (families.open_clip_clip, families.timm_vit):
        model = load(family)
        again = pickle.loads(pickle.dumps(model.transform))
        torch.testing.assert_close(again(images[1]), model.transform(images[1]))


def test_pictures_go_through_the_librarys_own_transform(load, images):
    model = load(families.timm_eva02)
    config = timm.data.resolve_model_data_config(model.module)
    assert config["input_size"] == (3, 32, 32)
    own = timm.data.create_transform(**config, is_training=False)
    torch.testing.assert_close(
        model.transform(images[2].convert("L")), own(images[2].convert("L").convert("RGB"))
    )
    assert not model.module.training
    assert isinstance(model.module.get_classifier(), torch.nn.Identity)


def test_the_activation_that_the_weights_were_trained_with(named, load, monkeypatch):
    file = named(families.open_clip_clip).partition("/")[2]
    tags = {"quick": {"file": file, "quick_gelu": True}, "plain": {"file": file}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-clip", tags)
    quick, plain = gf.load("open_clip:tiny-clip/quick"), gf.load("open_clip:tiny-clip/plain")
    assert "QuickGELU" in quick.notes[0]
    assert quick.name == "open_clip:tiny-clip/quick"
    assert not plain.notes
    kinds = [type(m.module.visual.transformer.resblocks[0].mlp.gelu) for m in (quick, plain)]
    assert [kind.__name__ for kind in kinds] == ["QuickGELU", "GELU"]
    twin = random_twin(quick)
    assert type(twin.module.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"


# ------ around them


@IN_BOTH
def test_the_doctor_finds_them_well(load, images, family):
    model = load(family)
    found = gf.doctor(model, images, only=["repeats", "batch", "padding", "roles"])
    assert found.ok
    assert {"pass"} <= {check.outcome for check in found.checks}


@IN_BOTH
def test_a_twin_of_random_weights(load, family):
    model = load(family)
    before = torch.random.get_rng_state()
    twin, same, other = (random_twin(model, seed) for seed in (3, 3, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    weights = [
        max(m.towers[0].blocks[0].parameters(), key=torch.Tensor.numel)
        for m in (model, twin, same, other)
    ]
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[3])
    torch.testing.assert_close(weights[0].std(), weights[1].std(), rtol=0.2, atol=0)


@pytest.mark.parametrize(
    "family", [families.open_clip_siglip, families.timm_swin], ids=lambda f: f.__name__
)
def test_a_probe_end_to_end(load, named, family):
    r = np.random.default_rng(1)
    photos = [r.integers(0, 255, (40, 40 + 8 * (i % 3), 3), dtype=np.uint8) for i in range(24)]
    places = [np.linspace(-60, 60, 24), np.linspace(-90, 90, 24) ** 2 / 90]
    samples = gf.data.from_arrays(photos, *places)
    run = gf.probe(
        named(family), samples, split=gf.KFold(3), batch_size=5, workers=0,
        controls="random-weights",
    )  # fmt: skip
    layers = run.layers
    sites = {
        "vision.embed",
        *(f"vision.layers.{i}" for i in range(len(load(family).towers[0].blocks))),
    }
    assert sites <= set(layers["site"])
    assert ("vision.joint" in set(layers["site"])) == (family in families.OPEN_CLIP_FAMILIES)
    assert set(layers["control"]) == {"", "random-weights"}


def test_texts_are_probed_too(load):
    texts = [f"w{i} w{i % 7}" for i in range(24)]
    samples = gf.data.from_arrays(texts, np.linspace(-60, 60, 24), np.linspace(-9, 9, 24))
    layers = gf.probe(load(families.open_clip_clip), samples, split=gf.KFold(3)).layers
    assert set(layers["tower"]) == {"text"}
    assert {"text.embed", "text.layers.2", "text.joint"} <= set(layers["site"])


# ------ what cannot be loaded


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "open_clip:ViT-B-32",
            r"names no weights: write open_clip:ViT-B-32/TAG .* openai, .* and \d+ more",
        ),
        ("open_clip:ViT-B/openai", r"no architecture 'ViT-B'; the nearest are ViT-"),
        ("open_clip:nothing/of", r"no architecture 'nothing'$"),
        (
            "open_clip:ViT-B-32/openay",
            r"no weights 'openay' .*: the nearest of \d+ that it has are openai, ",
        ),
        ("open_clip:ViT-B-32/nosuch", r"no weights 'nosuch' for ViT-B-32: the nearest .{,90}$"),
        ("timm:vit_tiny_patch16", r"no model 'vit_tiny_patch16'; the nearest are vit_tiny_"),
        ("timm:vit_tiny_patch16_224.mine", r"weights 'vit_tiny_patch16_224.mine': it has vit_tiny"),
        ("timm:vit_base_patch32_plus_256", r"weights 'vit_base_patch32_.*: timm:local-dir:FOLDER"),
    ],
)
def test_names_that_the_libraries_do_not_have(name, message):
    with pytest.raises(ValueError, match=message):
        gf.load(name)


def test_checkpoints_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nothing.pt; of tags for ViT"):
        gf.load(f"open_clip:ViT-B-32/{tmp_path}/nothing.pt")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nothing"):
        gf.load(f"timm:local-dir:{tmp_path}/nothing")
    with pytest.raises(FileNotFoundError, match=r"has no config.json: it is of another library"):
        gf.load(f"timm:local-dir:{tmp_path}")
    with pytest.raises(FileNotFoundError, match=r"has no open_clip_config.json"):
        gf.load(f"open_clip:local-dir:{tmp_path}")


@pytest.mark.parametrize("name", ["timm:vit_small_patch8_224", "open_clip:ViT-B-32/openai"])
def test_no_network(name, monkeypatch):
    """The Hub is asked once: the libraries would ask for a minute."""
    import huggingface_hub

    asked = []

    def nobody(url):
        asked.append(url)
        raise OSError("nobody answers")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", nobody)
    with pytest.raises(ConnectionError, match=r"cannot be reached \(nobody answers\)"):
        gf.load(name)
    assert len(asked) == 1


def test_a_checkpoint_of_another_architecture(named, tmp_path):
    named(families.open_clip_custom_text)
    (tmp_path / "broken.pt").write_bytes(b"nothing")
    for file in (tmp_path / "broken.pt", named(families.open_clip_siglip).partition("/")[2]):
        with pytest.raises(RuntimeError, match=r"cannot be loaded: .* of this architecture\?"):
            gf.load(f"open_clip:tiny-custom-text/{file}")


def test_options_of_transformers_checkpoints(named):
    with pytest.raises(ValueError, match=r"trust_remote_code goes with a checkpoint of transform"):
        gf.load(named(families.timm_vit), trust_remote_code=True)


def test_half_precision(named, images):
    model = gf.load(named(families.open_clip_clip), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    exact = read(gf.load(named(families.open_clip_clip)), images)
    for key, rows in read(model, images).items():
        assert (rows - exact[key]).norm() < 0.05 * exact[key].norm(), key
