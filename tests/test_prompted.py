from dataclasses import replace

import families
import pandas as pd
import pytest
import tiny
import torch
from PIL import Image

import geofast as gf
from geofast.data import Samples
from geofast.effects.prompted import prompted
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


def test_texts_stand_in_the_words_of_the_run(model):
    _, same, run = prompted(model, TEXTS, run_of())
    assert same.inputs == ["w1", "w2"]
    assert run.probes == {}
    _, worded, _ = prompted(model, TEXTS, run_of("w5 {name} w6"))
    assert list(worded.inputs) == ["w5 w1 w6", "w5 w2 w6"]
    several = run_of("{name}", "w5 {name}")
    both = [probe_of(prompt) for prompt in ("{name}", "w5 {name}")]
    several = replace(several, probes={probe.name: probe for probe in both})
    _, worded, run = prompted(model, TEXTS, several, "w5 {name}")
    assert list(worded.inputs) == ["w5 w1", "w5 w2"]
    assert list(run.probes) == ["lm.layers.0/last/w5 {name}"]
    assert len(several.probes) == 2
    with pytest.raises(
        ValueError, match=r"several prompts: choose one by prompt= \(--prompt\): '\{name\}'"
    ):
        prompted(model, TEXTS, several)
    with pytest.raises(ValueError, match="never asked 'w7'; its prompts: none"):
        prompted(model, TEXTS, run_of(), "w7")


def test_a_model_asks_about_images_what_the_run_asked():
    module, processor = families.llava()
    model = gf.load(module, processor=processor)
    samples = Samples(TABLE, "image", [Image.new("RGB", (32, 32))] * 2, "two pictures")
    asked, same, _ = prompted(model, samples, run_of("w1 w2"))
    assert list(asked.prompts) == ["w1 w2"]
    assert same is samples
    with pytest.raises(ValueError, match="reads"):
        prompted(gf.load(tiny.llama(), processor=tiny.tokenizer()), samples, run_of())
