from dataclasses import replace

import families
import pandas as pd
import pytest
import tiny
import torch
from PIL import Image

import geofast as gf
from geofast.data import Samples
from geofast.effects.prompted import asked_as, chosen_prompt, worded_as
from geofast.run import Run

TABLE = pd.DataFrame(
    {"id": ["a", "b"], "latitude": [1.0, 2.0], "longitude": [3.0, 4.0], "name": ["w1", "w2"]}
)
TEXTS = Samples(TABLE, "text", ["w1", "w2"], "two words")


def run_of(*prompts):
    return Run({"arguments": {"prompts": list(prompts) or None}}, pd.DataFrame({
        "site": [], "tower": [], "layer": [], "pool": [], "prompt": [], "group": [], "split": [],
        "control": [], "n": [], "d": [], "alpha": [], "r2": [],
    }), TABLE, {})  # fmt: skip


def probe_of(prompt):
    zeros = torch.zeros(3, 2, dtype=torch.float64)
    return gf.Probe("lm.layers.0", "last", prompt, ("latitude", "longitude"), 1.0, zeros, zeros[0])


@pytest.fixture
def model():
    return gf.load(tiny.llama(), processor=tiny.tokenizer())


def test_a_run_says_its_prompts():
    assert chosen_prompt(run_of()) is None
    assert chosen_prompt(run_of("w5 {name}")) == "w5 {name}"
    several = run_of("{name}", "w5 {name}")
    assert chosen_prompt(several, "w5 {name}") == "w5 {name}"
    with pytest.raises(
        ValueError, match=r"several prompts: choose one by prompt= \(--prompt\): '\{name\}'"
    ):
        chosen_prompt(several)
    with pytest.raises(ValueError, match="never asked 'w7'; its prompts: none"):
        chosen_prompt(run_of(), "w7")


def test_texts_stand_in_the_words_of_the_run(model):
    run, same = worded_as(run_of(), TEXTS, None)
    assert same.inputs == ["w1", "w2"]
    assert run.probes == {}
    _, worded = worded_as(run_of("w5 {name} w6"), TEXTS, "w5 {name} w6")
    assert list(worded.inputs) == ["w5 w1 w6", "w5 w2 w6"]
    both = [probe_of(prompt) for prompt in ("{name}", "w5 {name}")]
    both.append(replace(probe_of(""), site="vision.layers.0"))  # which reads no prompt
    several = replace(run_of("{name}", "w5 {name}"), probes={probe.name: probe for probe in both})
    run, worded = worded_as(several, TEXTS, "w5 {name}")
    assert list(worded.inputs) == ["w5 w1", "w5 w2"]
    assert list(run.probes) == ["lm.layers.0/last/w5 {name}", "vision.layers.0/last"]
    assert len(several.probes) == 3
    assert asked_as(run_of("w5 {name}"), model, TEXTS, "w5 {name}") is model
    with pytest.raises(ValueError, match=r"'w5 \{land\}' names 'land'; the samples have id"):
        worded_as(run_of("w5 {land}"), TEXTS, "w5 {land}")


def pictures():
    return Samples(TABLE, "image", [Image.new("RGB", (32, 32))] * 2, "two pictures")


def test_a_model_asks_about_images_what_the_run_asked():
    module, processor = families.llava()
    model = gf.load(module, processor=processor)
    samples = pictures()
    assert worded_as(run_of("w1 w2"), samples, "w1 w2")[1] is samples
    assert list(asked_as(run_of("w1 w2"), model, samples, "w1 w2").prompts) == ["w1 w2"]


def test_what_does_not_go_together_is_told_by_what_is_wrong_first(model):
    of_texts = replace(run_of("{name}"), info={"kind": "text", "model": "LlamaForCausalLM"})
    with pytest.raises(ValueError, match="the run read text, and two pictures was read as image"):
        worded_as(of_texts, pictures(), "{name}")
    assert worded_as(of_texts, TEXTS, "{name}")[1].inputs == ["w1", "w2"]
    # A run of images, of another model: that this one reads no images is the lesser thing.
    of_images = replace(run_of(), info={"kind": "image", "model": "folder/dinov2-small"})
    with pytest.raises(ValueError, match="of folder/dinov2-small, and this model is LlamaForC"):
        asked_as(of_images, model, pictures(), None)
    with pytest.raises(ValueError, match="reads text, not image"):
        asked_as(replace(of_images, info={}), model, pictures(), None)
    deep = replace(probe_of(""), site="lm.layers.7")
    with pytest.raises(ValueError, match=r"probed lm\.layers\.7, which LlamaForCausalLM does not"):
        asked_as(replace(of_texts, probes={deep.name: deep}), model, TEXTS, None)
