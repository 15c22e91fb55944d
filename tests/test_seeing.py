"""The small model that sees, the words for its crops, and the tool that trained it."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn

import geofast as gf
from geofast.data import from_arrays
from geofast.data.demos import places_seen, satellite, seeing
from geofast.data.demos.seeing import CHAT, LAYER, PROJECTOR, QUESTIONS, SIDE, answer

ROOT = Path(__file__).parent.parent


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import train_projector

    return train_projector


class Letters:
    """A tokenizer of single characters."""

    def __call__(self, text, **_):
        return {"input_ids": [ord(letter) % 100 for letter in text]}


@pytest.fixture
def reader(tool):
    made = object.__new__(tool.Reader)
    made.tokenizer = Letters()
    made.lm = tiny.llama().requires_grad_(False)
    made.lm.config.max_position_embeddings = 512
    made.words = made.lm.get_input_embeddings().weight
    made.head = made.ids("user:")
    return made


@pytest.fixture
def online():
    """Skip where an asset is neither in the cache nor to be had; any other failure is one."""
    try:
        places_seen(satellite(1))
        seeing()
    except RuntimeError as error:
        if "the package index cannot be reached" not in str(error):
            raise
        pytest.skip(str(error))


PLACE = {"continent": "South America", "country": "Brazil", "climate": "tropical"}


# ------------------------------------------------------------------------------------- training


def test_every_answer_of_a_tree_is_scored_as_if_it_stood_alone(tool, reader):
    seen = torch.randn(2, tool.PATCHES, 32, generator=torch.Generator().manual_seed(0))
    trees = [tool.lesson(reader, PLACE, np.random.default_rng(i)) for i in range(2)]
    assert len(trees[0].ids) != len(trees[1].ids)  # so that one is padded
    with torch.no_grad():
        got = reader(seen, trees)
    expected = []
    for one, row in zip(seen, range(2), strict=True):
        rng = np.random.default_rng(row)
        for kind, wordings in QUESTIONS.items():
            asked = reader.question(str(rng.choice(wordings, p=[0.5, 0.25, 0.25])))
            told = reader.ids(answer(kind, PLACE) + "<|im_end|>")
            inputs = torch.cat([reader.words[reader.head], one, reader.words[asked + told]])
            with torch.no_grad():
                log_probs = reader.lm(inputs_embeds=inputs[None]).logits[0].log_softmax(-1)
            first = len(inputs) - len(told) - 1
            expected += [log_probs[first + i, token] for i, token in enumerate(told)]
    torch.testing.assert_close(got, torch.stack(expected), atol=1e-5, rtol=0)


def test_what_is_written_takes_patches_as_they_are(tool):
    projector = tool.new_projector()
    x = torch.randn(5, 7, 384, generator=torch.Generator().manual_seed(0)) * 3 + 2
    mean, deviation = x.mean((0, 1)), x.std((0, 1))
    weights = tool.folded(projector, mean, deviation)
    assert {w.dtype for w in weights.values()} == {torch.float16}
    expected = projector((x.half().float() - mean) / deviation).detach()
    got = tool.projected(weights, x.half().numpy())
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=0)
    assert not torch.allclose(got, projector(x).detach(), atol=2e-2)


def test_distance_from_held_out_blocks(tool):
    table = pd.DataFrame(
        {"latitude": [7.5, 15, 18, 40, 7.5], "longitude": [7.5, 7.5, 20, 7.5, -179]}
    )
    cells = tool.cell(table)
    assert cells[0] == 6 * 24 + 12
    assert len(set(cells)) == 5
    # The block from 0 to 15 degrees north and east, and the one from 180 to 165 west.
    got = tool.apart_from(table, cells[[0, 4]])
    np.testing.assert_allclose(got[:, 0], [-7.5, 0, 5, 25, 166])
    np.testing.assert_allclose(got[4, 1], -1)


def test_a_start_goes_on_where_the_last_one_stopped(tool, reader, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "new_projector", lambda: seeded(0))
    table = pd.DataFrame([PLACE] * 16)
    features = np.random.default_rng(0).normal(size=(16, tool.PATCHES, 384)).astype(np.float16)
    log = tool.Log(tmp_path / "training.log")
    options = SimpleNamespace(work=tmp_path, minutes=90)
    once, _, used = tool.train(reader, table, features, options, log)
    assert used == 16
    assert "2 steps" in log.path.read_text()
    loss = [line for line in log.path.read_text().splitlines() if "  loss " in line]
    assert len(loss) == 2
    again, *_ = tool.train(reader, table, features, options, log)  # all steps are done
    assert "goes on at step 2" in log.path.read_text()
    torch.testing.assert_close(again.state_dict(), once.state_dict())
    assert not torch.equal(once[2].weight, seeded(0)[2].weight)


def seeded(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(384, 16), nn.GELU(), nn.Linear(16, 32))


# ------------------------------------------------------------------------------ what is committed


def test_the_projector_is_whole_and_small():
    weights = load_file(PROJECTOR / "model.safetensors")
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    assert shapes == {
        "linear_1.weight": (576, 384), "linear_1.bias": (576,),
        "linear_2.weight": (576, 576), "linear_2.bias": (576,),
    }  # fmt: skip
    assert all(w.dtype == torch.float16 and w.isfinite().all() for w in weights.values())
    assert (PROJECTOR / "model.safetensors").stat().st_size < 2e6


def test_the_card_says_what_was_measured(tool):
    metrics = json.loads((PROJECTOR / "metrics.json").read_text())
    assert (PROJECTOR / "README.md").read_text() == tool.card(metrics)
    log = (PROJECTOR / "training.log").read_text()
    assert " cores of " in log
    for name in ("between", "apart"):
        for kind, row in ((kind, metrics[name][kind]) for kind in metrics["candidates"]):
            assert f"{name}, {kind}: {row}" in log


def test_it_sees():
    metrics = json.loads((PROJECTOR / "metrics.json").read_text())
    for kind, names in metrics["candidates"].items():
        without = ("uniform", "commonest", "no_image", "other_image")
        between, apart = metrics["between"][kind], metrics["apart"][kind]
        assert between["accuracy"] > max(between[control] for control in without) + 0.4
        # What it has not seen the like of is hard; better than guessing all the same.
        assert apart["accuracy"] > apart["other_image"] + 0.1
        assert apart["balanced"] > 1 / len(names) + 0.1


# ------------------------------------------------------------------------------------------ words


def test_what_is_taught():
    assert answer("continent", PLACE) == "South America."
    assert answer("climate", PLACE) == "Tropical."
    assert answer("where", PLACE) == "This is in Brazil, South America."


@pytest.mark.assets
def test_words_for_places(online):
    places = [[48.85, 2.35], [55.75, 37.6], [62.0, 129.7], [-33.9, 151.2], [0.0, 25.0], [52.4, 4.9]]
    pixels = [np.zeros((2, 2, 3), np.uint8)] * len(places)
    data = from_arrays(pixels, *np.array(places).T)
    table = places_seen(data).table
    assert list(table["country"]) == [
        "France", "Russia", "Russia", "Australia", "Democratic Republic of the Congo",
        "Netherlands",
    ]  # fmt: skip
    assert list(table["country_code"]) == ["FR", "RU", "RU", "AU", "CD", "NL"]
    assert list(table["continent"]) == ["Europe", "Europe", "Asia", "Oceania", "Africa", "Europe"]
    assert list(table["climate"]) == [
        "temperate", "cold", "cold", "subtropical", "tropical", "cold",
    ]  # fmt: skip
    assert table["city"].iloc[0] == "Paris"
    assert "city" not in data.table


# ------------------------------------------------------------------------------------- the model


@pytest.mark.assets
def test_it_is_asked_as_it_was_trained(tool, online):
    from transformers import AutoImageProcessor, AutoTokenizer

    folder = seeing()
    words = AutoTokenizer.from_pretrained(folder)
    turn = [{"type": "image"}, {"type": "text", "text": QUESTIONS["country"][0]}]
    text = words.apply_chat_template(
        [{"role": "user", "content": turn}], chat_template=CHAT, add_generation_prompt=True,
        tokenize=False,
    )  # fmt: skip
    reader = object.__new__(tool.Reader)
    reader.tokenizer = words
    head = reader.ids("<|im_start|>user\n")
    assert words(text)["input_ids"] == [*head, 49152, *reader.question(QUESTIONS["country"][0])]
    images = AutoImageProcessor.from_pretrained(folder)
    pixels = images(images=satellite(1).load(0), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, SIDE, SIDE)


@pytest.mark.assets
def test_it_names_continents_of_crops_that_it_never_saw(online):
    data = places_seen(satellite(12))
    model = gf.load(seeing()).asking([QUESTIONS["continent"][0]])
    assert model.module.config.vision_feature_layer == LAYER
    images = [data.load(i) for i in range(len(data))]
    told = model.generate(images, max_new_tokens=4)
    right = [x == text.strip(".") for x, text in zip(data.table["continent"], told, strict=True)]
    assert sum(right) >= 8, told
    # An image whose patches are another's is that other image, as far as the answer goes.
    others = [images[told.index(text)] for text in ("Africa.", "Asia.")]
    states = gf.states(model, others[::-1], "projector", "patch")
    assert states.at["projector"].shape == (2, (SIDE // 14) ** 2, 576)
    assert model.generate(others, max_new_tokens=4) == ["Africa.", "Asia."]
    swapped = model.generate(others, [gf.swap(states)], max_new_tokens=4)
    assert swapped == ["Asia.", "Africa."]
