import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import families
import numpy as np
import pytest
import tiny
import torch
from test_probe import named, painted, pixels
from torch import nn

import geofast as gf
from geofast.checks import CHECKS, Check
from geofast.checks.roles import _told_by_the_processor
from geofast.checks.weights import _unlike_random
from geofast.doctor import Diagnosis, quick
from geofast.models.example import examples_of
from geofast.models.inputs import text_collate
from geofast.models.twin import random_twin

ROOT = Path(__file__).parents[1]
WORDS = ["w1 w2", "w3", "w4 w5 w6 w7"]
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def language(**changes):
    module = tiny.llama()
    return gf.load(module, prepare=text_collate(tiny.tokenizer(), module.model), **changes)


def outcome(model, name, examples=WORDS):
    (check,) = gf.doctor(model, examples, only=[name]).checks
    return check


def test_a_sound_model_passes():
    diagnosis = gf.doctor(language(), WORDS)
    found = {c.name: c.outcome for c in diagnosis.checks}
    assert found == {
        "repeats": "pass", "batch": "pass", "padding": "pass", "hidden_states": "note",
        "roles": "pass", "dtype": "skip", "weights": "fail",
    }  # fmt: skip
    assert not diagnosis.ok  # nobody trained it
    text = str(diagnosis)
    assert "NOT to be trusted" in text
    assert "-> nobody has trained lm and model.embed_tokens.weight: load weights" in text
    assert "2, 1, 4 text tokens" in text
    assert "lm.layers.2: theirs is after the final norm" in text


def test_chance_is_seen():
    model = language()
    layer = model.module.model.layers[1].mlp
    layer.register_forward_hook(lambda _m, _a, out: nn.functional.dropout(out, 0.1, training=True))
    check = outcome(model, "repeats")
    assert check.outcome == "fail"
    assert "lm.layers." in check.detail
    assert "switch it off" in check.advice
    assert [c.outcome for c in quick(model, WORDS)] == ["fail", "fail"]


def test_a_model_that_mixes_its_samples():
    model = language()
    layer = model.module.model.layers[1].mlp
    layer.register_forward_hook(lambda _m, _a, out: out + 10 * out.mean(0, keepdim=True))
    check = outcome(model, "batch")
    assert check.outcome == "fail"
    assert "use batch_size=1 (--batch-size)" in check.advice
    assert outcome(model, "repeats").outcome == "pass"
    assert [c.outcome for c in quick(model, WORDS)] == ["pass", "fail"]
    assert [c.name for c in quick(model, WORDS, batched=False)] == ["repeats"]
    samples = gf.data.from_arrays(WORDS * 4, np.arange(12), np.arange(12))
    with pytest.raises(ValueError, match=r"fails the check 'batch': .* \(--unchecked\) goes on"):
        gf.probe(model, samples, split=gf.KFold(3))
    for told in ({"check": False}, {"batch_size": 1}):
        assert len(gf.probe(model, samples, split=gf.KFold(3), **told).layers)


def shaken(dtype, times):
    """A model that makes much of what it rounds off, which in a batch is a little more."""
    model = language(dtype=dtype)

    def shake(_module, _args, out):
        more = 1 + (len(out) > 1) * torch.finfo(out.dtype).eps
        return (times * more * out / out.norm(dim=-1, keepdim=True)).sin()

    model.module.model.layers[1].mlp.register_forward_hook(shake)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_probe_refuses_no_model_for_the_noise_of_its_dtype(dtype):
    """Its noise is beyond what is usual, and is measured then."""
    model = shaken(dtype, 300)
    named = str(dtype).removeprefix("torch.")
    assert [c.outcome for c in quick(model, WORDS)] == ["pass", "pass"]
    assert f"where {named} alone makes " in quick(model, WORDS)[1].detail
    assert outcome(model, "batch").outcome == "pass"
    assert "alone" not in quick(shaken(dtype, 20), WORDS)[1].detail  # no copy for what is usual
    model.module.model.layers[1].mlp.register_forward_hook(
        lambda _m, _a, out: out + 10 * out.mean(0, keepdim=True)
    )
    assert [c.outcome for c in quick(model, WORDS)] == ["pass", "fail"]


