"""What is said of a bad prompt, a bad text and a bad batch."""

import families
import numpy as np
import pytest
import tiny
import torch

import geofast as gf
from geofast.data import SampleError, from_arrays
from geofast.extract import first, forward, ready, usable, worded
from geofast.models.inputs import stack_images, text_collate
from geofast.models.model import Model
from geofast.rows import Rows


def texts(*words, **columns):
    return from_arrays(list(words), np.arange(len(words)), np.arange(len(words)), **columns)


@pytest.fixture(scope="module")
def language():
    module = tiny.llama()
    return gf.load(module, prepare=text_collate(tiny.tokenizer(), module.base_model))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts= is empty"),
        (["{text}", "a", "{text}"], "'{text}' is given twice"),
        ("{town}", "names 'town'; the samples have id, latitude, longitude, country, text"),
        ("{}", "names .* the samples have"),
        ("{text.x}", "cannot be filled in: 'str' object has no attribute 'x'; write {column}"),
        ("{text[a]}", "cannot be filled in"),
        ("{", "cannot be filled in: Single '{'"),
    ],
)
def test_bad_prompts(prompts, message):
    with pytest.raises(ValueError, match=message):
        worded(texts("w1", "w2", country=["a", "b"]), prompts)


def test_prompts_are_put_into_words():
    samples = texts("w1", "w2", country=["a", "b"])
    assert [*worded(samples, None)[""].inputs] == ["w1", "w2"]
    assert [*worded(samples, "in {country}")[""].inputs] == ["in a", "in b"]
    two = worded(samples, ["{text}", "{country} {text}"])
    assert {p: [*s.inputs] for p, s in two.items()} == {
        "{text}": ["w1", "w2"],
        "{country} {text}": ["a w1", "b w2"],
    }


def test_prompts_for_images_go_into_the_model(vision):
    images = from_arrays([np.zeros((4, 4, 3), np.uint8)], [0], [0])
    assert list(worded(images, ["a", "b"])) == [""]
    assert ready(vision, images, None, None).stop.name == "vision.layers.2"
    message = r"takes no prompt beside an image; leave prompts= out \(--prompt\)"
    with pytest.raises(ValueError, match=message):
        ready(vision, images, ["a", "b"], None)
    with pytest.raises(ValueError, match="'a' is given twice"):
        worded(images, ["a", "a"])


def test_a_prompt_that_names_no_column():
    texts = from_arrays(["w1", "w2"], [0, 1], [0, 1])
    with pytest.raises(ValueError, match="'in a town' cannot be filled in: it names no column"):
        worded(texts, "in a town")


def test_texts_that_the_model_cannot_take_are_found(language):
    samples = texts("w1", " ", "w2", "w1 " * 70, "w3 " * 63)
    inputs = worded(samples, ["{text}", "{text} w9 w9"])
    good, skipped, lengths = usable(language, inputs, False)
    assert good.tolist() == [0, 2]
    assert [s.where for s in skipped] == [f"arrays, id {i}" for i in (1, 3, 4)]
    assert "has no token" in skipped[0].reason
    assert "has 70 tokens; the model takes 64" in skipped[1].reason
    assert "has 65 tokens" in skipped[2].reason  # with the second prompt only
    assert {k: v.expected.tolist() for k, v in lengths.items()} == {
        "{text}": [1, 1],
        "{text} w9 w9": [3, 3],
    }
    with pytest.raises(SampleError, match=r"arrays, id 1: .* has no token"):
        usable(language, inputs, True)
    with pytest.raises(ValueError, match="none of the 2 samples could be used; arrays, id 0: "):
        usable(language, worded(texts(" ", ""), None), False)


def test_positions_that_begin_after_the_paddings(tmp_path):
    """XLM-R has 66 of them, for 64 tokens; two of these stand around a text."""
    model = gf.load(families.save(families.xlm_roberta, tmp_path))
    inputs = worded(texts(*("w1 " * n for n in (62, 63, 65, 3))), None)
    good, skipped, lengths = usable(model, inputs, False)
    assert good.tolist() == [0, 3]
    assert lengths[""].expected.tolist() == [64, 5]
    for one, tokens in zip(skipped, (65, 67), strict=True):
        assert f"has {tokens} tokens; the model takes 64" in one.reason
    with gf.capture(model) as rows:
        model.forward(model.prepare([inputs[""].inputs[0]]))
    assert rows.n == 1


def test_a_limit_that_the_tokenizer_states():
    """It holds where a model has no positions of its own; Bloom knows distances alone."""
    module, tokenizer = tiny.bloom().base_model, tiny.tokenizer()
    tokenizer.model_max_length = 10
    with pytest.raises(ValueError, match="has 11 tokens; the model takes 10"):
        text_collate(tokenizer, module)(["w1 " * 11])


