"""Edits in every family, to the last bit, and in models that run in other ways."""

from contextlib import ExitStack
from functools import partial

import families
import numpy as np
import pytest
import tiny
import torch
import transformers
from PIL import Image

import geofast as gf
from geofast.steering.asking import ask, looks_ahead, prompt_of, run
from geofast.steering.scoring import forced

# ------ ways to run a model that talks about images


def bfloat16(folder):
    return gf.load(folder, dtype=torch.bfloat16)


def float16(folder):
    return gf.load(folder, dtype=torch.float16)


def offloaded(folder):
    pytest.importorskip("accelerate")
    parts = {"vision_tower": "cpu", "multi_modal_projector": "disk", "language_model": "disk"}
    places = {f"model.{part}": place for part, place in parts.items()}
    return gf.load(folder, device_map={**places, "lm_head": "cpu"})


def bits_4(folder):
    return _quantised(folder, load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16)


def bits_8(folder):
    return _quantised(folder, load_in_8bit=True)


def _quantised(folder, **bits):
    pytest.importorskip("bitsandbytes")
    module = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, quantization_config=transformers.BitsAndBytesConfig(**bits), dtype=torch.float16
    )
    assert {"Linear4bit", "Linear8bitLt"} & {type(m).__name__ for m in module.modules()}
    for part in module.modules():
        # On CPUs with bfloat16 in AVX-512 it packs weights in blocks of 64, and these are narrower.
        part.support_avx512bf16_for_cpu = False
    return gf.load(module, processor=transformers.AutoProcessor.from_pretrained(folder))


WAYS = (bfloat16, float16, offloaded, bits_4, bits_8)


# ------ cases

STEPS = 3
ORDERS = ([1, 2, 0], [2, 0, 1], [1, 2, 0])  # for tower after tower: no sample keeps its own
TEXTS = ["w1 w2 w3", "w4 w5 w6", "w7 w8 w9"]  # of one length: nothing is padded
IMAGES = [
    Image.fromarray(r.integers(0, 255, (40, 40, 3), dtype=np.uint8))
    for r in map(np.random.default_rng, range(3))
]
INPUTS = {"image": IMAGES, "text": TEXTS}
BOTH = (
    *families.COMPARING_FAMILIES, *families.TALKING_FAMILIES, *families.OPEN_CLIP_FAMILIES,
)  # fmt: skip
VIEWS = [
    (family, kind)
    for family in families.FAMILIES
    for kind in INPUTS
    if family in BOTH or (kind == "text") == (family in families.LANGUAGE_FAMILIES)
]
VIEWS += [(way, "image") for way in WAYS]
LAYER = "lm.layers.1"
ENCODERS = (families.bert, families.minilm, families.xlm_roberta)
SPEAKING = [
    (family, kind)
    for family, kind in VIEWS
    if family in (*families.TALKING_FAMILIES, *families.LANGUAGE_FAMILIES, *WAYS)
    and family not in ENCODERS
    and (family, kind) != (families.phi4_multimodal, "image")  # its names of images are others
]
# PaliGemma's processor hands numpy what it deprecates, InternVL's of transformers 5.17 does, and
# bitsandbytes is full of it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array(_wrap)?__ (implem|must):DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
]