def test_a_model_that_cannot_be_copied_is_held_against_what_is_usual(monkeypatch):
    def full(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = shaken(torch.bfloat16, 300)
    monkeypatch.setattr("copy.deepcopy", full)
    found = quick(model, WORDS)
    assert [c.outcome for c in found] == ["pass", "fail"]
    assert "alone" not in found[1].detail


def test_a_probe_examines_the_texts_that_differ_most():
    """Texts of one length have no padding that a model could read."""
    module = tiny.bert()
    model = gf.load(module, prepare=text_collate(tiny.tokenizer(), module))
    true = module.forward
    module.forward = lambda input_ids, attention_mask=None, **more: true(input_ids, **more)
    texts = [f"w{i} w{i + 1}" for i in range(11)] + ["w1 w2 w3 w4 w5"]
    samples = gf.data.from_arrays(texts, np.arange(12), np.arange(12))
    with pytest.raises(ValueError, match="fails the check 'batch'"):
        gf.probe(model, samples, split=gf.KFold(3))
    run = gf.probe(model, samples.take(np.arange(11)), split=gf.KFold(3))
    assert [c["outcome"] for c in run.info["checks"]] == ["pass", "pass"]
    prompts = ["{text}", "{text} w3 w4 w5"]
    with pytest.raises(ValueError, match="fails the check 'batch'"):
        gf.probe(model, samples.take(np.arange(11)), split=gf.KFold(3), prompts=prompts)


def test_a_probe_examines_the_sites_that_it_reads():
    model = language()
    layer = model.module.model.layers[2].mlp
    ran = []
    layer.register_forward_hook(lambda _m, _a, out: ran.append(1) or torch.rand_like(out))
    samples = gf.data.from_arrays(WORDS * 4, np.arange(12), np.arange(12))
    run = gf.probe(model, samples, split=gf.KFold(3), sites="lm.layers.0")
    assert [c["outcome"] for c in run.info["checks"]] == ["pass", "pass"]
    assert not ran
    with pytest.raises(ValueError, match=r"fails the check 'repeats'.* at lm.layers.2"):
        gf.probe(model, samples, split=gf.KFold(3), sites="lm.layers.2")


def test_a_probe_examines_samples_that_can_be_read():
    """Three images that cannot be opened come first."""
    whole = painted(30)
    images = [b"no image" if i < 3 else whole.load(i) for i in range(30)]
    samples = gf.data.from_arrays(images, whole.table["latitude"], whole.table["longitude"])
    model = gf.load(tiny.dinov2(), prepare=pixels)
    layer = model.module.encoder.layer[1]
    handle = layer.register_forward_hook(lambda _m, _a, out: out + torch.rand_like(out))
    with pytest.raises(ValueError, match="fails the check 'repeats'"):
        gf.probe(model, samples, workers=0)
    handle.remove()
    assert len(gf.probe(model, samples, workers=0).info["checks"]) == 2


def test_quick_checks_that_cannot_be_made_are_told(monkeypatch):
    model = language()
    samples = gf.data.from_arrays(WORDS * 4, np.arange(12), np.arange(12))

    def full(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setitem(CHECKS, "batch", full)
    run = gf.probe(model, samples, split=gf.KFold(3))
    assert run.info["checks"] == []
    assert "the quick checks of the model could not be made: no room" in run.info["warnings"]


def test_positions_that_padding_moves():
    module = tiny.gpt2()
    model = gf.load(module, prepare=text_collate(tiny.tokenizer(), module))
    check = outcome(model, "padding")
    assert check.outcome == "note"
    assert "geofast pads on the right" in check.detail


def test_a_model_that_reads_its_padding():
    module = tiny.bert()
    model = gf.load(module, prepare=text_collate(tiny.tokenizer(), module))
    assert outcome(model, "padding").outcome == "note"  # its positions count from the left
    true = module.forward
    module.forward = lambda input_ids, attention_mask=None, **more: true(input_ids, **more)
    check = outcome(model, "padding")
    assert check.outcome == "fail"
    assert "reads its padding: use batch_size=1 (--batch-size)" in check.advice
    assert outcome(model, "padding", ["w1", "w2", "w3"]).outcome == "skip"
    assert outcome(model, "repeats").outcome == "pass"


def test_random_masking():
    config = families.vit_mae()[0].config
    config.mask_ratio = 0.75
    torch.manual_seed(0)
    module = type(families.vit_mae()[0])(config).eval()
    model = gf.load(module, prepare=pixels)
    images = painted(32).take(range(3))
    images = [image.resize((32, 32)) for image in map(images.load, range(3))]
    check = outcome(model, "repeats", images)
    assert check.outcome == "fail"
    assert "as masking or dropout is: switch it off" in check.advice
    module.config.mask_ratio = 0.0
    module.embeddings.random_masking = lambda x, noise=None: (x, None, None)
    assert outcome(model, "repeats", images).outcome == "pass"


def test_hooks_at_another_place_than_the_hidden_states():
    model = language()
    body = model.body
    true = body.forward

    def shifted(*args, **given):
        out = true(*args, **given)
        if out.hidden_states is None:
            return out
        first, *rest = out.hidden_states
        return SimpleNamespace(hidden_states=(first + 1, *rest))

    body.forward = shifted
    check = outcome(model, "hidden_states")
    assert check.outcome == "fail"
    assert "the first lm.embed" in check.detail


class Odd(nn.Module):
    """Blocks that return what they add beside the stream, first or second."""

    def __init__(self, stream):
        super().__init__()
        self.embed = nn.Embedding(100, 8)
        self.blocks = nn.ModuleList(OddBlock(stream) for _ in range(3))
        self.stream = stream

    def forward(self, input_ids, attention_mask, output_hidden_states=False, return_dict=True):
        states = [self.embed(input_ids)]
        for block in self.blocks:
            states.append(block(states[-1])[self.stream])
        return SimpleNamespace(hidden_states=states if output_hidden_states else None)


class OddBlock(nn.Module):
    def __init__(self, stream):
        super().__init__()
        self.first, self.second, self.stream = nn.Linear(8, 8), nn.Linear(8, 8), stream

    def forward(self, x):
        added = self.second(self.first(x).relu())
        return (x + added, added) if self.stream == 0 else (added, x + added)


@pytest.mark.parametrize(("stream", "found"), [(0, "pass"), (1, "fail")])
def test_a_block_that_returns_something_else_first(stream, found):
    torch.manual_seed(0)
    module = Odd(stream)
    model = gf.load(module, prepare=text_collate(tiny.tokenizer(), module))
    check = outcome(model, "hidden_states")
    assert check.outcome == found
    if found == "fail":
        assert check.detail == "3 of 4 sites differ, the first text.layers.0"
        assert "report this model" in check.advice


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hooks_one_block_late(dtype):
    model = language(dtype=dtype)
    assert outcome(model, "hidden_states").outcome == "note"
    body = model.body
    true = body.forward

    def late(*args, **given):
        out = true(*args, **given)
        if out.hidden_states is not None:
            out.hidden_states = (*out.hidden_states[1:], out.hidden_states[-1])
        return out

    body.forward = late
    assert outcome(model, "hidden_states").outcome == "fail"


def test_only_the_final_norm_excuses_the_last_site():
    model = language()
    body = model.body
    true = body.forward

    def other(*args, **given):
        out = true(*args, **given)
        if out.hidden_states is not None:
            out.hidden_states = (*out.hidden_states[:-1], 3 * out.hidden_states[-1])
        return out

    body.forward = other
    check = outcome(model, "hidden_states")
    assert check.outcome == "fail"
    assert check.detail == "1 of 4 sites differ, the first lm.layers.2"


def twice(features):
    return 2 * features


def backwards(features):
    return features.flip(-2)


@pytest.mark.parametrize("spoil", [twice, backwards])
@pytest.mark.parametrize("family", [families.llava, families.qwen2_5_vl, families.gemma3])
def test_features_of_images_that_are_not_what_one_call_would_use(family, spoil, monkeypatch):
    module, processor = family()
    model = replace(gf.load(module.eval(), processor=processor), other=None)
    assert outcome(model, "hidden_states", None).outcome == "note"
    from geofast.models import model as engine

    true = engine._run

    def spoiled(body, batch, **more):
        out = true(body, batch, **more)
        if body is model.stages[0].body:
            seen = out.pooler_output
            many = isinstance(seen, list | tuple)
            out.pooler_output = [*map(spoil, seen)] if many else spoil(seen)
        return out

    monkeypatch.setattr(engine, "_run", spoiled)
    check = outcome(model, "hidden_states", None)
    assert check.outcome == "fail"
    said = (
        r"5 of 1[01] sites differ from those of one call for image and prompt, the first lm.embed"
    )
    assert re.fullmatch(said, check.detail)


def test_a_prompt_that_spoils_the_image_for_the_next(talking, monkeypatch):
    model = replace(talking, other=None)
    true = model.body.forward

    def consuming(*args, mm_encoder_outputs=None, **given):
        out = true(*args, mm_encoder_outputs=mm_encoder_outputs, **given)
        for features in mm_encoder_outputs["image"].pooler_output if mm_encoder_outputs else ():
            features.zero_()
        return out

    monkeypatch.setattr(model.body, "forward", consuming)
    check = outcome(model, "hidden_states", None)
    assert check.outcome == "fail"
    assert "the first lm.embed" in check.detail


# ------ roles


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    return gf.load(families.save(families.qwen2_5_vl, tmp_path_factory.mktemp("talking")))


def roles(model):
    return gf.doctor(replace(model, other=None), only=["roles"]).checks[0]


def changed(model, tower, **changes):
    """The model with another description of a tower."""
    stages = [
        replace(
            stage,
            towers=tuple(replace(t, **changes) if t.name == tower else t for t in stage.towers),
        )
        for stage in model.stages
    ]
    return replace(model, stages=tuple(stages), other=None)


def test_tokens_of_images_that_are_taken_for_others(talking, monkeypatch):
    check = roles(talking)
    assert check.outcome == "pass"
    told = "256, 240, 240 patch, as the processor says; 64, 60, 60 image tokens"
    assert check.detail == told
    from geofast.models import layout

    def all_but_the_last(site, tower, tokens, call):
        roles = true(site, tower, tokens, call)
        roles[:, -8:] |= 16
        return roles

    true = layout._roles
    monkeypatch.setattr(layout, "_roles", all_but_the_last)
    check = roles(talking)
    assert check.outcome == "fail"
    assert "report this model" in check.advice


def test_a_model_that_is_asked_twice(talking):
    asked = replace(talking.asking(["w1", "w2 w3"]), other=None)
    found = {c.name: c.outcome for c in gf.doctor(asked, only=["batch", "padding", "roles"]).checks}
    assert found == {"batch": "pass", "padding": "pass", "roles": "pass"}


def test_a_wrong_image_token(talking):
    (tower,) = (t for t in talking.towers if t.name == "lm")
    check = roles(changed(talking, "lm", image_token=tower.image_token + 1))
    assert check.outcome == "fail"
    assert "of example 0 sees the image, and geofast calls it" in check.detail
    assert f"its id is {tower.image_token}" in check.detail


def test_a_processor_with_another_image_token(talking):
    class Other:
        def __getattr__(self, name):
            return getattr(talking.transform.processor, name)

        def __call__(self, *args, **given):
            return talking.transform.processor(*args, **given)

        image_token_ids = (families.IDS["<|vision_start|>"],)

    model = replace(talking, transform=replace(talking.transform, processor=Other()))
    check = roles(model)
    assert check.outcome == "fail"
    assert "the processor gives example 0 1 image tokens, geofast counts 64" in check.detail


def test_a_language_model_that_sees_no_image(talking, monkeypatch):
    true = talking.body.get_image_features

    def blind(*args, **given):
        seen = true(*args, **given)
        seen.pooler_output = [torch.zeros_like(x) for x in seen.pooler_output]
        return seen

    monkeypatch.setattr(talking.body, "get_image_features", blind)
    check = roles(talking)
    assert check.outcome == "fail"
    assert check.detail == "no token of the language model sees example 0"


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    return gf.load(families.save(families.dinov2_registers, tmp_path_factory.mktemp("registered")))


@pytest.mark.parametrize(
    ("prefix", "said"),
    [
        (("cls", *["register"] * 3), "5 tokens come before the patches; geofast counts cls, "),
        (("cls", *["register"] * 5), "5 tokens come before the patches; geofast counts cls, "),
        ((), "5 tokens come before the patches; geofast counts none"),
        (("cls", "cls", *["register"] * 3), "the config says 4 registers, geofast 3"),
    ],
)
def test_tokens_before_the_patches_that_are_miscounted(registered, prefix, said):
    assert roles(registered).detail == "1 cls, 4 register, 16 patch, 4 x 4 by config.patch_size"
    check = roles(changed(registered, "vision", prefix=prefix))
    assert check.outcome == "fail"
    assert said in check.detail


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0)])
def test_padding_that_is_taken_for_patches(order, tmp_path, monkeypatch):
    from geofast.models import layout

    model = replace(gf.load(families.save(families.siglip2, tmp_path)), other=None)
    examples = [examples_of("image")[i] for i in order]
    counts = ", ".join(str([16, 15, 15][i]) for i in order)
    padding = ", ".join(str([0, 1, 1][i]) for i in order)
    check = outcome(model, "roles", examples)
    assert check.outcome == "pass"
    named = check.detail.removesuffix(", as the processor says")
    assert sorted(named.split(" patch, ")) == sorted([counts, f"{padding} padding"])
    monkeypatch.setattr(layout, "_mask", lambda *_: None)
    check = outcome(model, "roles", examples)
    assert check.outcome == "fail"
    said = "patches by the processor, and as geofast counts them:"
    assert check.detail == f"{said} {counts} and 16, 16, 16"