@pytest.mark.parametrize("stated", [10, 128, int(1e30)])
def test_the_positions_of_a_model_go_before_what_its_tokenizer_states(stated):
    tokenizer = tiny.tokenizer()
    tokenizer.model_max_length = stated
    assert text_collate(tokenizer, tiny.llama().base_model).context == 64
    assert text_collate(tokenizer, families.xlm_roberta()[0]).context == 64
    text = families.clip()[0].text_model
    assert text_collate(tokenizer, text).context == text.config.max_position_embeddings


def photos(*sides, seed=0):
    r = np.random.default_rng(seed)
    n = len(sides)
    pixels = [r.integers(0, 255, (side, side, 3), dtype=np.uint8) for side in sides]
    return from_arrays(pixels, r.uniform(-60, 60, n), r.uniform(-60, 60, n))


@pytest.mark.parametrize(
    ("family", "words", "most"),
    # A square of 32 pixels is 36 and 18 tokens, one of 64 pixels 88 and 66, and the turn's end one.
    [(families.llava_next, 475, 564), (families.qwen2_5_vl, 493, 560)],
    ids=["llava_next", "qwen2_5_vl"],
)
def test_an_image_whose_tiles_are_too_many_beside_a_prompt(tmp_path, family, words, most):
    model = gf.load(families.save(family, tmp_path))
    samples = photos(*[32] * 12, 64)
    asked = {"prompts": "w1 " * words, "sites": "lm.layers.0", "split": gf.KFold(3)}
    run = gf.probe(model, samples, **asked)
    assert run.info["counts"]["skipped"] == 1
    assert len(run.samples) == 12
    said = rf"this image and the prompt 'w1 w1 .*'... have {most} tokens; the model takes 512"
    with pytest.raises(SampleError, match=rf"arrays, id 12: .*{said}"):
        gf.probe(model, samples, strict=True, **asked)
    more = asked | {"prompts": "w1 " * (words + 1)}
    with pytest.raises(ValueError, match=r"not one of the samples .* have 513 tokens; the model"):
        gf.probe(model, samples.take(range(12)), **more)


@pytest.mark.parametrize("family", [families.llava, families.qwen2_5_vl])
def test_a_prompt_that_is_too_long_for_every_image(tmp_path, family):
    model = gf.load(families.save(family, tmp_path))
    samples = from_arrays([b"never read"], [0], [0])
    said = "the prompt 'w1 w1 .*'... has 513 tokens; the model takes 512"
    with pytest.raises(ValueError, match=said):
        ready(model, samples, ["w2", "w1 " * 512], None)
    assert ready(model, samples, "w1 " * 511, None).prompts == ("w1 " * 511,)


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


@pytest.fixture(scope="module")
def vision():
    module = tiny.dinov2()
    model = gf.load(module, prepare=stack_images)
    return Model(model.name, module, model.stages, "image", to_tensor, stack_images)


def test_images_of_another_size_are_named(vision):
    arrays = [np.zeros((28, 42 if i in (2, 5) else 28, 3), np.uint8) for i in range(8)]
    samples = from_arrays(arrays, np.arange(8), np.arange(8), ids=list("abcdefgh"))
    inputs = [to_tensor(a) for a in arrays]
    with pytest.raises(ValueError, match="different sizes in one batch") as told:
        forward(vision, samples, np.arange(8), inputs, Rows())
    assert "Most of the batch is 3 x 28 x 28, but not arrays, id c (3 x 28 x 42), arrays, id f" in (
        str(told.value)
    )
    assert "id a" not in str(told.value)


def test_a_prepare_of_ones_own_that_only_stacks(vision):
    samples = from_arrays([np.zeros((28, 28, 3), np.uint8)] * 3, np.arange(3), np.arange(3))
    own = gf.load(vision.module, prepare=lambda images: {"pixel_values": torch.stack(images)})
    inputs = [torch.zeros(3, 28, 28), torch.zeros(3, 28, 28), torch.zeros(3, 28, 42)]
    with pytest.raises(RuntimeError, match=r"stack expects .* but not arrays, id 2"):
        forward(own, samples, np.arange(3), inputs, Rows())


def test_the_first_sample_that_can_be_read(vision):
    arrays = [b"no image", np.full((28, 28, 3), 7, np.uint8), np.zeros((28, 28, 3), np.uint8)]
    samples = from_arrays(arrays, np.arange(3), np.arange(3))
    found, index, (image,) = first(vision, {"": samples}, {})
    assert found is samples
    assert index.tolist() == [1]
    assert float(image.mean()) == 7
    with pytest.raises(ValueError, match="not one of the samples of arrays could be loaded"):
        first(vision, {"": from_arrays([b"no image"], [0], [0])}, {})


def test_of_texts_the_longest_of_all_prompts_is_tried(language):
    inputs = worded(texts("w1", "w2 w3 w4", "w5 w6"), ["{text} w7", "w8 {text} w9"])
    _, _, lengths = usable(language, inputs, False)
    samples, index, sample = first(language, inputs, lengths)
    assert (index.tolist(), sample) == ([1], ["w8 w2 w3 w4 w9"])
    assert samples is inputs["w8 {text} w9"]