def name_of(what):
    return f"{what[0].__name__}-{what[1]}"


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Returns the model of a family; out of a checkpoint only where it needs one."""
    made = {}

    def of(family):
        if needed := families.NEEDS.get(family.__name__):
            pytest.importorskip(needed, reason=f"{family.__name__} needs {needed}")
        if family not in made:
            if family in WAYS:
                llava = families.save(families.llava, tmp_path_factory.mktemp("llava"))
                made[family] = family(llava)
            elif family in (*families.ZOO_FAMILIES, families.vit_mae):
                folder = tmp_path_factory.mktemp(family.__name__)
                made[family] = gf.load(families.save(family, folder))
            else:
                torch.manual_seed(0)
                module, processor = family()
                made[family] = gf.load(module.eval(), processor=processor)
        return made[family]

    return of


@pytest.fixture(scope="module", params=VIEWS, ids=name_of)
def case(request, load):
    """A model, three inputs, and their states at a layer of every tower, by site."""
    family, kind = request.param
    model = load(family).reading(kind)
    model = model.asking(["w1 w2"]) if model.prompts else model
    sites = [f"{t.name}.layers.1" if t.blocks else t.name for t in model.towers]
    inputs = INPUTS[kind]
    return model, inputs, {site: gf.states(model, inputs, site, "all") for site in sites}


def hidden_states(model, inputs):
    """Whatever hooks at all sites are shown in a forward pass, bit by bit."""
    seen = {}

    def keep(name, hidden):
        seen[name] = hidden.clone()

    with ExitStack() as hooks:
        for site in model.every_site:
            hooks.callback(site.watch(partial(keep, site.name)).remove)
        model.forward(model.prepare(inputs))
    return seen


def every_token(model, inputs, names):
    """Hidden states of all tokens that are not padding, sample by sample, in a forward pass."""
    with gf.capture(model, names, "each") as rows:
        model.forward(model.prepare(inputs))
    return {key.partition("/")[0]: rows[key] for key in rows}


def logits(model, inputs, edits=()):
    """Logits of every step of greedy generation."""
    with model.edited(edits):
        made = run(
            model, prompt_of(model, inputs), max_new_tokens=STEPS, min_new_tokens=STEPS,
            pad_token_id=0, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    return torch.stack(made.logits)


def hooks_of(model):
    return [
        (list(m._forward_hooks), list(m._forward_pre_hooks), vars(m).get("forward"))
        for m in model.module.modules()
    ]


def zero(site, states):
    width = states.at[site].shape[-1]
    return gf.add(site, torch.ones(width), 0.0, 1.0, role=states.role)


# ------ every family


def test_an_edit_of_nothing_and_a_swap_with_itself_change_no_bit(case):
    model, inputs, own = case
    bare = hidden_states(model, inputs)
    edits = [gf.swap(states, []) for states in own.values()]
    edits += [gf.swap(states) for states in own.values()]
    edits += [zero(site, states) for site, states in own.items()]
    with model.edited(edits):
        same = hidden_states(model, inputs)
    assert same.keys() == bare.keys() >= own.keys()
    assert [name for name in bare if not torch.equal(same[name], bare[name])] == []


def test_a_patch_makes_the_states_those_of_another_sample(case):
    model, inputs, own = case
    names = [*own, f"{model.towers[-1].name}.layers.*"]
    bare = every_token(model, inputs, names)
    orders = dict(zip(own, ORDERS, strict=False))
    with model.edited([gf.patch(states).take(orders[site]) for site, states in own.items()]):
        made = every_token(model, inputs, names)
    for site, order in orders.items():
        assert torch.equal(bare[site], own[site].at[site].flatten(0, 1).float())
        assert torch.equal(made[site], own[site].at[site][order].flatten(0, 1).float())
    last = [*made][-1]
    assert not torch.equal(made[last], bare[last])


def test_everything_is_put_back_after_an_exception(case):
    model, inputs, own = case
    bare, before = hidden_states(model, inputs), hooks_of(model)
    edits = [gf.patch(states).take([1, 2, 0]) for states in own.values()]

    def stop(*_):
        raise KeyError("stopped")

    with (
        model.sites(list(own))[-1].module.register_forward_hook(stop),
        pytest.raises(KeyError, match="stopped"),
        model.edited(edits),
    ):
        model.forward(model.prepare(inputs))
    assert hooks_of(model) == before
    after = hidden_states(model, inputs)
    assert [name for name in bare if not torch.equal(after[name], bare[name])] == []


@pytest.mark.parametrize("case", SPEAKING, ids=name_of, indirect=True)
def test_prompts_read_once_for_all_arms_say_what_they_say_when_each_is_read(case, request):
    model, inputs, own = case
    width = own[LAYER].at[LAYER].shape[-1]
    way = torch.linspace(-1, 1, width) ** 3  # a norm takes what all dimensions share away
    edit = gf.add(LAYER, way, [9.0, -9.0, 8.0, 7.0], 1.0, phase="both")
    several = [*inputs, inputs[0]]
    found = []
    for share in (True, False):
        logs = []

        def answer(_arm, rows, prompt, logs=logs):
            logs += [one for _, one in forced(model, prompt(), ["w5 w4"] * len(rows))]

        ask(model, several, [[], [edit]], answer, batch_size=8, share=share)
        found.append(torch.stack(logs))
    exact = model.dtype == torch.float32
    torch.testing.assert_close(*found, atol=1e-4 if exact else 0.2, rtol=0)
    assert (found[0][0] - found[0][len(found[0]) // 2]).abs().max() > 1e-3
    family = request.node.callspec.params["case"][0]
    assert looks_ahead(model, inputs[0]) == (family in (families.paligemma, families.paligemma2))


@pytest.mark.oldest
@pytest.mark.parametrize("case", SPEAKING, ids=name_of, indirect=True)
def test_generation_to_the_last_bit(case):
    model, inputs, own = case
    bare = logits(model, inputs)
    *ahead, spoken = own
    steps = gf.states(model, inputs, spoken, steps=STEPS - 1)
    before = [gf.patch(own[site]) for site in ahead]
    assert torch.equal(logits(model, inputs, [*before, gf.swap(steps, phase="both")]), bare)
    moved = gf.patch(steps, phase="both").take([1, 2, 0])
    with model.edited([*(edit.take([2, 0, 1]) for edit in before), moved]):
        theirs = gf.states(model, inputs, spoken, steps=STEPS - 1)
    assert torch.equal(theirs.at[spoken], steps.at[spoken][[1, 2, 0]])
    assert not torch.equal(logits(model, inputs, [moved]), bare)


@pytest.mark.oldest
@pytest.mark.parametrize(
    "case", [c for c in SPEAKING if c[1] == "image"], ids=name_of, indirect=True
)
def test_a_module_that_takes_images_alone_generates_the_same(case, monkeypatch):
    """As with transformers before 5.18."""
    model, inputs, own = case
    arms = [[], [gf.patch(states).take([1, 2, 0]) for states in own.values()]]
    expected = [logits(model, inputs, edits) for edits in arms]
    for place in ("asking", "generation"):
        monkeypatch.setattr(f"geofast.steering.{place}.takes_looks", lambda _: False)
    for edits, those in zip(arms, expected, strict=True):
        assert torch.equal(logits(model, inputs, edits), those)
    assert "get_image_features" not in vars(model.body)
    with pytest.raises(ValueError, match=r"gives one answer about an image: leave num_beams="):
        model.generate(inputs, num_beams=2)


@pytest.mark.parametrize(
    "case",
    [(f, "image") for f in (families.llava, families.qwen2_5_vl)],
    ids=name_of,
    indirect=True,
)
def test_several_answers_about_images_that_come_twice(case):
    """Their prompts are read once."""
    model, (one, other, _), _ = case
    asked, length = [one, other, one], {"max_new_tokens": STEPS, "min_new_tokens": STEPS}
    greedy = model.generate(asked, **length)
    several = model.generate(asked, **length, do_sample=True, top_k=1, num_return_sequences=2)
    assert several == [text for text in greedy for _ in range(2)]
    alone = [model.generate([image], **length, num_beams=3)[0] for image in asked]
    assert model.generate(asked, **length, num_beams=3) == alone


# ------ models that run in other ways


@pytest.mark.parametrize(
    "case", [(w, "image") for w in (bfloat16, float16, bits_8, bits_4)], ids=name_of, indirect=True
)
def test_what_is_added_is_added_in_float32_and_rounded_once(case):
    model, inputs, own = case
    states = own[LAYER].at[LAYER]
    edit = gf.add(LAYER, torch.linspace(-1, 1, 32) ** 3, [0.1, -0.3, 7.0], 1.0, role="all")
    with model.edited([edit]):
        made = gf.states(model, inputs, LAYER, "all").at[LAYER]
    assert states.dtype in (torch.bfloat16, torch.float16)
    assert torch.equal(made, (states.float() + edit.values[0].float()).to(states.dtype))
    assert not torch.equal(made, states)


@pytest.mark.parametrize("case", [(offloaded, "image")], ids=name_of, indirect=True)
def test_what_is_on_the_disk_stays_there(case):
    model, inputs, own = case
    away = {name for name, p in model.module.named_parameters() if p.is_meta}
    assert {name.split(".")[1] for name in away} == {"language_model", "multi_modal_projector"}
    with model.edited([gf.patch(states) for states in own.values()]):
        model.forward(model.prepare(inputs))
    assert {name for name, p in model.module.named_parameters() if p.is_meta} == away


@pytest.mark.filterwarnings("ignore:.*torch.compiler.disable:UserWarning")
def test_a_layer_that_is_compiled_in_the_block_generates_with_its_edit():
    model = gf.load(tiny.llama(layers=2), processor=tiny.tokenizer())
    held = gf.states(model, TEXTS, LAYER, steps=STEPS - 1)
    edit = gf.swap(held, phase="both").take([1, 2, 0])
    bare, edited = logits(model, TEXTS), logits(model, TEXTS, [edit])
    torch.compiler.reset()
    with model.edited([edit]):
        model.module.model.layers[1].compile(backend="eager")
        torch.testing.assert_close(logits(model, TEXTS), edited)
    torch.testing.assert_close(logits(model, TEXTS), bare)
    torch.compiler.reset()
    assert not torch.allclose(edited, bare, atol=1e-3)