def test_patches_that_see_no_image(registered):
    hide = lambda _m, _a, out: torch.cat([out[:, :-1], out[:, -1:] * 0], 1)  # noqa: E731
    handle = registered.module.embeddings.register_forward_hook(hide)
    check = roles(registered)
    handle.remove()
    assert check.outcome == "fail"
    assert (
        check.detail == "token 20 of example 0 does not see the image, and geofast calls it patch"
    )


def test_margins_that_the_model_takes_for_image():
    module, processor = families.sam()
    check = roles(gf.load(module.eval(), processor=processor))
    assert check.outcome == "pass"
    said = "16 patch (8 of them margin that the model takes for image), 4 x 4 by config.patch_size"
    assert check.detail == said


def test_patches_that_overlap():
    """Hiera's are 7 pixels wide and 4 apart."""
    from transformers import HieraConfig, HieraModel, ViTImageProcessorPil

    torch.manual_seed(0)
    config = HieraConfig(embed_dim=8, image_size=[32, 32], depths=[1] * 4, num_heads=[1] * 4)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    model = gf.load(HieraModel(config).eval(), processor=processor)
    assert roles(model).detail == "64 patch, 8 x 8 by config.patch_stride"


def test_what_processors_say_of_patches():
    config = SimpleNamespace(patch_size=2)
    pixels = torch.zeros(2, 3, 3, 4, 4)  # images, tiles, channels, height, width
    of_pixels = torch.zeros(2, 3, 4, 4, dtype=torch.int64)
    of_pixels[0, :, :3] = 1
    of_pixels[1, 0] = 1
    of_patches = torch.ones(2, 3, 2, 2, dtype=torch.bool)
    grid = torch.tensor([[1, 4, 2], [1, 2, 3]])
    sizes = torch.tensor([[4, 8], [2, 6]])
    for told, packed, counts in (
        ({"pixel_attention_mask": of_pixels, "tiles": torch.tensor([3, 1])}, False, [12, 4]),
        ({"image_attention_mask": of_patches, "tiles": torch.tensor([3, 2])}, False, [12, 8]),
        ({"pixel_attention_mask": of_patches[:, 0].flatten(1)}, False, [4, 4]),
        ({"image_grid_thw": grid}, True, [8, 6]),
        ({"spatial_shapes": grid[:, 1:]}, False, [8, 6]),
        ({"image_sizes": sizes}, True, [8, 3]),
        ({"image_sizes": sizes}, False, None),
        ({}, False, None),
    ):
        found = _told_by_the_processor({"pixel_values": pixels, **told}, config, packed=packed)
        assert found == counts, told


