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
from geofast.doctor import Diagnosis, example, quick
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
    assert "-> nobody has trained lm: load weights" in text
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
    assert "use batch_size=1" in check.advice
    assert outcome(model, "repeats").outcome == "pass"
    assert [c.outcome for c in quick(model, WORDS)] == ["pass", "fail"]
    assert [c.name for c in quick(model, WORDS, batched=False)] == ["repeats"]
    samples = gf.data.from_arrays(WORDS * 4, np.arange(12), np.arange(12))
    with pytest.raises(ValueError, match=r"fails the check 'batch': .* \(--unchecked\) goes on"):
        gf.probe(model, samples, split=gf.KFold(3))
    for told in ({"check": False}, {"batch_size": 1}):
        assert len(gf.probe(model, samples, split=gf.KFold(3), **told).layers)


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
    assert "reads its padding: use batch_size=1" in check.advice
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
    assert check.detail == "256 patch; 64, 60, 60 image tokens"
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
    assert roles(registered).detail == "1 cls, 4 register, 16 patch, as 4 x 4 by patch_size"
    check = roles(changed(registered, "vision", prefix=prefix))
    assert check.outcome == "fail"
    assert said in check.detail


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
    assert check.advice == "too coarse: load the model with dtype=torch.float32"
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


@pytest.mark.parametrize("untrained", ["vision", "lm"])
def test_one_tower_that_nobody_trained(talking, untrained):
    towers = {t.name: t for t in talking.towers}
    trained = next(iter({"vision", "lm"} - {untrained}))
    matrices = [p for block in towers[trained].blocks for p in block.parameters()]
    for p in matrices:
        p.data *= 1.5
    (check,) = gf.doctor(replace(talking, other=None), only=["weights"]).checks
    for p in matrices:
        p.data /= 1.5
    assert check.outcome == "fail"
    assert check.advice == f"nobody has trained {untrained}: load weights"
    assert f" in {trained}" in check.detail


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
    assert len({image.size for image in example("image")}) == 3