def test_a_mask_that_takes_padding_for_text():
    model = language()
    assert outcome(model, "roles").outcome == "pass"
    collate = model.collate

    def unmasked(texts):
        batch = collate(texts)
        return {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}

    check = outcome(replace(model, collate=unmasked), "roles")
    assert check.outcome == "fail"
    assert check.detail.endswith("as geofast counts them: 2, 1, 4 and 4, 4, 4")


# ------ numbers and weights


def test_the_noise_of_narrow_numbers():
    check = outcome(language(dtype=torch.bfloat16), "dtype")
    assert check.outcome == "pass"
    assert 1e-4 < float(check.detail.split()[2]) < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [0.5, 0.02, 0])
def test_what_samples_do_to_each_other_is_more_than_noise(dtype, share):
    model = language(dtype=dtype)
    layer = model.module.model.layers[1].mlp
    layer.register_forward_hook(lambda _m, _a, out: out + share * out.mean(0, keepdim=True))
    check = outcome(model, "batch")
    assert check.outcome == ("fail" if share else "pass")
    if share == 0.5:
        narrow = str(dtype).removeprefix("torch.")
        assert f"at lm.layers.1/last, where {narrow} alone makes " in check.detail
    elif dtype == torch.bfloat16 and share:  # less than its noise
        assert check.detail.startswith("in float32 off by ")
    assert {outcome(model, name).outcome for name in ("repeats", "dtype")} == {"pass"}


def test_padding_is_judged_by_the_noise_too():
    model = language(dtype=torch.bfloat16)
    assert outcome(model, "padding").outcome in ("pass", "note")
    longest = max(len(text.split()) for text in WORDS)
    model.module.model.layers[0].register_forward_hook(
        lambda _m, _a, out: out * (1.03 if out.shape[1] == longest else 1)
    )
    check = outcome(model, "padding")
    assert check.outcome == "fail"
    assert 1e-2 < float(check.detail.split()[2]) < 0.1


def test_no_copy_in_float32(monkeypatch):
    import copy

    def full(_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 28 GiB")

    model = language(dtype=torch.bfloat16)
    monkeypatch.setattr(copy, "deepcopy", full)
    found = {c.name: c for c in gf.doctor(model, WORDS).checks}
    assert found["dtype"].outcome == "skip"
    assert found["dtype"].detail == "a copy in float32 cannot be run: CUDA out of memory"
    assert (found["weights"].outcome, found["weights"].detail) == ("skip", "CUDA out of memory")
    assert found["batch"].outcome == found["repeats"].outcome == "pass"


def vision(dtype=None):
    return gf.load(tiny.dinov2(), prepare=pixels, dtype=dtype)


def test_the_noise_in_r2():
    (check,) = gf.doctor(vision(torch.bfloat16), data=painted(40), only=["dtype"]).checks
    assert check.outcome == "pass"
    assert "; R² of 40 samples moves by at most 0.0" in check.detail
    coarse = vision(torch.bfloat16)
    # Around 300, bfloat16 tells numbers apart by 2: most of what places are read from is gone.
    coarse.module.embeddings.register_forward_hook(lambda _m, _a, out: out + 300)
    (check,) = gf.doctor(coarse, data=painted(40), only=["dtype"]).checks
    assert check.outcome == "fail"
    assert check.advice == "too coarse: load the model with dtype=torch.float32 (--dtype)"
    (check,) = gf.doctor(vision(), data=painted(40), only=["dtype"]).checks
    assert check.outcome == "skip"


def test_r2_beside_the_twins():
    model = vision()
    for p in model.module.parameters():
        p.data *= 1.5
    (check,) = gf.doctor(model, data=painted(60), only=["weights"]).checks
    found = gf.probe(model, painted(60), controls="random-weights", workers=0).layers
    best = found.query("control == ''").sort_values("r2").iloc[-1]
    twin = best["r2:random-weights"]
    said = f"R² at {best['site']}/{best['pool']} {best['r2']:.3f}, of the twin {twin:.3f}"
    assert check.detail.endswith(said)
    assert check.outcome == "pass"


def test_data_that_cannot_be_examined(tmp_path):
    with pytest.raises(ValueError, match="19 samples of arrays can be used; R² needs 20"):
        gf.doctor(vision(), data=painted(19))
    with pytest.raises(ValueError, match="reads image, not text"):
        gf.doctor(vision(), data=named())
    with pytest.raises(ValueError, match="there is no check 'heads'; there are repeats, batch"):
        gf.doctor(vision(), only=["heads"])
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        gf.doctor(vision(), data=tmp_path / "no.csv")


def test_examples_come_from_the_data():
    seen = []
    model = language()
    collate = model.collate

    def noting(texts):
        seen.append(tuple(texts))
        return collate(texts)

    samples = named()
    gf.doctor(replace(model, collate=noting), data=samples, only=["repeats"])
    assert tuple(samples.inputs[:3]) in seen
    gf.doctor(replace(model, collate=noting), WORDS, data=samples, only=["repeats"])
    assert seen[-1] == tuple(WORDS)


def test_rows_are_pooled_in_float64():
    model = language()
    with gf.capture(model, "lm.layers.1", "mean", rows=gf.Rows(dtype=torch.float64)) as rows:
        model.forward(model.prepare(WORDS[2:]))
    seen = []
    (site,) = model.sites("lm.layers.1")
    handle = site.watch(seen.append)
    model.forward(model.prepare(WORDS[2:]))
    handle.remove()
    (row,) = rows.values()
    assert row.dtype == torch.float64
    assert torch.equal(row, seen[0].double().sum(1) / 4)
    assert not torch.equal(row, row.float().double())


def test_weights_that_somebody_trained():
    model = language()
    for p in model.module.parameters():
        p.data *= 1.5
    assert outcome(model, "weights").outcome == "pass"


@pytest.fixture
def trained(talking):
    """Returns the model with numbers that no twin has, but for those whose name has `but` in it."""

    def of(*but):
        for name, p in talking.module.named_parameters():
            if not any(part in name for part in but):
                changed.append(p)
                p.data *= 1.5
        return replace(talking, other=None)

    changed = []
    yield of
    for p in changed:
        p.data /= 1.5


@pytest.mark.parametrize(
    ("untrained", "name"), [("vision", "visual.blocks"), ("lm", "language_model.layers")]
)
def test_one_tower_that_nobody_trained(trained, untrained, name):
    (check,) = gf.doctor(trained(name), only=["weights"]).checks
    assert check.outcome == "fail"
    assert check.advice == f"nobody has trained {untrained}: load weights"
    other = next(iter({"vision", "lm"} - {untrained}))
    assert f" in {other}" in check.detail


@pytest.mark.parametrize(
    "part",
    ["visual.patch_embed.proj.weight", "visual.merger.mlp.2.weight", "lm.embed_tokens.weight"],
)
def test_a_matrix_around_the_blocks_that_nobody_trained(trained, part):
    part = part.replace("lm.", "language_model.")
    (check,) = gf.doctor(trained(part), only=["weights"]).checks
    assert check.outcome == "fail"
    assert check.advice == f"nobody has trained model.{part}: load weights"


def test_what_no_site_depends_on_may_be_random(trained):
    assert gf.doctor(trained("lm_head"), only=["weights"]).ok


def test_a_joint_head_that_nobody_trained():
    module, processor = families.clip()
    for name, p in module.named_parameters():
        p.data *= 1 if name == "text_projection.weight" else 1.5
    image, text = gf.doctor(gf.load(module, processor=processor), only=["weights"]).checks
    assert (image.outcome, text.outcome) == ("pass", "fail")
    assert text.advice == "nobody has trained text_projection.weight: load weights"


def test_positions_that_are_never_trained():
    """ViT-MAE's are sines and cosines, in every twin the same."""
    module, processor = families.vit_mae()
    module.config.mask_ratio = 0.0
    for name, p in module.named_parameters():
        p.data *= 1 if "position" in name else 1.5
    assert gf.doctor(gf.load(module, processor=processor), only=["weights"]).ok


def test_numbers_of_the_spread_and_tails_that_a_twin_has():
    """Rows of other lengths tell them apart; embeddings have those."""
    r = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3000, 100, generator=r)
    assert not _unlike_random(a, b)
    sorted_by_size = a.flatten()[a.flatten().abs().argsort()].view_as(a)
    assert _unlike_random(sorted_by_size, b)


def test_a_table_of_a_hundred_columns():
    words = "words of some length " * 12
    checks = (Check("image: hidden_states", "fail", words, words), Check("batch", "pass", "short"))
    lines = str(Diagnosis("a model", checks)).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0] == "a model: NOT to be trusted as it is"
    column = lines[1].index("words")
    assert all(line[:column].strip() in ("", "->") or "fail" in line for line in lines[1:-1])
    assert lines[-1].split() == ["pass", "batch", "short"]
    assert " ".join(" ".join(lines).split()).count("words of some length") == 24


def test_the_twin_is_drawn_as_the_class_draws():
    model = language()
    before = torch.random.get_rng_state()
    twin, other = random_twin(model, 3), random_twin(model, 4)
    assert torch.equal(before, torch.random.get_rng_state())
    name = "model.layers.0.mlp.up_proj.weight"
    mine, theirs = model.module.get_parameter(name), twin.module.get_parameter(name)
    assert not torch.equal(mine, theirs)
    assert not torch.equal(theirs, other.module.get_parameter(name))
    torch.testing.assert_close(mine.std(), theirs.std(), rtol=0.1, atol=0)
    with gf.capture(twin) as rows:
        twin.forward(twin.prepare(WORDS))
    with gf.capture(model) as own:
        model.forward(model.prepare(WORDS))
    assert not torch.allclose(rows["lm.layers.2/last"], own["lm.layers.2/last"])

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))

    blocks = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), Own()) for _ in range(2)])
    with pytest.raises(ValueError, match=r"0.1.weight does not say how it is drawn"):
        random_twin(gf.load(blocks, prepare=torch.stack))


def test_the_examples_differ_in_size():
    assert len({image.size for image in examples_of("image")}) == 3
